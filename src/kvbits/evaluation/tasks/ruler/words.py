"""Common and frequent words: what a long list repeats, which no single place in it says."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvbits.evaluation.tasks.base import Split
from kvbits.evaluation.tasks.ruler.base import Drawn, RulerTask
from kvbits.evaluation.tasks.ruler.prose import endless_words

_ZETA_2 = math.pi**2 / 6
_DOTS = "...."


@dataclass(frozen=True, kw_only=True)
class CommonWords(RulerTask):
    """Name the words that a numbered list holds more often than the others; one solved example.

    Args:
        num_words: words to name.
        common_count: times each of them stands in the list.
        other_count: times each of the others does; the length decides how many others there are.
    """

    max_new_tokens: ClassVar[int] = 120
    name: str = "cwe"
    num_words: int = 10
    common_count: int = 30
    other_count: int = 3

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw the list with ``size`` other words."""
        rng = random.Random(f"{seed}/{split}")
        pool = endless_words(rng)
        shown = self._list(rng, list(islice(pool, self.num_words)), list(islice(pool, 10)), 5, 1)
        common = list(islice(pool, self.num_words))
        asked = self._list(
            rng, common, list(islice(pool, size)), self.common_count, self.other_count
        )
        return Drawn(f"{shown[0]} {shown[1]}.\n\n{asked[0]}", tuple(common))

    def _list(
        self, rng: random.Random, common: list[str], others: list[str], often: int, seldom: int
    ) -> tuple[str, str]:
        """A list with its question, and the answer."""
        items = common * often + others * seldom
        rng.shuffle(items)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(items, start=1))
        prompt = (
            "Below is a numbered list of words. Some words stand in it often, the others seldom. "
            f"Remember the words that stand in it most often.\n{text}\n"
            f"Question: Which {self.num_words} words are the most common in the list? "
            f"Answer: The {self.num_words} most common words in the list are"
        )
        return prompt, ", ".join(common)


@dataclass(frozen=True, kw_only=True)
class FrequentWords(RulerTask):
    """Name the three most frequent of made-up words whose frequencies fall as Zipf's, k^-2.

    The most frequent of all is a row of dots, which the question says to ignore.
    """

    max_new_tokens: ClassVar[int] = 50
    num_words: ClassVar[int] = 3
    min_words: ClassVar[int] = 80  # of fewer, the third and the fourth word are about as frequent
    name: str = "fwe"

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw a text of about ``min_words + size`` words."""
        rng = random.Random(f"{seed}/{split}")
        counts = _counts(self.min_words + size)
        coded: dict[str, None] = {}
        while len(coded) < len(counts) - 1:
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        ranked = [_DOTS, *coded]
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        prompt = (
            "Read the coded text below and count how often each coded word stands in it.\n"
            f"{' '.join(text)}\n"
            f"Question: Ignore the dots '{_DOTS}'. Which three coded words are the most frequent? "
            "Answer: The three most frequent coded words are"
        )
        return Drawn(prompt, tuple(ranked[1 : 1 + self.num_words]))


def _counts(num_words: int) -> list[int]:
    """How often the word of each rank stands in a text of ``num_words``, as long as it does."""
    counts = []
    for rank in range(1, num_words + 1):
        count = int(num_words * rank**-2 / _ZETA_2)
        if count < 1:
            break
        counts.append(count)
    return counts
