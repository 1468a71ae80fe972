"""GAOKAO-Bench, objective questions: choices of the Chinese college entrance examination.

A question may have several parts, and in physics several right letters: all of them give full
points, some of them and none wrong half, as the examination counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from kvbits.evaluation.benchmarks.answers import after_last
from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    no_shots,
)
from kvbits.evaluation.benchmarks.source import DataFile, Row

Kind = Literal["single", "parts", "several", "matching"]

MARK = "【答案】"
KINDS: dict[str, Kind] = {
    "2010-2013_English_MCQs": "single",
    "2010-2022_English_Fill_in_Blanks": "parts",
    "2012-2022_English_Cloze_Test": "matching",
    "2010-2022_English_Reading_Comp": "parts",
    "2010-2022_Math_I_MCQs": "single",
    "2010-2022_Math_II_MCQs": "single",
    "2010-2022_Chinese_Modern_Lit": "parts",
    "2010-2022_Chinese_Lang_and_Usage_MCQs": "parts",
    "2010-2022_Physics_MCQs": "several",
    "2010-2022_Chemistry_MCQs": "single",
    "2010-2022_Biology_MCQs": "single",
    "2010-2022_History_MCQs": "single",
    "2010-2022_Geography_MCQs": "parts",
    "2010-2022_Political_Science_MCQs": "single",
}
_ASKS: dict[Kind, str] = {
    "single": "请解答下面的选择题。先写出推理过程，最后另起一行写“【答案】”和一个选项字母。",
    "parts": "请解答下面每一小题。先写出推理过程，最后按顺序为每一小题各写一行“【答案】”"
    "和选项字母。",
    "several": "请解答下面的选择题，正确选项可能不止一个。先写出推理过程，最后另起一行写“【答案】”"
    "和全部正确选项的字母。",
    "matching": "请从七个选项中为五个空各选一个。先写出推理过程，最后另起一行写“【答案】”"
    "和五个字母。",
}


class Question(Row):
    """A question with its parts' answers and the points of each part."""

    question: str
    answer: tuple[str, ...] = Field(min_length=1)
    score: float = Field(gt=0)


class Gaokao(Benchmark):
    """The share of the points, per subject; ``subjects`` names some, with commas between."""

    name: ClassVar = "gaokao"
    description: ClassVar = "objective questions of GAOKAO-Bench"
    origin: ClassVar = "arXiv 2305.12474"

    subjects: str = "all"
    max_new_tokens: int = Field(default=1024, ge=1)

    @field_validator("subjects")
    @classmethod
    def _check_names(cls, value: str) -> str:
        unknown = [name for name in value.split(",") if name not in {*KINDS, "all"}]
        if unknown:
            raise ValueError(f"must be all or among {', '.join(KINDS)}, got {unknown[0]!r}")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The subjects that are asked."""
        wanted = KINDS if self.subjects == "all" else self.subjects.split(",")
        return tuple(name for name in KINDS if name in wanted)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return tuple(_file(name) for name in self.names)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        number = 0
        for name in self.names:
            for row in setup.source.read(_file(name)):
                question = f"{_ASKS[KINDS[name]]}\n\n{row.question.strip()}\n"
                yield Item(
                    doc_id=number,
                    request=Generate(Prompt(question), self.max_new_tokens),
                    doc=row.model_dump() | {"kind": KINDS[name]},
                    references=row.answer,
                    group=name,
                )
                number += 1

    def score(self, item: Item, response: str) -> Scores:
        """``score`` is the share of the points of a question, weighted by them."""
        kind: Kind = item.doc["kind"]
        found = letters(response, kind, len(item.references))
        points = [
            part_score(answer, right, kind)
            for answer, right in zip(found, item.references, strict=True)
        ]
        total = item.doc["score"] * len(points)
        return Scores({"score": sum(points) / len(points)}, {"score": total})


def letters(text: str, kind: Kind, num_parts: int) -> list[str]:
    """The letters that were chosen for every part, empty where none was.

    >>> letters("A 不对。【答案】BD", "several", 1), letters("【答案】A【答案】：C", "parts", 2)
    (['BD'], ['A', 'C'])
    """
    if kind == "parts":
        marked = re.findall(rf"{MARK}\s*[:：]?\s*([A-Z])", text)
        found = marked if len(marked) == num_parts else re.findall(r"[A-Z]", _answer(text))
    elif kind == "matching":
        found = re.findall(r"[A-G]", _answer(text))
    elif kind == "several":
        found = ["".join(dict.fromkeys(re.findall(r"[A-D]", _answer(text, tail=10))))]
    else:
        said = after_last(text, MARK)
        options = re.findall(r"[A-D]", text if said is None else said)
        found = options[-1:] if said is None else options[:1]
    return (found + [""] * num_parts)[:num_parts]


def part_score(answer: str, right: str, kind: Kind) -> float:
    """1 if right, 1/2 if some of several right letters are given and none wrong, else 0.

    >>> part_score("A", "AC", "several"), part_score("AB", "AC", "several")
    (0.5, 0.0)
    """
    if set(answer) == set(right):
        return 1.0
    is_part = bool(answer) and set(answer) < set(right)
    return 0.5 if kind == "several" and is_part else 0.0


def _answer(text: str, tail: int | None = None) -> str:
    """What follows the first mark; without one the end of the text, or all of it."""
    _, found, rest = text.partition(MARK)
    if found:
        return rest
    return text if tail is None else "".join(text.split())[-tail:]


def _file(name: str) -> DataFile[Question]:
    return DataFile(
        f"gaokao/{name}.json",
        Question,
        origin="Data/Objective_Questions of github.com/OpenLMLab/GAOKAO-Bench",
        key="example",
    )
