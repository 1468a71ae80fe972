"""MMLU: questions with four answers, ranked by the likelihood of their letters."""

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
    first_shots,
    most_likely,
)
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row
from kvbits.evaluation.likelihood import Likelihood

LETTERS = "ABCD"
STEM = frozenset(
    (
        *("abstract_algebra", "astronomy", "college_biology", "college_chemistry"),
        *("college_computer_science", "college_mathematics", "college_physics"),
        *("computer_security", "conceptual_physics", "electrical_engineering"),
        *("elementary_mathematics", "high_school_biology", "high_school_chemistry"),
        *("high_school_computer_science", "high_school_mathematics", "high_school_physics"),
        *("high_school_statistics", "machine_learning"),
    )
)


class Question(Row):
    """A question, its four answers and the number of the right one."""

    question: str
    subject: str = Field(validation_alias=AliasChoices("subject", "type"))
    choices: tuple[str, str, str, str]
    answer: int = Field(ge=0, lt=4)


_HUB = "cais/mmlu"
TEST = DataFile("mmlu_test.jsonl", Question, Hub(_HUB, "test", "all"))
STEM_TEST = DataFile("mmlu_stem.jsonl", Question, Hub(_HUB, "test", "all"))
DEV = DataFile("mmlu_dev.jsonl", Question, Hub(_HUB, "dev", "all"))


class Mmlu(Benchmark):
    """Whether the letter of the right answer is the most likely of the four.

    Examples are those of the same subject in the development file.
    """

    name: ClassVar = "mmlu"
    description: ClassVar = "questions with four answers, by log-likelihood"
    origin: ClassVar = "arXiv 2009.03300"
    default_shots: ClassVar = 5
    file: ClassVar = TEST

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (self.file,)

    @property
    def example_files(self) -> tuple[DataFile[Any], ...]:
        return (DEV,)

    def items(self, setup: Setup) -> Iterable[Item]:
        examples = setup.source.read(DEV) if setup.shots else []
        by_subject: dict[str, list[tuple[str, str]]] = {}
        for row in examples:
            shot = _question(row), f" {LETTERS[row.answer]}"
            by_subject.setdefault(row.subject, []).append(shot)
        for number, row in enumerate(setup.source.read(self.file)):
            if not self.counts(row.subject):
                continue
            # the introduction of github.com/hendrycks/test (MIT), for comparable numbers
            about = row.subject.replace("_", " ")
            intro = f"The following are multiple choice questions (with answers) about {about}."
            shots = first_shots(by_subject.get(row.subject, []), setup)
            yield Item(
                doc_id=number,
                request=Rank(
                    Prompt(_question(row), shots, system=intro),
                    tuple(f" {letter}" for letter in LETTERS),
                ),
                doc=row.model_dump(),
                references=(LETTERS[row.answer],),
                group=row.subject,
            )

    def counts(self, subject: str) -> bool:
        """Whether a subject belongs to the benchmark."""
        return True

    def score(self, item: Item, response: tuple[Likelihood, ...]) -> Scores:
        return Scores({"acc": float(LETTERS[most_likely(response)] == item.references[0])})


class MmluStem(Mmlu):
    """The subjects of science, engineering and mathematics alone."""

    name: ClassVar = "mmlu_stem"
    description: ClassVar = "the STEM subjects of MMLU"
    file: ClassVar = STEM_TEST

    def counts(self, subject: str) -> bool:
        return subject in STEM


def _question(row: Question) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, row.choices, strict=True)]
    return "\n".join([row.question.strip(), *lines, "Answer:"])
