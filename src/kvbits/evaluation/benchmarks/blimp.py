"""BLiMP: pairs of sentences of which one is good English."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import AliasChoices, Field

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Item,
    Prompt,
    Rank,
    Scores,
    Setup,
    most_likely,
    no_shots,
)
from kvbits.evaluation.benchmarks.source import DataFile, Row
from kvbits.evaluation.likelihood import Likelihood


class Pair(Row):
    """A good and a bad sentence that differ in one thing, and what that is."""

    good: str = Field(validation_alias=AliasChoices("good", "sentence_good"))
    bad: str = Field(validation_alias=AliasChoices("bad", "sentence_bad"))
    uid: str = Field(validation_alias=AliasChoices("uid", "UID"))


FILE = DataFile(
    "blimp_100.jsonl",
    Pair,
    origin="the paradigms of nyu-mll/blimp on the Hugging Face hub, all or 100 of each, joined",
)


class Blimp(Benchmark):
    """Whether the good sentence is more likely than the bad one, from its first token on."""

    name: ClassVar = "blimp"
    description: ClassVar = "minimal pairs of sentences, by log-likelihood"
    origin: ClassVar = "arXiv 1912.00582"

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (FILE,)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, row in enumerate(setup.source.read(FILE)):
            yield Item(
                doc_id=number,
                request=Rank(Prompt("", is_plain=True), (row.good, row.bad)),
                doc=row.model_dump(),
                group=row.uid,
            )

    def score(self, item: Item, response: tuple[Likelihood, ...]) -> Scores:
        return Scores({"acc": float(most_likely(response) == 0)})
