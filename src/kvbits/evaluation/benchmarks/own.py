"""The tasks that kvbits tunes and reports on: look-ups in long lists, written-out arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from kvbits.evaluation.benchmarks.generated import CountTokens, Generated, Names, Part
from kvbits.evaluation.tasks import (
    ArithmeticChain,
    CopyList,
    FactRecall,
    KeyValueRecall,
    LineRecall,
    Task,
    VariableTracking,
)

TOKENS_PER_ENTRY = 20  # of a list of lines or of pairs, under a byte-level BPE of 4096 tokens
_RECALL: dict[str, Callable[[int, CountTokens], Task]] = {
    "key_value": lambda length, _: KeyValueRecall(num_pairs=length // TOKENS_PER_ENTRY),
    "lines": lambda length, _: LineRecall(num_lines=length // TOKENS_PER_ENTRY),
    "facts": lambda length, count: FactRecall(length=length, count_tokens=count),
    "variables": lambda length, count: VariableTracking(length=length, count_tokens=count),
    "copy": lambda length, count: CopyList(length=length, count_tokens=count),
}


class Recall(Generated):
    """Entries of a JSON object, lines of a record, facts, variables and a list in prose.

    ``length`` is the tokens of a prompt, approximately; ``tasks`` names some of them.
    """

    name: ClassVar = "recall"
    description: ClassVar = "look-ups: key-value, lines, facts, variables, copying a list"
    origin: ClassVar = "kvbits"

    length: int = Field(default=1024, ge=256)
    tasks: Names = ("key_value", "lines", "facts", "variables", "copy")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for name in tasks:
            if name not in _RECALL:
                raise ValueError(f"tasks must be among {', '.join(_RECALL)}, got {name!r}")
        return tasks

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        for name in self.tasks:
            task = _RECALL[name](self.length, count_tokens)
            yield Part(task, name, ends_in_lead=name == "facts")


class Arithmetic(Generated):
    """Word problems of 3 to 8 steps, solved by a chain of thought."""

    name: ClassVar = "arithmetic"
    description: ClassVar = "word problems of 3 to 8 written-out steps"
    origin: ClassVar = "kvbits"

    n: int = Field(default=500, ge=1)
    templates: Literal["seen", "heldout"] = "seen"

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        yield Part(ArithmeticChain(templates=self.templates), "arithmetic", ends_in_lead=False)
