"""Haystacks: generated prose, a caller's text, or a few sentences again and again."""

from __future__ import annotations

import functools
import random
import re
import uuid
from collections.abc import Iterator
from itertools import cycle, islice

from kvbits.evaluation.tasks.base import Split, draw, words
from kvbits.evaluation.tasks.filler import sentence

NOISE = (
    "The road is long. The rain is warm. The lamp is lit. On we walk, and home again once more."
)
_BOUNDARY = re.compile(r"(?<=[.!?])\s+")


def haystack(kind: str, seed: str, filler: str | None, size: int) -> list[str]:
    """Return ``size`` sentences; a larger size begins with those of a smaller one.

    Args:
        kind: ``noise`` repeats one line, ``prose`` is the caller's text or generated.
        seed: of the generated prose, and of where the caller's text begins.
        filler: the caller's text.
        size: number of sentences.
    """
    if kind == "noise":
        return [NOISE] * size
    rng = random.Random(f"{seed}/prose")
    return list(islice(_own(rng) if filler is None else _given(rng, filler), size))


def _own(rng: random.Random) -> Iterator[str]:
    while True:
        yield sentence(rng)


def _given(rng: random.Random, filler: str) -> Iterator[str]:
    """Consecutive sentences from anywhere in the text, which begins again at its end."""
    parts = _split(filler)
    start = rng.randrange(len(parts))
    return cycle(parts[start:] + parts[:start])


@functools.lru_cache(maxsize=4)
def _split(filler: str) -> list[str]:
    parts = [" ".join(part.split()) for part in _BOUNDARY.split(filler)]
    parts = [part for part in parts if part]
    if not parts:
        raise ValueError("filler must hold at least one sentence, got none")
    return parts


def spread(rng: random.Random, hidden: list[str], prose: list[str], depth: float | None) -> str:
    """Put hidden sentences into prose, in order; all at ``depth``, or anywhere if None."""
    anywhere = sorted(rng.random() for _ in hidden)
    places = anywhere if depth is None else [depth] * len(hidden)
    parts, start = [], 0
    for place, text in zip(places, hidden, strict=True):
        stop = round(place * len(prose))
        parts += [*prose[start:stop], text]
        start = stop
    return " ".join([*parts, *prose[start:]])


def any_text(rng: random.Random, kind: str) -> str:
    """Draw a key or value: ``words`` (two of them), ``number`` (7 digits), ``uuid``."""
    if kind == "words":
        return f"{rng.choice(words())}-{rng.choice(words())}"
    if kind == "number":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_text(rng: random.Random, split: Split, kind: str) -> str:
    """Draw a key or value that belongs to a split."""
    return draw(lambda: any_text(rng, kind), split)


def endless_words(rng: random.Random) -> Iterator[str]:
    """Yield distinct lower-case words: the common ones in random order, then pairs of them."""
    seen: set[str] = set()
    common = [word for word in words() if word.isalpha() and word.islower()]
    for word in rng.sample(common, len(common)):
        seen.add(word)
        yield word
    while True:
        word = rng.choice(common) + rng.choice(common)
        if word not in seen:
            seen.add(word)
            yield word
