"""Passkey retrieval: one number hidden in prose, at a chosen depth and length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kvbits.evaluation.tasks.base import (
    Document,
    Example,
    Split,
    Templates,
    check_split,
    example_rng,
)
from kvbits.evaluation.tasks.filler import sentences
from kvbits.evaluation.tasks.recall import HiddenInProse, number

_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
)
_SEEN = (
    "The pass key is {0}. Remember it. {0} is the pass key.",
    "Remember this: the pass key is {0}.",
    "{0} is the pass key. Do not forget {0}.",
)
_HELDOUT = (
    "To open the gate you will need the number {0}, for that is the pass key.",
    "By the way, somebody wrote {0} on the wall as the pass key.",
)


@dataclass(frozen=True, kw_only=True)
class Passkey(HiddenInProse):
    """Find a five-digit number hidden in about ``length`` tokens of prose.

    Args:
        length: tokens of the prompt, approximately, as ``count_tokens`` counts them.
        depth: relative place of the number, 0 first and 1 last; random if None.
        templates: "heldout" hides it in sentences that training never shows.
    """

    name: ClassVar[str] = "passkey"
    max_new_tokens: ClassVar[int] = 12
    depth: float | None = None
    templates: Templates = "seen"

    def generate(self, n: int, *, seed: int, split: Split) -> list[Example]:
        """Generate ``n`` examples; example i depends on the seed, the split and i only."""
        check_split(split, self.templates)
        return [self._example(example_rng(self.name, split, seed, i), split) for i in range(n)]

    def document(self, rng: random.Random, split: Split, num_questions: int = 1) -> Document:
        """Draw a number of the split and prose around it."""
        key = number(rng, split, 5)
        depth = rng.random() if self.depth is None else self.depth
        needle = rng.choice(_SEEN if self.templates == "seen" else _HELDOUT).format(key)
        question = "What is the pass key? The pass key is"
        used = self.count_tokens(_INTRO + needle + question) + 12  # 12: line breaks and the answer
        prose = sentences(rng, self.length - used, self.count_tokens, self.filler)
        place = round(len(prose) * depth)
        body = "\n".join(
            part for part in (" ".join(prose[:place]), needle, " ".join(prose[place:])) if part
        )
        return Document(
            context=f"{_INTRO}\n\n{body}\n\n",
            turns=((question, f" {key}."),),
            facts={"key": key, "depth": depth, "templates": self.templates},
        )
