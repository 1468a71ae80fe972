"""LiveCodeBench, code generation: problems of programming contests by date."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from kvbits.evaluation.benchmarks.answers import code_blocks
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


class Problem(Row):
    """A problem, with code to begin from if it is about a function."""

    question_id: str
    question_content: str
    starter_code: str = ""
    difficulty: str = ""
    contest_date: str = ""


FILE = DataFile(
    "livecodebench.jsonl",
    Problem,
    origin="test.jsonl to test6.jsonl of livecodebench/code_generation_lite on the Hugging Face "
    "hub, joined",
)


class LiveCodeBench(Benchmark):
    """Programs are written in the form that its own evaluator reads, and never run here.

    Its hidden tests are pickled Python objects, which kvbits does not open. ``since`` and
    ``before`` are dates such as 2024-08-01.
    """

    name: ClassVar = "livecodebench"
    description: ClassVar = "programs of contests; written, never run"
    origin: ClassVar = "arXiv 2403.07974"
    only_writes: ClassVar = True

    since: str = Field(default="", pattern=r"^(\d{4}-\d\d-\d\d)?$")
    before: str = Field(default="", pattern=r"^(\d{4}-\d\d-\d\d)?$")
    max_new_tokens: int = Field(default=2048, ge=1)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (FILE,)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, row in enumerate(setup.source.read(FILE)):
            date = row.contest_date[:10]
            if (self.since and date < self.since) or (self.before and date >= self.before):
                continue
            yield Item(
                doc_id=number,
                request=Generate(Prompt(_asked(row)), self.max_new_tokens),
                doc=row.model_dump(),
                group=row.difficulty,
            )

    def score(self, item: Item, response: str) -> Scores:
        return Scores({})

    def submission(self, item: Item, text: str) -> dict[str, Any]:
        blocks = code_blocks(text)  # the last, as its own evaluator reads answers
        return {
            "question_id": item.doc["question_id"],
            "code_list": [blocks[-1] if blocks else text],
        }


def _asked(row: Problem) -> str:
    how = "The program reads from standard input and prints to standard output."
    if row.starter_code:
        how = f"Begin with this code:\n\n```python\n{row.starter_code}\n```"
    return (
        f"Solve this problem in Python.\n\n{row.question_content}\n\n{how}\n\n"
        "Answer with one block of code.\n"
    )
