"""The tasks that kvbits tunes and reports on: look-ups in long lists, written-out arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from kvbits.evaluation.benchmarks.generated import CountTokens, Generated, Part
from kvbits.evaluation.tasks import (
    ArithmeticChain,
    CopyList,
    FactRecall,
    KeyValueRecall,
    LineRecall,
    VariableTracking,
)

TOKENS_PER_ENTRY = 20  # of a list of lines or of pairs, under a byte-level BPE of 4096 tokens


class Recall(Generated):
    """Entries of a JSON object, lines of a record, facts, variables and a list in prose.

    ``length`` is the tokens of a prompt, approximately.
    """

    name: ClassVar = "recall"
    description: ClassVar = "look-ups: key-value, lines, facts, variables, copying a list"
    origin: ClassVar = "kvbits"

    length: int = Field(default=1024, ge=256)

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        entries = self.length // TOKENS_PER_ENTRY
        woven = {"length": self.length, "count_tokens": count_tokens}
        yield Part(KeyValueRecall(num_pairs=entries), "key_value", ends_in_lead=False)
        yield Part(LineRecall(num_lines=entries), "lines", ends_in_lead=False)
        yield Part(FactRecall(**woven), "facts")
        yield Part(VariableTracking(**woven), "variables", ends_in_lead=False)
        yield Part(CopyList(**woven), "copy", ends_in_lead=False)


class Arithmetic(Generated):
    """Word problems of 3 to 8 steps, solved by a chain of thought."""

    name: ClassVar = "arithmetic"
    description: ClassVar = "word problems of 3 to 8 written-out steps"
    origin: ClassVar = "kvbits"

    n: int = Field(default=500, ge=1)
    templates: Literal["seen", "heldout"] = "seen"

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        yield Part(ArithmeticChain(templates=self.templates), "arithmetic", ends_in_lead=False)
