"""Recall tasks: the answer stands in the context only, so that cache damage shows as a miss."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from kvbits.evaluation.tasks.base import (
    END,
    Document,
    Example,
    Split,
    check_split,
    draw,
    estimate_tokens,
    example_rng,
    words,
)
from kvbits.evaluation.tasks.filler import sentences
from kvbits.evaluation.tasks.names import NAMES, PLACES


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Shared part of the recall tasks: a subclass only writes `document`."""

    name: ClassVar[str]
    max_new_tokens: ClassVar[int] = 24
    stop: ClassVar[str] = "."

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw one context and ``num_questions`` questions on it."""
        raise NotImplementedError

    def generate(self, n: int, *, seed: int, split: Split) -> list[Example]:
        """Generate ``n`` examples; example i depends on the seed, the split and i only."""
        check_split(split, "seen")
        return [self._example(example_rng(self.name, split, seed, i), split) for i in range(n)]

    def is_correct(self, completion: str, example: Example) -> bool:
        """Compare the text up to the stop string with the answer, quotes and brackets aside."""
        ended = completion.split(END)[0].lstrip().split(self.stop)[0]
        return ended.strip(' "<>\n') == example.answer

    def _example(self, rng: random.Random, split: Split) -> Example:
        document = self.document(rng, split)
        question, answer = document.turns[0]
        return Example(
            prompt=document.context + question,
            answer=answer.strip(' "<>.'),
            completion=answer,
            task=self.name,
            facts=document.facts,
        )


def number(rng: random.Random, split: Split, digits: int) -> str:
    """Draw a number of ``digits`` digits that belongs to ``split``."""
    return draw(lambda: str(rng.randint(10 ** (digits - 1), 10**digits - 1)), split)


def word_pair(rng: random.Random, split: Split, joint: str) -> str:
    """Draw two words joined by ``joint`` that together belong to ``split``."""
    return draw(lambda: rng.choice(words()) + joint + rng.choice(words()), split)


def pick(rng: random.Random, count: int, num_questions: int, depth: float | None) -> list[int]:
    """Choose which of ``count`` entries to ask for; ``depth`` in [0, 1] places the first one."""
    order = rng.sample(range(count), min(count, num_questions))
    if depth is not None:
        first = min(count - 1, int(depth * count))
        order = [first, *(i for i in order if i != first)][: len(order)]
    return order


@dataclass(frozen=True, kw_only=True)
class KeyValueRecall(RecallTask):
    """Look one key up among ``num_pairs`` in a JSON object.

    Args:
        num_pairs: entries of the object; about 15 tokens each.
        depth: relative place of the entry asked for, random if None.
    """

    name: ClassVar[str] = "key_value"
    stop: ClassVar[str] = "\n"
    num_pairs: int = 40
    depth: float | None = None

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw an object and questions; keys and values each belong to the split."""
        pairs: dict[str, str] = {}
        while len(pairs) < self.num_pairs:
            key = word_pair(rng, split, "-")
            is_text = rng.random() < 0.5
            pairs[key] = word_pair(rng, split, " ") if is_text else number(rng, split, 6)
        keys = list(pairs)
        asked = pick(rng, len(keys), num_questions, self.depth)
        body = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs.items())
        intro = "Extract the value corresponding to the specified key in the JSON object below."
        return Document(
            context=f"{intro}\n\n{{{body}}}\n\n",
            turns=tuple((f'Key: "{keys[i]}" Value:', f' "{pairs[keys[i]]}"') for i in asked),
            facts={"pairs": pairs, "asked": keys[asked[0]], "depth": asked[0] / len(keys)},
        )


@dataclass(frozen=True, kw_only=True)
class LineRecall(RecallTask):
    """Look the register of one line up among ``num_lines``."""

    name: ClassVar[str] = "lines"
    num_lines: int = 40
    depth: float | None = None

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw named lines with a five-digit register each."""
        lines: dict[str, str] = {}
        while len(lines) < self.num_lines:
            lines[word_pair(rng, split, "-")] = number(rng, split, 5)
        keys = list(lines)
        asked = pick(rng, len(keys), num_questions, self.depth)
        body = "\n".join(f"line {key}: REGISTER_CONTENT is <{v}>" for key, v in lines.items())
        intro = "Below is a record of lines I want you to remember."
        return Document(
            context=f"{intro}\n\n{body}\n\nNow the record is over.\n",
            turns=tuple(
                (f"The REGISTER_CONTENT in line {keys[i]} is", f" <{lines[keys[i]]}>.")
                for i in asked
            ),
            facts={"pairs": lines, "asked": keys[asked[0]], "depth": asked[0] / len(keys)},
        )


@dataclass(frozen=True, kw_only=True)
class HiddenInProse(RecallTask):
    """Shared part of the tasks that hide sentences in prose.

    Args:
        length: tokens of the prompt, approximately, as ``count_tokens`` counts them.
        count_tokens: the caller's tokenizer; an estimate from the number of characters by default.
        filler: text to hide them in; generated prose if None.
    """

    length: int = 1024
    count_tokens: Callable[[str], int] = estimate_tokens
    filler: str | None = None

    def weave(self, rng: random.Random, hidden: list[str], reserve: int) -> str:
        """Spread ``hidden`` sentences over prose, in order; ``reserve`` tokens go to the rest."""
        used = sum(self.count_tokens(" " + text) for text in hidden)
        prose = sentences(rng, self.length - used - reserve, self.count_tokens, self.filler)
        places = sorted(rng.randrange(len(prose) + 1) for _ in hidden)
        for place, text in zip(reversed(places), reversed(hidden), strict=True):
            prose.insert(place, text)
        return " ".join(prose) + "\n\n"


_FACTS = (
    ("{} lives in {}.", "Where does {0} live? {0} lives in"),
    (
        "The favorite word of {} is {}.",
        "What is the favorite word of {0}? The favorite word of {0} is",
    ),
    (
        "The secret number of {} is {}.",
        "What is the secret number of {0}? The secret number of {0} is",
    ),
)


def _draw_fact(rng: random.Random, split: Split, person: str) -> tuple[int, str]:
    def make() -> tuple[int, str]:
        kind = rng.randrange(len(_FACTS))
        value = (rng.choice(PLACES), rng.choice(words()), str(rng.randint(1000, 9999)))[kind]
        return kind, value

    return draw(make, split, lambda drawn: f"{person}|{drawn[1]}")


@dataclass(frozen=True, kw_only=True)
class FactRecall(HiddenInProse):
    """Recall what one of several people was said to have, hidden in prose."""

    name: ClassVar[str] = "facts"
    num_facts: int = 5

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw people with a home, a word or a number; every (person, value) is of the split."""
        hidden, turns, drawn = [], [], []
        for person in rng.sample(NAMES, self.num_facts):
            kind, value = _draw_fact(rng, split, person)
            statement, question = _FACTS[kind]
            hidden.append(statement.format(person, value))
            turns.append((question.format(person), f" {value}."))
            drawn.append((person, value))
        asked = pick(rng, len(turns), num_questions, None)
        return Document(
            context=self.weave(rng, hidden, reserve=25),
            turns=tuple(turns[i] for i in asked),
            facts={"facts": drawn, "asked": drawn[asked[0]][0]},
        )


@dataclass(frozen=True, kw_only=True)
class CopyList(HiddenInProse):
    """Repeat a list of words given at the start, after prose."""

    name: ClassVar[str] = "copy"
    max_new_tokens: ClassVar[int] = 160
    num_words: int = 12

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw a list of words and numbers that as a whole belongs to the split."""

        def item() -> str:
            return rng.choice(words()) if rng.random() < 0.7 else str(rng.randint(100, 999))

        listed = draw(lambda: " ".join(item() for _ in range(self.num_words)), split)
        intro = f"Remember this list: {listed}.\n\n"
        prose = self.weave(rng, [], reserve=2 * self.count_tokens(intro))
        return Document(
            context=intro + prose,
            turns=(("The list was:", f" {listed}."),),
            facts={"list": listed},
        )


@dataclass(frozen=True, kw_only=True)
class VariableTracking(HiddenInProse):
    """Follow a chain of assignments hidden in prose, beside chains that lead elsewhere."""

    name: ClassVar[str] = "variables"
    hops: int = 2
    num_distractors: int = 3

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw one chain of ``hops`` assignments and distractor chains of one."""
        letters, digits = "ABCDEFGHJKLMNPQRSTUVWXYZ", "123456789"
        pool = rng.sample(
            [a + b for a in letters for b in digits], self.hops + 1 + 2 * self.num_distractors
        )
        chain, others = pool[: self.hops + 1], pool[self.hops + 1 :]
        value = number(rng, split, 5)
        hidden = [f"VAR {chain[0]} = {value}."]
        hidden += [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
        for a, b in zip(others[::2], others[1::2], strict=True):
            first = rng.randrange(len(hidden) + 1)
            hidden.insert(first, f"VAR {a} = {number(rng, split, 5)}.")
            hidden.insert(rng.randint(first + 1, len(hidden)), f"VAR {b} = VAR {a}.")
        facts: dict[str, Any] = {"value": value, "hops": self.hops}
        return Document(
            context=self.weave(rng, hidden, reserve=20),
            turns=((f"The value of VAR {chain[-1]} is", f" {value}."),),
            facts=facts,
        )
