"""Something hidden at a depth of a long text: passkey, needle, and RULER-style tasks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import ClassVar

from pydantic import Field, field_validator

from kvbits.evaluation.benchmarks.generated import (
    CountTokens,
    Generated,
    Lengths,
    Names,
    Part,
    cell,
)
from kvbits.evaluation.tasks import Passkey, Templates
from kvbits.evaluation.tasks.ruler import RULER, Needle, ruler_task

LONGEST_SENTENCE = 40  # tokens by which the prose of a pass key may pass its length


def _with_bos(count_tokens: CountTokens) -> CountTokens:
    """Count the token that may lead a document, too."""
    return lambda text: count_tokens(text) + 1


class Grid(Generated):
    """One part for every length and depth.

    ``lengths`` are tokens of prompt and answer, ``depths`` the number of evenly spaced places from
    first (0) to last (1), ``n`` the problems of a cell.
    """

    n: int = Field(default=10, ge=1)
    lengths: Lengths = (1024, 2048, 4096)
    depths: int = Field(default=11, ge=2)

    def cells(self) -> Iterator[tuple[int, float, str]]:
        """Length, depth and name of every cell."""
        places = [i / (self.depths - 1) for i in range(self.depths)]
        for length, depth in product(self.lengths, places):
            yield length, depth, cell(length, depth)


class PasskeyGrid(Grid):
    """A five-digit number in prose. ``templates="heldout"`` hides it in other sentences."""

    name: ClassVar = "passkey"
    description: ClassVar = "a number hidden in prose, by length and depth"
    origin: ClassVar = "arXiv 2305.16300; prose and wording of our own"

    templates: Templates = "seen"

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        for length, depth, name in self.cells():
            task = Passkey(
                length=length - Passkey.max_new_tokens - LONGEST_SENTENCE,
                count_tokens=count_tokens,
                depth=depth,
                templates=self.templates,
            )
            yield Part(task, "passkey", name)


class NeedleGrid(Grid):
    """A seven-digit number that belongs to two words, in prose; the score is RULER's."""

    name: ClassVar = "needle"
    description: ClassVar = "a needle in a haystack, by length and depth"
    origin: ClassVar = "github.com/gkamradt/LLMTest_NeedleInAHaystack; prose of our own"

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        for length, depth, name in self.cells():
            count = _with_bos(count_tokens)
            task = Needle(name="needle", length=length, depth=depth, count_tokens=count)
            yield Part(task, "needle", name)


class Ruler(Generated):
    """RULER's 13 tasks at every length, or those that ``tasks`` names."""

    name: ClassVar = "ruler"
    description: ClassVar = "needles, chains of variables, word counts, questions, by length"
    origin: ClassVar = "arXiv 2404.06654; prompts, prose and facts of our own"

    lengths: Lengths = (4096,)
    tasks: Names = ("all",)

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for name in tasks:
            if name != "all":
                ruler_task(name)
        return tasks

    def parts(self, count_tokens: CountTokens) -> Iterator[Part]:
        names = tuple(RULER) if "all" in self.tasks else self.tasks
        for length in self.lengths:
            for name in names:
                task = ruler_task(name, length=length, count_tokens=_with_bos(count_tokens))
                yield Part(task, name, f"{length} tokens")
