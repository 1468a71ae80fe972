"""What the RULER-style families share: a length that prompts reach and never pass, and the score.

The families, their sizes and the score are those of RULER (arXiv 2404.06654, its table 2 and the
settings of its 13 tasks); prompts, prose, words and facts are our own. Numbers are therefore
comparable between plans and models that are measured here, not with RULER's published ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kvbits.evaluation.tasks.base import (
    END,
    Example,
    Split,
    check_split,
    estimate_tokens,
    example_rng,
)

_LEAST_TOKENS = 0.25  # of a unit of filler, so that a step is never endless
_CONTROL = re.compile(r"[\x00-\x1f]")


class Drawn(NamedTuple):
    """One problem of a given size.

    Attributes:
        prompt: the text given to the model.
        references: the strings to be found in its answer.
        depth: relative place of what is asked for, where there is one.
    """

    prompt: str
    references: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """Shared part of the families: a subclass only draws a problem of a given size.

    Args:
        name: which setting of the family it is; it is part of every example's seed.
        length: tokens of prompt and answer together, which a prompt comes as near to as whole
            sentences, needles or words allow, and never passes.
        count_tokens: the caller's tokenizer; an estimate from the number of characters by default.
        filler: text to hide needles in; generated prose if None.
    """

    max_new_tokens: ClassVar[int]
    stop: ClassVar[str] = END  # answers end by themselves or at their length, as in RULER
    needs_all: ClassVar[bool] = True
    name: str
    length: int = 4096
    count_tokens: Callable[[str], int] = estimate_tokens
    filler: str | None = None

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw a problem with ``size`` units of filler; the same seed gives the same needles."""
        raise NotImplementedError

    def generate(self, n: int, *, seed: int, split: Split) -> list[Example]:
        """Generate ``n`` examples; example i depends on settings, seed, split and i only.

        Raises:
            ValueError: the length has no room for question and answer.
        """
        check_split(split, "seen")
        return [self._example(example_rng(self.name, split, seed, i), split) for i in range(n)]

    def score(self, completion: str, example: Example) -> float:
        """Share of the references found; of questions with one answer, whether any is."""
        share = share_found(completion, example.facts["references"])
        return share if self.needs_all else float(share > 0)

    def is_correct(self, completion: str, example: Example) -> bool:
        """Whether everything that was asked for is found."""
        return self.score(completion, example) == 1.0

    def _example(self, rng: random.Random, split: Split) -> Example:
        seed = str(rng.getrandbits(64))
        budget = self.length - self.max_new_tokens

        def tokens(size: int) -> int:
            return self.count_tokens(self.draw(seed, split, size).prompt)

        drawn = self.draw(seed, split, largest_size(tokens, budget, self.length))
        return Example(
            prompt=drawn.prompt,
            answer=", ".join(drawn.references),
            completion=f" {', '.join(drawn.references)}.",
            task=self.name,
            facts={
                "references": list(drawn.references),
                "depth": drawn.depth,
                "length": self.length,
            },
        )


def share_found(completion: str, references: Sequence[str]) -> float:
    """Return the share of ``references`` in a completion, whatever the case: RULER's score."""
    text = _CONTROL.sub(" ", completion).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def largest_size(tokens: Callable[[int], int], budget: int, length: int) -> int:
    """Return the largest size of a problem with at most ``budget`` tokens, in few counts.

    Args:
        tokens: tokens of the prompt of a size; it must not fall with the size.
        budget: tokens a prompt may have.
        length: what the caller asked for, for the message.

    Raises:
        ValueError: size 0 is too large.
    """
    base = tokens(0)
    if base > budget:
        raise ValueError(
            f"length must leave room for question and answer, at least {length + base - budget} "
            f"tokens here, got {length}"
        )
    low, low_tokens, high, high_tokens, trial = 0, base, None, 0, 8
    while high is None or high > low + 1:
        found = tokens(trial)
        if found <= budget:
            low, low_tokens = trial, found
        else:
            high, high_tokens = trial, found
        if high is None:
            each = max((low_tokens - base) / low, _LEAST_TOKENS)
            trial = low + max(1, int((budget - low_tokens) / each))
            continue
        each = max((high_tokens - low_tokens) / (high - low), _LEAST_TOKENS)
        if low_tokens + min(each, (low_tokens - base) / max(low, 1)) > budget:
            break
        trial = min(max(low + round((budget - low_tokens) / each), low + 1), high - 1)
    return low
