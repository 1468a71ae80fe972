"""Variable tracking: all names that a value got, through a chain of assignments in noise."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvbits.evaluation.tasks.base import Split
from kvbits.evaluation.tasks.recall import number
from kvbits.evaluation.tasks.ruler.base import Drawn, RulerTask
from kvbits.evaluation.tasks.ruler.prose import haystack, spread


@dataclass(frozen=True, kw_only=True)
class VariableChains(RulerTask):
    """Name every variable that holds a value, after one solved example.

    Args:
        hops: assignments after the first one.
        num_chains: chains, each with a value of its own; the first is asked for.
    """

    max_new_tokens: ClassVar[int] = 30
    name: str = "vt"
    hops: int = 4
    num_chains: int = 1

    def __post_init__(self) -> None:
        if self.hops < 1 or self.num_chains < 1:
            raise ValueError(
                f"hops and num_chains must be at least 1, got {self.hops} and {self.num_chains}"
            )

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw chains in ``size`` lines of noise."""
        rng = random.Random(seed)
        shown, answer = self._problem(rng, split, seed, 3)
        asked, names = self._problem(rng, split, seed, size)
        return Drawn(f"{shown} {', '.join(answer)}.\n\n{asked}", names)

    def _problem(
        self, rng: random.Random, split: Split, seed: str, size: int
    ) -> tuple[str, tuple[str, ...]]:
        chains, values = [], []
        names: set[str] = set()
        for _ in range(self.num_chains):
            chain: list[str] = []
            while len(chain) <= self.hops:
                name = "".join(rng.choices(string.ascii_uppercase, k=5))
                if name not in names:
                    names.add(name)
                    chain.append(name)
            chains.append(chain)
            values.append(number(rng, split, 5))
        lines = _interleaved(rng, chains, values)
        text = spread(rng, lines, haystack("noise", seed, None, size), None)
        prompt = (
            "Follow the assignments of variables that are hidden in the text below.\n"
            f"{text}\n"
            f"Question: Which variables hold the value {values[0]}? "
            f"Answer: The {self.hops + 1} variables that hold the value {values[0]} are"
        )
        return prompt, tuple(chains[0])


def _interleaved(rng: random.Random, chains: list[list[str]], values: list[str]) -> list[str]:
    """The assignments of all chains, each chain in its order."""
    queues = [
        [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
        for chain, value in zip(chains, values, strict=True)
    ]
    lines = []
    while queues:
        queue = rng.choice(queues)
        lines.append(queue.pop(0))
        queues = [each for each in queues if each]
    return lines
