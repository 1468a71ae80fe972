"""What benchmarks of generated tasks share: nothing to fetch, as many items as are asked for."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    no_shots,
)
from kvbits.evaluation.tasks import Example, Task
from kvbits.evaluation.tasks.base import estimate_tokens
from kvbits.evaluation.tasks.ruler import RulerTask

CountTokens = Callable[[str], int]


def _several(value: Any) -> Any:
    """Read ``a,b`` and what is one value alone as several, in a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return (value,) if isinstance(value, int) else tuple(value)


def _numbers(value: Any) -> Any:
    """The same of numbers."""
    return tuple(
        int(part) if isinstance(part, str) and part.isdecimal() else part
        for part in _several(value)
    )


Lengths = Annotated[tuple[int, ...], BeforeValidator(_numbers), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]


class Part(NamedTuple):
    """Problems of one kind.

    Attributes:
        task: Makes and judges them.
        label: Name under which they are counted.
        group: Part of that, such as a length; empty for none.
        ends_in_lead: Whether what follows the last question mark of a prompt is how the answer
            begins, which a chat template puts after the question.
    """

    task: Task
    label: str
    group: str = ""
    ends_in_lead: bool = True


class Generated(Benchmark):
    """Problems of generators; a subclass says of which.

    ``n`` is the problems of each part.
    """

    n: int = Field(default=100, ge=1)

    @abstractmethod
    def parts(self, count_tokens: CountTokens) -> Iterable[Part]:
        """Kinds of problems; ``count_tokens`` counts a text's tokens, without special ones."""

    def items(self, setup: Setup) -> Iterator[Item]:
        no_shots(self, setup)
        number = 0
        for part in self.parts(setup.count_tokens):
            for example in part.task.generate(self.n, seed=setup.seed, split="test"):
                yield _item(number, part, example)
                number += 1

    def score(self, item: Item, response: str) -> Scores:
        example = Example(**item.doc)
        task = self._judge(item)
        if isinstance(task, RulerTask):
            return Scores({"recall": task.score(response, example)})
        return Scores({"acc": float(task.is_correct(response, example))})

    def _judge(self, item: Item) -> Task:
        """What judges an item: parts of one label judge alike, whatever their length."""
        return next(part.task for part in self.parts(estimate_tokens) if part.label == item.task)


def _item(number: int, part: Part, example: Example) -> Item:
    question, lead = example.prompt, ""
    if part.ends_in_lead:
        question, mark, rest = example.prompt.rpartition("?")
        question, lead = question + mark, rest
    return Item(
        doc_id=number,
        request=Generate(Prompt(question, lead=lead), part.task.max_new_tokens, (part.task.stop,)),
        doc=_plain(example),
        references=tuple(example.facts.get("references", (example.answer,))),
        task=part.label,
        group=part.group,
    )


def _plain(example: Example) -> dict[str, Any]:
    return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}


def cell(length: int, depth: float) -> str:
    """Name of a cell of a grid; `kvbits.report.grid` reads it."""
    return f"{length} tokens, depth {depth:.2f}"
