"""Generated tasks: seeded, of any size, with splits that are disjoint by construction."""

from __future__ import annotations

from kvbits.evaluation.tasks.arithmetic import ArithmeticChain
from kvbits.evaluation.tasks.base import Document, Example, Split, Task, Templates, split_of
from kvbits.evaluation.tasks.passkey import Passkey
from kvbits.evaluation.tasks.recall import (
    CopyList,
    FactRecall,
    KeyValueRecall,
    LineRecall,
    VariableTracking,
)

TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticChain,
    "copy": CopyList,
    "facts": FactRecall,
    "key_value": KeyValueRecall,
    "lines": LineRecall,
    "passkey": Passkey,
    "variables": VariableTracking,
}

__all__ = [
    "TASKS",
    "ArithmeticChain",
    "CopyList",
    "Document",
    "Example",
    "FactRecall",
    "KeyValueRecall",
    "LineRecall",
    "Passkey",
    "Split",
    "Task",
    "Templates",
    "VariableTracking",
    "split_of",
]
