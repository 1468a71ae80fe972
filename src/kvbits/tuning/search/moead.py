"""MOEA/D: one scalar problem per direction between quality and size, solved by its neighbours."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.search.trials import Limit, Space
from kvbits.tuning.tables import Choice, FloatArray, IntArray
from kvbits.tuning.team import Record

NEIGHBOURS = 0.2  # share of the population that mates and is replaced together
LOCAL_MATING = 0.9  # probability that parents are neighbours
DRAWS = 20  # of a trial, at most, for a plan that was not measured yet
MOST_REPLACED = 2  # plans a new one may replace, so that it does not take over


class _Member(NamedTuple):
    """One plan of the population."""

    picks: IntArray  # [groups], positions in each group's candidates
    values: FloatArray  # [2], logarithm of the loss, and bits
    excess: float


class MoeadProposer:
    """Minimises the normalised KL (``Problem.score``) and effective bits.

    Every member of the population follows its own weights of the two: a Chebyshev distance from
    the best values seen. A plan beyond the limit loses to any within; of two beyond, the one less
    so wins. The first members are the uniform plans, then random ones.

    Source: Zhang and Li (2007), MOEA/D, IEEE Transactions on Evolutionary Computation 11(6), with
    the two-sided replacement of Li and Zhang (2009); KVTuner (arXiv 2502.04420) searches so.
    Differs from the papers: KL enters by its logarithm, because it spans orders of magnitude, and
    both objectives are divided by their ranges in the population.

    Args:
        problem: Sizes and scores.
        space: What may vary.
        limit: Soft constraint.
        population: Directions.
        seed: Of the study; a trial draws from (seed, its number) alone.
        parallel: Trials that may be proposed before the first of them is known.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        limit: Limit,
        *,
        population: int,
        seed: int,
        parallel: int = 1,
    ) -> None:
        self._problem, self._space, self._limit = problem, space, limit
        self._size, self._seed, self._number, self._told = population, seed, 0, 0
        self._parallel = parallel
        self._sizes = np.array([len(each) for each in space.candidates])
        self._members: list[_Member] = []
        self._seen: set[tuple[int, ...]] = set()
        share = np.linspace(0, 1, population)
        self._weights = np.clip(np.stack([share, 1 - share], axis=1), 1e-3, None)
        distance = np.abs(share[:, None] - share[None])
        near = max(2, round(NEIGHBOURS * population))
        self._neighbours = np.argsort(distance, axis=1, kind="stable")[:, :near]
        self._asked: deque[IntArray] = deque()

    @property
    def independent(self) -> int:
        """The first members know of none; children, of all of them."""
        return min(self._parallel, self._size - self._number % self._size)

    def ask(self) -> Choice:
        generator = np.random.default_rng([self._seed, self._number])
        propose = self._first if self._number < self._size else self._child
        for _ in range(DRAWS):
            picks = propose(generator)
            if tuple(picks) not in self._seen:
                break
        self._seen.add(tuple(picks))
        self._asked.append(picks)
        self._number += 1
        columns = [each[p] for each, p in zip(self._space.candidates, picks, strict=True)]
        return self._space.choice(columns)

    def tell(self, choice: Choice, record: Record) -> None:
        bits = self._problem.costs.effective_bits(choice)
        loss = np.log(max(self._problem.score(record["kl_nats"]), 1e-12))
        excess = max(0.0, self._limit.excess(bits, record["kl_nats"]))
        self._told += 1
        member = _Member(self._asked.popleft(), np.array([loss, bits]), excess)
        if len(self._members) < self._size:
            self._members.append(member)
            if len(self._members) == self._size:
                self._members = self._spread()
            return
        self._replace(member, np.random.default_rng([self._seed, self._told, 1]))

    def _first(self, generator: np.random.Generator) -> IntArray:
        uniform = self._space.uniform()
        if self._number < min(len(uniform), self._size):
            each = zip(self._space.candidates, uniform[self._number], strict=True)
            return np.array([candidates.index(column) for candidates, column in each])
        return generator.integers(self._sizes)

    def _direction(self) -> int:
        """The direction of the present trial: all in turn."""
        return (self._number - self._size) % self._size

    def _child(self, generator: np.random.Generator) -> IntArray:
        """Mix two plans group by group, then draw a group anew with probability 1 / groups."""
        is_local = generator.random() < LOCAL_MATING
        pool = self._neighbours[self._direction()] if is_local else np.arange(self._size)
        first, second = generator.choice(pool, 2, replace=False)
        groups = len(self._sizes)
        is_first = generator.random(groups) < 0.5
        picks = np.where(is_first, self._members[first].picks, self._members[second].picks)
        mutated = generator.random(groups) < 1 / groups
        return np.where(mutated, generator.integers(self._sizes), picks)

    def _replace(self, member: _Member, generator: np.random.Generator) -> None:
        direction = (self._told - 1 - self._size) % self._size
        replaced = 0
        for index in generator.permutation(self._neighbours[direction]):
            if self._cost(member, index) < self._cost(self._members[index], index):
                self._members[index] = member
                replaced += 1
            if replaced == MOST_REPLACED:
                return

    def _cost(self, member: _Member, index: int) -> tuple[float, float]:
        """What a direction minimises: how far beyond the limit, then the weighted distance."""
        values = np.array([each.values for each in self._members])
        low, high = values.min(axis=0), values.max(axis=0)
        scaled = (member.values - low) / np.where(high > low, high - low, 1.0)
        return member.excess, float((self._weights[index] * scaled).max())

    def _spread(self) -> list[_Member]:
        """Give every direction the first member that suits it best; some suit several."""
        return [
            min(self._members, key=lambda member: self._cost(member, index))
            for index in range(self._size)
        ]
