"""Perplexity of running text, counted as KVQuant counts it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from kvbits.evaluation.benchmarks.base import Benchmark, Item, Read, Scores, Setup, no_shots
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row
from kvbits.evaluation.likelihood import Likelihood
from kvbits.evaluation.samples import Sample
from kvbits.evaluation.statistics import clustered_mean
from kvbits.evaluation.windows import cut_windows, joined_ids, sampled_ids

METRIC = "log-likelihood (token)"
C4_SHARD = 45_576  # rows of the first of 8 files of the validation split


class TextRow(Row):
    """A text."""

    text: str


class LineFile(DataFile[TextRow]):
    """A file of plain text whose every line is the text of a row, its line break included.

    A line of white space is an empty row: so the Hugging Face hub gives wikitext.
    """

    @property
    def form(self) -> str:
        return "plain text with one row a line"

    def objects(self, data: bytes, path: Path) -> list[dict[str, Any]]:
        lines = data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        return [{"text": f"{line}\n" if line.strip() else ""} for line in lines]


WIKITEXT2 = LineFile(
    "wikitext2_test.raw",
    TextRow,
    hub=Hub("Salesforce/wikitext", "test", "wikitext-2-raw-v1"),
    origin="wiki.test.raw of wikitext-2-raw-v1",
)
C4 = DataFile(
    "c4_validation.jsonl",
    TextRow,
    hub=Hub("allenai/c4", f"validation[:{C4_SHARD}]", "en"),
    origin="en/c4-validation.00000-of-00008.json.gz of allenai/c4, unpacked",
)


class Perplexity(Benchmark):
    """Windows of one long row of tokens; a subclass says which.

    ``window`` is the tokens of a window and ``stride`` those from one to the next, by default a
    whole window, as in the papers.
    """

    window: int = Field(default=2048, ge=2)
    stride: int | None = Field(default=None, ge=1)

    @abstractmethod
    def ids(self, setup: Setup) -> list[int]:
        """The tokens that are cut into windows."""

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, segments in enumerate(cut_windows(self.ids(setup), self.window, self.stride)):
            tokens = [token for segment in segments for token in segment.ids]
            yield Item(doc_id=number, request=Read(segments), doc={"ids": tokens})

    def score(self, item: Item, response: tuple[Likelihood, ...]) -> Scores:
        found = response[0]
        return Scores(
            {METRIC: found.logprob / found.num_tokens}, {METRIC: float(found.num_tokens)}
        )

    def summary(self, samples: Sequence[Sample]) -> dict[str, float]:
        counts = [sample.weights[METRIC] for sample in samples]
        sums = [sample.metrics[METRIC] * n for sample, n in zip(samples, counts, strict=True)]
        mean, error = clustered_mean(sums, counts)
        value = math.exp(-mean)
        found = {"perplexity": value}
        if math.isfinite(error):  # by windows, and to first order
            found["standard error of perplexity"] = value * error
        return found


class WikiText2(Perplexity):
    """wikitext-2: all rows of the test split joined by ``joiner`` and tokenized at once."""

    name: ClassVar = "wikitext2"
    description: ClassVar = "perplexity of the test split, in windows as KVQuant counts"
    origin: ClassVar = "arXiv 1609.07843; counted as in arXiv 2401.18079"

    joiner: str = "\n\n"

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (WIKITEXT2,)

    def ids(self, setup: Setup) -> list[int]:
        rows = [row.text for row in setup.source.read(WIKITEXT2)]
        return joined_ids(setup.tokenizer, rows, self.joiner)


class C4Perplexity(Perplexity):
    """C4: ``windows`` windows at random places of random documents, drawn from ``draw_seed``."""

    name: ClassVar = "c4"
    description: ClassVar = "perplexity of 256 windows of the validation split, as KVQuant draws"
    origin: ClassVar = "arXiv 1910.10683; counted as in arXiv 2401.18079"

    windows: int = Field(default=256, ge=1)
    draw_seed: int = 0

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (C4,)

    def ids(self, setup: Setup) -> list[int]:
        texts = [row.text for row in setup.source.read(C4)]
        return sampled_ids(
            setup.tokenizer, texts, self.window, count=self.windows, seed=self.draw_seed
        )
