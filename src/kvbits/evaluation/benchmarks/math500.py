"""MATH-500: problems of competitions, whose answer stands in a box."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from kvbits.evaluation.benchmarks.answers import after_last, last_boxed
from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    first_shots,
)
from kvbits.evaluation.benchmarks.formulas import is_same
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row


class MathProblem(Row):
    """A problem, its solution with a box, and the answer that stands in there."""

    problem: str
    solution: str
    answer: str
    subject: str = ""


TEST = DataFile("math500.jsonl", MathProblem, Hub("HuggingFaceH4/MATH-500", "test"))
TRAIN = DataFile(
    "math_train.jsonl", MathProblem, origin="the training split of MATH, with the same keys"
)


class Math500(Benchmark):
    """Whether the formula in the last box is the right one."""

    name: ClassVar = "math500"
    description: ClassVar = "competition mathematics, the answer in a box"
    origin: ClassVar = "arXiv 2103.03874, 2305.20050"

    max_new_tokens: int = Field(default=2048, ge=1)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (TEST,)

    @property
    def example_files(self) -> tuple[DataFile[Any], ...]:
        return (TRAIN,)

    def items(self, setup: Setup) -> Iterable[Item]:
        rows = setup.source.read(TRAIN) if setup.shots else []
        shots = first_shots([(_question(row), f" {row.solution}") for row in rows], setup)
        for number, row in enumerate(setup.source.read(TEST)):
            prompt = Prompt(_question(row), shots)
            yield Item(
                doc_id=number,
                request=Generate(prompt, self.max_new_tokens, ("Problem:",)),
                doc=row.model_dump(),
                references=(row.answer,),
                group=row.subject,
            )

    def score(self, item: Item, response: str) -> Scores:
        found = final_formula(response)
        return Scores({"acc": float(found is not None and is_same(found, item.references[0]))})


def final_formula(text: str) -> str | None:
    """The formula a solution comes to: in its last box, else what it says the answer is."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = after_last(text, "answer is")
    if said is None:
        return None
    return said.strip().split("\n")[0].removeprefix(":").strip().rstrip(".") or None


def _question(row: MathProblem) -> str:
    return (
        f"Problem: {row.problem}\n\nReason step by step, and put the final answer into "
        "\\boxed{}.\n\nSolution:"
    )
