"""HumanEval: Python functions from their signature and documentation."""

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
from kvbits.evaluation.benchmarks.source import DataFile, Hub, Row


class Function(Row):
    """The head of a function, and a test of it."""

    task_id: str
    prompt: str
    test: str
    entry_point: str


FILE = DataFile("humaneval.jsonl", Function, Hub("openai/openai_humaneval", "test"))
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@")


class HumanEval(Benchmark):
    """Functions are written to a file, and run nowhere but in a container of the user's choice."""

    name: ClassVar = "humaneval"
    description: ClassVar = "Python functions; written, and run only in a container"
    origin: ClassVar = "arXiv 2107.03374"
    only_writes: ClassVar = True
    has_programs: ClassVar = True

    max_new_tokens: int = Field(default=512, ge=1)

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (FILE,)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, row in enumerate(setup.source.read(FILE)):
            text = _asked(row.prompt) if setup.is_chat else row.prompt
            stop = () if setup.is_chat else STOPS
            yield Item(
                doc_id=number,
                request=Generate(Prompt(text), self.max_new_tokens, stop),
                doc=row.model_dump(),
            )

    def score(self, item: Item, response: str) -> Scores:
        return Scores({})

    def submission(self, item: Item, text: str) -> dict[str, Any]:
        return {"task_id": item.doc["task_id"], "completion": completion(item, text)}

    def program(self, item: Item, text: str) -> str:
        doc = item.doc
        head = doc["prompt"] + completion(item, text)
        return f"{head}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def completion(item: Item, text: str) -> str:
    """What follows the head of the function.

    Of fenced blocks, the last one that defines the function defines it again; else it is the last.
    """
    blocks = code_blocks(text)
    if not blocks:
        return text
    whole = [code for code in blocks if f"def {item.doc['entry_point']}" in code]
    return f"    pass\n\n\n{whole[-1]}" if whole else blocks[-1]


def _asked(head: str) -> str:
    return (
        "Complete this Python function. Answer with one block of code that holds the whole "
        f"function.\n\n```python\n{head}```"
    )
