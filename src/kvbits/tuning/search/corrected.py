"""``exact+``: the integer programme on sensitivities that measured plans have corrected.

Isolated KLs miss what errors of several layers do together. Every plan that is measured as a
whole says how far their sum was off; spread over its layers, that moves the table, and the
programme is solved again, until it proposes a plan that was measured already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.search.exact import solve
from kvbits.tuning.tables import Choice, FloatArray
from kvbits.tuning.team import Record

# How far a sensitivity in company may be from the isolated one, as a share of it, and how far a
# plan may be from the sum of its layers in company. The sum of isolated KLs is right within 20 %
# down to three bits a side and off by a factor of two below.
PRIOR_SPREAD, MISFIT = 0.5, 0.05


def corrected(problem: Problem, measured: Mapping[Choice, Record]) -> Problem:
    """Return the problem with the expected sensitivities given the KLs of whole plans.

    Sensitivities s of all layers and candidates are Gaussian around the isolated ones s0 with
    deviation ``PRIOR_SPREAD`` s0; a plan's KL is X s with deviation ``MISFIT`` X s0, X one-hot.
    Then E[s | y] = s0 + S Xᵀ (X S Xᵀ + N)⁻¹ (y - X s0), domain by domain.

    Norms, which losses are relative to, stay those of the isolated table.
    """
    if not measured:
        return problem
    layers, columns = problem.costs.units.shape
    choices = np.array(list(measured))  # [plans, L]
    flat = choices + np.arange(layers) * columns
    one_hot = np.zeros((len(choices), layers * columns))
    np.put_along_axis(one_hot, flat, 1.0, axis=1)
    kl = np.array([record["kl_nats"] for record in measured.values()])  # [plans, domains]
    rows = [
        _expected(prior.ravel(), one_hot, of_domain).reshape(layers, columns)
        for prior, of_domain in zip(problem.kl_nats, kl.T, strict=True)
    ]
    return problem._replace(kl_nats=np.stack(rows))


def _expected(prior: FloatArray, one_hot: FloatArray, measured: FloatArray) -> FloatArray:
    variance = (PRIOR_SPREAD * prior) ** 2
    noise = (MISFIT * (one_hot @ prior)) ** 2
    spread = (one_hot * variance) @ one_hot.T + np.diag(noise + 1e-30)
    # Scaled to ones on the diagonal: KLs squared are as small as 1e-14.
    scale = 1 / np.sqrt(np.diag(spread))
    missed = np.linalg.solve(spread * scale[:, None] * scale, (measured - one_hot @ prior) * scale)
    moved = prior + variance * (one_hot.T @ (missed * scale))
    return np.asarray(np.maximum(moved, 0.0))


class CorrectedProposer:
    """Proposes first the given plans, then the solutions of the corrected programme.

    Args:
        problem: The programme, on isolated sensitivities.
        first: Plans to begin with.
        budgets: Effective bits to solve for, in turn.
    """

    def __init__(
        self, problem: Problem, first: Sequence[Choice], budgets: Sequence[float]
    ) -> None:
        self._problem, self._first, self._budgets = problem, list(first), budgets
        self._turn = 0
        self.measured: dict[Choice, Record] = {}

    @property
    def independent(self) -> int:
        return max(1, len(self._first))

    def ask(self) -> Choice | None:
        if self._first:
            return self._first.pop(0)
        for _ in self._budgets:
            bits = self._budgets[self._turn % len(self._budgets)]
            self._turn += 1
            here = self._problem.at(bits)
            choice = solve(corrected(here, self.measured), here.costs.budget(bits))
            if choice is not None and choice not in self.measured:
                return choice
        return None

    def tell(self, choice: Choice, record: Record) -> None:
        self.measured[choice] = record
