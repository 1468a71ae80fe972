"""LAMBADA: the last word of a passage that only the whole passage tells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Item,
    Prompt,
    Rank,
    Scores,
    Setup,
    no_shots,
)
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row
from kvbits.evaluation.likelihood import Likelihood
from kvbits.evaluation.samples import Sample


class LambadaRow(Row):
    """A passage without its last word, and that word; or both as ``text``."""

    context: str
    target: str

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            context, _, target = value["text"].rpartition(" ")
            return {"context": context, "target": target}
        return value


FILE = DataFile(
    "lambada_test.jsonl", LambadaRow, Hub("EleutherAI/lambada_openai", "test", "default")
)


class Lambada(Benchmark):
    """Whether the last word is the most likely one, token by token, and its perplexity."""

    name: ClassVar = "lambada"
    description: ClassVar = "the last word of a passage, by log-likelihood"
    origin: ClassVar = "arXiv 1606.06031"

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (FILE,)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, row in enumerate(setup.source.read(FILE)):
            yield Item(
                doc_id=number,
                request=Rank(Prompt(row.context), (f" {row.target}",)),
                doc=row.model_dump(),
                references=(row.target,),
            )

    def score(self, item: Item, response: tuple[Likelihood, ...]) -> Scores:
        word = response[0]
        return Scores({"acc": float(word.is_greedy), "log-likelihood (word)": word.logprob})

    def summary(self, samples: Sequence[Sample]) -> dict[str, float]:
        mean = sum(sample.metrics["log-likelihood (word)"] for sample in samples) / len(samples)
        return {"perplexity of the word": math.exp(-mean)}
