"""The smallest plan of a quality: the integer programme turned around, checked by measuring."""

from __future__ import annotations

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.search.exact import smallest
from kvbits.tuning.tables import Choice
from kvbits.tuning.team import Record


class SmallestProposer:
    """Proposes the smallest plan within a KL in every domain, until one measures so.

    A plan that measures more than was predicted tightens the next prediction by as much.

    Args:
        problem: The programme, on isolated sensitivities.
        kl_nats: Most KL of any domain, nats per token.
    """

    independent = 1

    def __init__(self, problem: Problem, kl_nats: float) -> None:
        self._problem, self._limit, self._asked = problem, kl_nats, kl_nats
        self._is_done = False

    def ask(self) -> Choice | None:
        return None if self._is_done else smallest(self._problem, self._asked)

    def tell(self, choice: Choice, record: Record) -> None:
        worst = float(np.max(record["kl_nats"]))
        self._is_done = worst <= self._limit
        self._asked *= min(self._limit / max(worst, 1e-300), 0.99)
