"""GSM8K: word problems of primary school, with a chain of thought before the number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from importlib.resources import files
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.evaluation.benchmarks.answers import after_last, numbers
from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    Shot,
    first_shots,
)
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row

MARK = "####"


class WordProblem(Row):
    """A problem and its solution, which ends in ``#### NUMBER``."""

    question: str
    answer: str


TEST = DataFile("gsm8k_test.jsonl", WordProblem, Hub("openai/gsm8k", "test", "main"))
TRAIN = DataFile("gsm8k_train.jsonl", WordProblem, Hub("openai/gsm8k", "train", "main"))


class Gsm8k(Benchmark):
    """Whether the number at the end is right.

    Examples are the first of the training file, as in KVTuner's script, or eight of kvbits' own
    (``examples="own"``), which need no file. With ``--chat-template --multi-turn`` they are turns.
    """

    name: ClassVar = "gsm8k"
    description: ClassVar = "word problems with a chain of thought"
    origin: ClassVar = "arXiv 2110.14168"
    default_shots: ClassVar = 8

    examples: Literal["train", "own"] = "train"
    max_new_tokens: int = Field(default=512, ge=1)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (TEST,)

    @property
    def example_files(self) -> tuple[DataFile[Any], ...]:
        return (TRAIN,) if self.examples == "train" else ()

    def items(self, setup: Setup) -> Iterable[Item]:
        shots = self._shots(setup)
        for number, row in enumerate(setup.source.read(TEST)):
            prompt = Prompt(_question(row), shots)
            yield Item(
                doc_id=number,
                request=Generate(prompt, self.max_new_tokens, ("Question:",)),
                doc=row.model_dump(),
                references=(row.answer,),
            )

    def score(self, item: Item, response: str) -> Scores:
        """``strict`` wants the number after ``####``; ``acc`` takes `final_number`."""
        wanted = _after_mark(item.references[0])
        strict = _after_mark(response)
        found = final_number(response)
        return Scores(
            {
                "acc": float(found is not None and found == wanted),
                "strict": float(strict is not None and strict == wanted),
            }
        )

    def _shots(self, setup: Setup) -> tuple[Shot, ...]:
        if self.examples == "train":
            rows = setup.source.read(TRAIN) if setup.shots else []
        else:
            rows = own_problems()
        return first_shots([(_question(row), f" {row.answer}") for row in rows], setup)


def own_problems() -> list[WordProblem]:
    """Eight problems written for kvbits, in the form of the training file."""
    path = files("kvbits.evaluation") / "data" / "word_problems.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [WordProblem.model_validate(json.loads(line)) for line in lines]


def final_number(text: str) -> Decimal | None:
    """The number that a chain of thought comes to.

    >>> final_number("3 + 4 = 7 #### 7"), final_number("So the answer is $1,200.")
    (Decimal('7'), Decimal('1200'))
    """
    marked = _after_mark(text)
    if marked is not None:
        return marked
    said = numbers(after_last(text, "answer is") or "")
    if said:
        return said[0]
    found = numbers(text)
    return found[-1] if found else None


def _after_mark(text: str) -> Decimal | None:
    found = numbers(text.partition(MARK)[2])
    return found[0] if found else None


def _question(row: WordProblem) -> str:
    return f"Question: {row.question}\nAnswer:"
