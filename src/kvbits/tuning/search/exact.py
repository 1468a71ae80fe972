"""The whole front in seconds: an integer programme on the additive sensitivities.

Isolated forward KLs nearly add up (where they do not, ``refine`` measures), so the best plan for a
budget is a knapsack with one choice per layer:

    minimise    a t + b m
    subject to  sum over l, p of loss[d, l, p] x[l, p] <= t     for every domain d
                sum over d, l, p of weight[d] loss[d, l, p] x[l, p] = m
                sum over p of x[l, p] = 1                       for every layer l
                sum over l, p of units[l, p] x[l, p] <= budget
                x binary

with a = 1, b = 0 for objective ``minimax``, the reverse for ``sum`` and both one half for
``balanced``. Several domains, because the text a plan is tuned on decides what it keeps: a plan
tuned on one kind of text alone can be worse than a uniform one on another. Losses are relative to
uniform plans of the same size (``kvbits.tuning.problem``): t < 1 means better in every domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvbits.tuning.problem import SHARES, Problem
from kvbits.tuning.tables import (
    Allocation,
    BoolArray,
    Choice,
    CostTable,
    FloatArray,
    IntArray,
)

# HiGHS stops at this relative gap; plans this close cannot be told apart by measuring.
RELATIVE_GAP = 1e-6


def solve(problem: Problem, budget: int) -> Choice | None:
    """Return the best candidate per layer for a budget, or None where nothing fits.

    Ties are broken in a fixed order: the objective, then the mean over all domains (minimax leaves
    the domains that do not bind free), then HiGHS's own order, which is deterministic.

    Args:
        budget: Units of ``problem.costs``.
    """
    units = problem.costs.units
    if units.min(axis=1).sum() > budget:
        return None
    worst, share = SHARES[problem.objective]
    mean = np.tensordot(problem.weights, problem.loss, axes=1)  # [L, P]
    terms = _Terms(problem.loss, worst, share * mean)
    # The solver's absolute tolerances need losses of order one: the relaxation gives the scale.
    useful = ~_is_dominated(units, problem.loss)
    scale = terms.value(_minimise(terms, units, budget, useful, is_relaxed=True)) or 1.0
    terms = _Terms(problem.loss / scale, worst, share * mean / scale)
    solutions = [_minimise(terms, units, budget, useful)]
    if not share:
        limit = terms.value(solutions[0])
        solutions.append(
            _minimise(_Terms(terms.rows, 0.0, mean / scale), units, budget, useful, limit=limit)
        )
    choices = [tuple(int(i) for i in x.argmax(axis=1)) for x in solutions]
    return min(choices, key=lambda c: (problem.allocation(c).loss, mean[range(len(c)), c].sum()))


def smallest(problem: Problem, kl_nats: float) -> Choice:
    """Return the smallest plan whose additive KL is at most ``kl_nats`` in every domain.

    The exact layer has none, so that there always is one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    units, kl = problem.costs.units, problem.kl_nats
    size = units.size
    result = milp(
        c=units.ravel() / np.gcd.reduce(units, axis=None),
        constraints=[
            LinearConstraint(_one_hot(*units.shape), 1, 1),
            LinearConstraint(kl.reshape(len(kl), size) / kl_nats, -np.inf, 1),
        ],
        integrality=np.ones(size),
        bounds=Bounds(0, (~_is_dominated(units, kl)).ravel().astype(float)),
    )
    if result.x is None:
        raise RuntimeError(f"the integer programme must have a solution, got {result.message!r}")
    return tuple(int(i) for i in np.reshape(result.x, units.shape).argmax(axis=1))


def _one_hot(layers: int, candidates: int) -> FloatArray:
    """Rows that add up the candidates of each layer, ``[L, L * P]``."""
    return np.asarray(np.kron(np.eye(layers), np.ones(candidates)), dtype=np.float64)


class _Terms(NamedTuple):
    """What is minimised: ``worst_share`` x the worst of ``rows``, plus ``linear``."""

    rows: FloatArray  # [domains, L, P]
    worst_share: float
    linear: FloatArray  # [L, P]

    def value(self, x: FloatArray) -> float:
        worst = float(np.tensordot(self.rows, x, axes=2).max())
        return self.worst_share * worst + float((self.linear * x).sum())


def _is_dominated(units: IntArray, loss: FloatArray) -> BoolArray:
    """Mark, ``[L, P]``, candidates that another of the layer matches in size and every domain.

    No solution needs them, and of many methods at many widths most are; of equals one stays.
    """
    columns = np.concatenate([units[None], loss])  # [1 + domains, L, P]
    first, second = columns[..., :, None], columns[..., None, :]
    # [L, P, P]: the second matches the first
    is_matched = np.asarray((second <= first).all(axis=0))
    order = np.arange(units.shape[1])
    is_beaten = is_matched & (~is_matched.swapaxes(1, 2) | (order[None, :] < order[:, None]))
    return np.asarray(is_beaten.any(axis=2))


def _minimise(
    terms: _Terms,
    units: IntArray,
    budget: int,
    useful: BoolArray,
    *,
    is_relaxed: bool = False,
    limit: float = np.inf,
) -> FloatArray:
    """Minimise ``terms`` over one-hot ``x [L, P]`` within the budget, the worst within limit.

    Candidates that are not ``useful`` stay out.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, pairs = units.shape
    size, domains = layers * pairs, len(terms.rows)
    # Divided by their common factor the sizes are small integers, so that the solver's tolerance
    # can never admit a plan over the budget.
    divisor = int(np.gcd.reduce(units, axis=None)) or 1
    one_hot = np.hstack([_one_hot(layers, pairs), np.zeros((layers, 1))])
    size_row = np.append(units.ravel() // divisor, 0)
    loss_rows = np.hstack([terms.rows.reshape(domains, size), -np.ones((domains, 1))])
    result = milp(
        c=np.append(terms.linear.ravel(), terms.worst_share),
        constraints=[
            LinearConstraint(one_hot, 1, 1),
            LinearConstraint(size_row[None], -np.inf, budget // divisor),
            LinearConstraint(loss_rows, -np.inf, 0),
        ],
        integrality=np.append(np.full(size, 0 if is_relaxed else 1), 0),
        bounds=Bounds(0, np.append(useful.ravel(), limit * (1 + 1e-9) + 1e-12)),
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if result.x is None:
        raise RuntimeError(f"the integer programme must have a solution, got {result.message!r}")
    return np.asarray(result.x[:size]).reshape(layers, pairs)


def budget_grid(costs: CostTable, bits: float, step: float = 0.25) -> tuple[float, ...]:
    """Return the effective bits at which the front is computed, ascending.

    A regular grid between the smallest and the largest packed plan, the sizes of all uniform plans
    (there the comparison at equal bits is exact) and the user's budget.
    """
    layers = costs.units.shape[0]
    uniform = {costs.effective_bits((p,) * layers) for p in range(len(costs.candidates))}
    packed = sorted(uniform)[:-1] or sorted(uniform)
    grid = np.arange(np.ceil(packed[0] / step) * step, packed[-1] + step / 2, step)
    return tuple(sorted({round(float(b), 6) for b in (*grid, *packed, bits)}))


def solve_front(problem: Problem, grid: Iterable[float]) -> list[Allocation]:
    """Solve every budget of the grid, each relative to uniform plans of its own size.

    Returns:
        The distinct plans, smallest first, without those that a plan not larger matches or beats
        in every domain; losses are relative to ``problem.norms``.
    """
    choices: dict[Choice, None] = {}
    for bits in grid:
        choice = solve(problem.at(bits), problem.costs.budget(bits))
        if choice is not None:
            choices[choice] = None
    points = [problem.allocation(choice) for choice in choices]
    kept: list[Allocation] = []
    for point in sorted(points, key=lambda p: (p.effective_bits, p.loss)):
        if not any(_matches(smaller, point) for smaller in kept):
            kept.append(point)
    return kept


def _matches(a: Allocation, b: Allocation) -> bool:
    return all(x <= y for x, y in zip(a.predicted_kl, b.predicted_kl, strict=True))
