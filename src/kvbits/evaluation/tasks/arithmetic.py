"""Arithmetic word problems of 3 to 8 steps, solved by a chain of thought, one equation a line.

Two families: a ledger (one person's number changes event by event) and relations (each person's
number is given by earlier people's, so that a step must look its inputs up in the problem and in
the chain so far). Numbers stay within `MAX_VALUE`, which a model of 17 million parameters can
learn to add; one wrong cached digit breaks the answer, which is what makes the task useful here.

Three facets are split separately: the names (people, in order, and the objects), the numbers (in
order) and the sequence of operations. A test problem shares none of the three with any training
problem.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from kvbits.evaluation.tasks.arithmetic_templates import (
    BOXES,
    LEDGER,
    OBJECTS,
    RELATIONS,
    Sentences,
)
from kvbits.evaluation.tasks.base import (
    Document,
    Example,
    Split,
    Templates,
    check_split,
    draw,
    example_rng,
    split_of,
)
from kvbits.evaluation.tasks.names import NAMES

MAX_VALUE = 400
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "sum": "+"}


class Step(NamedTuple):
    """One operation: its kind, and the earlier people it refers to (relations only)."""

    kind: str
    refs: tuple[int, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.refs)])


@dataclass(frozen=True, kw_only=True)
class ArithmeticChain:
    """Generate word problems with their worked solutions.

    Args:
        min_steps: fewest equations of a solution.
        max_steps: most equations of a solution, at most 8.
        family: "ledger", "relations" or "mixed".
        templates: "heldout" words every sentence in a way that training never shows.
    """

    name: ClassVar[str] = "arithmetic"
    max_new_tokens: ClassVar[int] = 176
    stop: ClassVar[str] = "."
    min_steps: int = 3
    max_steps: int = 8
    family: Literal["ledger", "relations", "mixed"] = "mixed"
    templates: Templates = "seen"

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= 8:
            raise ValueError(
                f"min_steps and max_steps must satisfy 1 <= min_steps <= max_steps <= 8, "
                f"got {self.min_steps} and {self.max_steps}"
            )

    def generate(self, n: int, *, seed: int, split: Split) -> list[Example]:
        """Generate ``n`` examples; example i depends on settings, seed, split and i only."""
        check_split(split, self.templates)
        return [self._example(example_rng(self.name, split, seed, i), split) for i in range(n)]

    def is_correct(self, completion: str, example: Example) -> bool:
        """Compare the number after "The answer is" with the answer."""
        found = re.search(r"The answer is (-?\d+)", completion)
        return found is not None and found[1] == example.answer

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw one problem; its only turn is the whole chain of thought."""
        example = self._example(rng, split)
        return Document(
            context="", turns=((example.prompt, example.completion),), facts=example.facts
        )

    def _example(self, rng: random.Random, split: Split) -> Example:
        family = self.family if self.family != "mixed" else rng.choice(("ledger", "relations"))
        steps = rng.randint(self.min_steps, self.max_steps)
        tell = _tell_ledger if family == "ledger" else _tell_relations
        problem, lines, answer, facts = tell(rng, split, steps, self.templates)
        return Example(
            prompt=f"Problem: {problem}\nSolution:\n",
            answer=str(answer),
            completion="\n".join([*lines, f"The answer is {answer}."]),
            task=self.name,
            facts={"family": family, "num_steps": steps, "templates": self.templates, **facts},
        )


_Told = tuple[str, list[str], int, dict[str, Any]]


def _say(rng: random.Random, bank: Sentences, templates: Templates, **slots: object) -> str:
    chosen = bank.seen if templates == "seen" else bank.heldout
    return rng.choice(chosen).format(**slots)


def _solve(
    rng: random.Random,
    split: Split,
    make_steps: Callable[[], list[Step]],
    run: Callable[[random.Random, list[Step]], list[tuple[int, ...]] | None],
) -> tuple[list[Step], list[tuple[int, ...]]]:
    """Draw operations and numbers of the split that fit each other."""
    while True:
        steps = draw(make_steps, split, lambda drawn: " ".join(map(str, drawn)))
        for _ in range(100):
            numbers = run(rng, steps)
            if numbers is not None and split_of(str(numbers)) == split:
                return steps, numbers


def _operand(rng: random.Random, kind: str, value: int) -> tuple[int, ...] | None:
    """Draw the numbers of an operation on ``value``; the result stays in 1 to MAX_VALUE."""
    if kind == "add":
        top = min(90, MAX_VALUE - value)
        return (rng.randint(2, top),) if top >= 2 else None
    if kind == "subtract":
        return (rng.randint(1, min(90, value - 1)),) if value >= 2 else None
    if kind == "multiply":
        top = min(6, MAX_VALUE // value)
        return (rng.randint(2, top),) if top >= 2 else None
    if kind == "divide":
        options = [k for k in range(2, 7) if value % k == 0 and value // k >= 2]
        return (rng.choice(options),) if options else None
    pair = (rng.randint(2, 9), rng.randint(2, 9))
    product = pair[0] * pair[1]
    fits = value + product <= MAX_VALUE if kind == "add_product" else product < value
    return pair if fits else None


def _apply(kind: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[
        _SIGNS[kind]
    ]


def _ledger_steps(rng: random.Random, count: int) -> list[Step]:
    kinds: list[str] = []
    while count:
        kind = rng.choice([k for k in LEDGER if k not in ("start", "ask")])
        cost = 2 if kind.endswith("product") else 1
        if cost <= count and kinds.count(kind) < (2 if kind in ("multiply", "divide") else 4):
            kinds.append(kind)
            count -= cost
    return [Step(kind) for kind in kinds]


def _run_ledger(rng: random.Random, steps: list[Step]) -> list[tuple[int, ...]] | None:
    value = rng.randint(4, 90)
    numbers: list[tuple[int, ...]] = [(value,)]
    for step in steps:
        operand = _operand(rng, step.kind, value)
        if operand is None:
            return None
        amount = operand[0] if len(operand) == 1 else operand[0] * operand[1]
        value = _apply(step.kind.removesuffix("_product"), value, amount)
        numbers.append(operand)
    return numbers


def _tell_ledger(rng: random.Random, split: Split, count: int, templates: Templates) -> _Told:
    steps, numbers = _solve(rng, split, lambda: _ledger_steps(rng, count), _run_ledger)
    people = draw(
        lambda: [*rng.sample(NAMES, 2), rng.choice(OBJECTS), rng.choice(BOXES)], split, "|".join
    )
    slots = dict(zip(("a", "b", "objects", "boxes"), people, strict=True))
    value = numbers[0][0]
    text = [_say(rng, LEDGER["start"], templates, n=value, **slots)]
    lines = []
    for step, operand in zip(steps, numbers[1:], strict=True):
        kind, amount = step.kind.removesuffix("_product"), operand[0]
        if len(operand) == 2:
            amount = operand[0] * operand[1]
            lines.append(f"{operand[0]} * {operand[1]} = {amount}")
        text.append(_say(rng, LEDGER[step.kind], templates, n=operand[0], m=operand[-1], **slots))
        result = _apply(kind, value, amount)
        lines.append(f"{value} {_SIGNS[kind]} {amount} = {result}")
        value = result
    text.append(_say(rng, LEDGER["ask"], templates, **slots))
    facts = {"names": people, "numbers": numbers, "steps": [str(step) for step in steps]}
    return " ".join(text), lines, value, facts


def _relation_steps(rng: random.Random, count: int) -> list[Step]:
    steps: list[Step] = []
    for position in range(1, count + 1):
        options = ["add", "subtract", "multiply", "divide", "add", "subtract"]
        if position > 1:
            options.append("sum")
        kind = rng.choice(options)
        if position == count and position > 1 and rng.random() < 0.4:
            kind = "sum"
        refs = rng.sample(range(position), 2 if kind == "sum" else 1)
        # half of the references go to the newest person, so that chains stay long
        if kind != "sum" and rng.random() < 0.5:
            refs = [position - 1]
        steps.append(Step(kind, tuple(refs)))
    return steps


def _run_relations(rng: random.Random, steps: list[Step]) -> list[tuple[int, ...]] | None:
    values = [rng.randint(4, 90)]
    numbers: list[tuple[int, ...]] = [(values[0],)]
    for step in steps:
        left = values[step.refs[0]]
        if step.kind == "sum":
            numbers.append(())
            values.append(left + values[step.refs[1]])
            if values[-1] > MAX_VALUE:
                return None
            continue
        operand = _operand(rng, step.kind, left)
        if operand is None:
            return None
        numbers.append(operand)
        values.append(_apply(step.kind, left, operand[0]))
    return numbers


def _tell_relations(rng: random.Random, split: Split, count: int, templates: Templates) -> _Told:
    steps, numbers = _solve(rng, split, lambda: _relation_steps(rng, count), _run_relations)
    names = draw(lambda: [*rng.sample(NAMES, count + 1), rng.choice(OBJECTS)], split, "|".join)
    objects = names[-1]
    values = [numbers[0][0]]
    text = [_say(rng, RELATIONS["start"], templates, a=names[0], n=values[0], objects=objects)]
    lines = []
    for position, (step, operand) in enumerate(zip(steps, numbers[1:], strict=True), start=1):
        left = values[step.refs[0]]
        right = operand[0] if operand else values[step.refs[1]]
        others = {key: names[ref] for key, ref in zip("bc", step.refs, strict=False)}
        slots = {"a": names[position], "objects": objects, "n": right, **others}
        values.append(_apply(step.kind, left, right))
        is_question = step.kind == "sum" and position == count
        if not is_question:
            text.append(_say(rng, RELATIONS[step.kind], templates, **slots))
        subject = "Together" if is_question else names[position]
        lines.append(f"{subject}: {left} {_SIGNS[step.kind]} {right} = {values[-1]}")
    ask = "ask_sum" if is_question else "ask"
    text.append(_say(rng, RELATIONS[ask], templates, **slots))
    facts = {"names": names, "numbers": numbers, "steps": [str(step) for step in steps]}
    return " ".join(text), lines, values[-1], facts
