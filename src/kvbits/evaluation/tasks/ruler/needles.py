"""Needles in a haystack: one, among others alike, with several values, several asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvbits.evaluation.tasks.base import Split
from kvbits.evaluation.tasks.ruler.base import Drawn, RulerTask
from kvbits.evaluation.tasks.ruler.prose import any_text, draw_text, haystack, spread

_INTRO = (
    "Some magic {kind}s are hidden in the text below. Keep them in mind; you will be asked for "
    "them afterwards."
)
_NEEDLE = "The magic {kind} of {key} is {value}."
_ONE = "What is the magic {kind} of {keys}? The magic {kind} of {keys} is"
_MANY = "What are all the magic {kind}s of {keys}? The magic {kind}s of {keys} are"


@dataclass(frozen=True, kw_only=True)
class Needle(RulerTask):
    """Find the values of one or several keys.

    Args:
        haystack: ``prose``, ``noise`` (one line again and again), or ``needles``: nothing but
            needles with other keys.
        keys: what a key is, two words or a UUID.
        values: what a value is, seven digits or a UUID.
        num_keys: needles with distinct keys, those asked for included.
        num_values: values of every key that is asked for.
        num_queries: keys that are asked for.
        depth: relative place of all needles asked for, 0 first and 1 last; random if None.
    """

    max_new_tokens: ClassVar[int] = 128
    name: str = "niah_single_2"
    haystack: Literal["prose", "noise", "needles"] = "prose"
    keys: Literal["words", "uuid"] = "words"
    values: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_keys or self.num_values < 1:
            raise ValueError(
                "num_queries must be between 1 and num_keys, and num_values at least 1, got "
                f"{self.num_queries}, {self.num_keys} and {self.num_values}"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be between 0 and 1, got {self.depth}")

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw keys and values, and hide them among ``size`` sentences or other needles."""
        rng = random.Random(seed)
        kind = "number" if self.values == "number" else "identifier"
        keys = _distinct(rng, split, self.keys, self.num_keys)
        asked, others = keys[: self.num_queries], keys[self.num_queries :]
        found = [(key, _distinct(rng, split, self.values, self.num_values)) for key in asked]
        needles = [_say(kind, key, value) for key, values in found for value in values]
        rng.shuffle(needles)
        distractors = [_say(kind, key, any_text(rng, self.values)) for key in others]
        if self.haystack == "needles":
            prose = self._needles(seed, kind, size, taken=set(keys))
        else:
            prose = haystack(self.haystack, seed, self.filler, size)
        for text in distractors:  # inserted at a share of the size, so that sizes stay alike
            prose.insert(round(rng.random() * len(prose)), text)
        text = spread(rng, needles, prose, self.depth)
        is_one = self.num_queries * self.num_values == 1
        question = (_ONE if is_one else _MANY).format(kind=kind, keys=_listed(asked))
        prompt = f"{_INTRO.format(kind=kind)}\n\n{text}\n\n{question}"
        return Drawn(prompt, tuple(value for _, values in found for value in values), self.depth)

    def _needles(self, seed: str, kind: str, size: int, taken: set[str]) -> list[str]:
        """Needles that nobody asks for, of no split: drawing from one takes 20 times as long."""
        rng = random.Random(f"{seed}/needles")
        made: list[str] = []
        while len(made) < size:
            key, value = any_text(rng, self.keys), any_text(rng, self.values)
            if key not in taken:
                made.append(_say(kind, key, value))
        return made


def _say(kind: str, key: str, value: str) -> str:
    return _NEEDLE.format(kind=kind, key=key, value=value)


def _distinct(rng: random.Random, split: Split, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_text(rng, split, kind)] = None
    return list(found)


def _listed(keys: list[str]) -> str:
    *most, last = keys
    return f"{', '.join(most)} and {last}" if most else last
