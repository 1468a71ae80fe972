"""LongBench: questions, summaries, classes, retrieval and code over long contexts.

Prompts and lengths are those of LongBench (MIT, see ``data/longbench.LICENSE``), so that scores
can be compared. As there, prompts too long are cut in the middle, and few-shot and code prompts
are never wrapped in a chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, field_validator

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    no_shots,
)
from kvbits.evaluation.benchmarks.labels import (
    class_score,
    code_line_score,
    count_score,
    paragraph_score,
)
from kvbits.evaluation.benchmarks.overlap import (
    chinese_f1,
    chinese_rouge_l,
    english_f1,
    rouge_l,
)
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row
from kvbits.evaluation.samples import Sample

Metric = Callable[[str, str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "english_f1": lambda answer, reference, _: english_f1(answer, reference),
    "chinese_f1": lambda answer, reference, _: chinese_f1(answer, reference),
    "rouge_l": lambda answer, reference, _: rouge_l(answer, reference),
    "chinese_rouge_l": lambda answer, reference, _: chinese_rouge_l(answer, reference),
    "count": lambda answer, reference, _: count_score(answer, reference),
    "paragraph": lambda answer, reference, _: paragraph_score(answer, reference),
    "code_line": lambda answer, reference, _: code_line_score(answer, reference),
    "class": class_score,
}
FEW_SHOT = frozenset(("trec", "triviaqa", "samsum", "lsht"))
NEVER_CHAT = FEW_SHOT | {"lcc", "repobench-p"}
BY_LENGTH = (  # LongBench-E
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec"),
    *("triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)


class Dataset(NamedTuple):
    """How one dataset is asked and scored."""

    prompt: str
    max_new_tokens: int
    metric: str


class LongContext(Row):
    """A context and what is asked of it."""

    input: str
    context: str
    answers: tuple[str, ...] = Field(min_length=1)
    length: int = 0
    all_classes: tuple[str, ...] | None = None


@cache
def datasets() -> dict[str, Dataset]:
    """The 21 datasets, by name."""
    text = (files("kvbits.evaluation") / "data" / "longbench.json").read_text(encoding="utf-8")
    return {name: Dataset(**fields) for name, fields in json.loads(text).items()}


class LongBench(Benchmark):
    """The mean score of every dataset, and the mean of those.

    ``datasets`` names some, with commas between; ``by_length`` takes the 13 of LongBench-E, in
    three ranges of length.
    """

    name: ClassVar = "longbench"
    description: ClassVar = "21 datasets of long contexts"
    origin: ClassVar = "arXiv 2308.14508"

    datasets: str = "all"
    by_length: bool = False

    @field_validator("datasets")
    @classmethod
    def _check_names(cls, value: str) -> str:
        unknown = [name for name in value.split(",") if name not in {*datasets(), "all"}]
        if unknown:
            raise ValueError(f"must be all or among {', '.join(datasets())}, got {unknown[0]!r}")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets that are run."""
        known = BY_LENGTH if self.by_length else tuple(datasets())
        wanted = known if self.datasets == "all" else self.datasets.split(",")
        return tuple(name for name in known if name in wanted)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return tuple(self._file(name) for name in self.names)

    def _file(self, name: str) -> DataFile[LongContext]:
        name += "_e" if self.by_length else ""
        return DataFile(
            f"longbench/{name}.jsonl",
            LongContext,
            Hub("THUDM/LongBench", "test", name),
            "data.zip there",
        )

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        number = 0
        for name in self.names:
            for row in setup.source.read(self._file(name)):
                yield self._item(number, name, row)
                number += 1

    def _item(self, number: int, name: str, row: LongContext) -> Item:
        dataset = datasets()[name]
        text = dataset.prompt.format(context=row.context, input=row.input)
        prompt = Prompt(text, is_plain=name in NEVER_CHAT, may_cut=True)
        doc = row.model_dump(exclude={"context"})
        doc["context_sha256"] = hashlib.sha256(row.context.encode()).hexdigest()
        return Item(
            doc_id=number,
            request=Generate(prompt, dataset.max_new_tokens),
            doc=doc,
            references=row.answers,
            task=f"longbench_{name}",
            group=_length_range(row.length) if self.by_length else "",
        )

    def score(self, item: Item, response: str) -> Scores:
        name = item.task.removeprefix("longbench_")
        metric = METRICS[datasets()[name].metric]
        if name in FEW_SHOT:  # the model goes on with examples of its own
            response = response.lstrip("\n").split("\n")[0]
        classes = item.doc["all_classes"] or ()
        return Scores({"score": max(metric(response, each, classes) for each in item.references)})

    def summary(self, samples: Sequence[Sample]) -> dict[str, float]:
        by_task: dict[str, list[float]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample.metrics["score"])
        means = [sum(scores) / len(scores) for scores in by_task.values()]
        return {"mean of the datasets": sum(means) / len(means)}


def _length_range(length: int) -> str:
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
