"""What a search must beat: uniform plans, the ladder and random plans, at equal effective bits.

None is weakened: the uniform and ladder families are enumerated in full and the additive model
picks the best member for the comparison, as it does for the search.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.tables import Allocation, Choice

Named: TypeAlias = tuple[str, Allocation]


def uniform(problem: Problem) -> list[Named]:
    """Return every uniform plan, named by its candidate's label, smallest first."""
    layers = problem.costs.units.shape[0]
    plans = [
        (candidate.label, problem.allocation((index,) * layers))
        for index, candidate in enumerate(problem.costs.candidates)
    ]
    return sorted(plans, key=lambda named: named[1].effective_bits)


def best_ladder(problem: Problem, bits: float) -> Named | None:
    """Return the ladder of least predicted loss within ``bits``, or None where none fits.

    The first ``a`` and the last ``b`` layers at one candidate, the rest at a cheaper one: the rule
    of thumb that engines offer as "skip the first and last layers". Here ``a`` and ``b`` are free
    and every two candidates are tried; of equals the smaller plan is taken.
    """
    here, costs = problem.at(bits), problem.costs
    layers, at = costs.units.shape[0], costs.layer_ends
    totals = costs.units.sum(axis=0)
    ends = [(a, layers - c) for a in at for c in at if a < c and a + layers - c]
    if not ends:  # a model of one layer has uniform plans only
        return None
    first, last = np.array(ends).T
    # What the ends hold under each candidate, [..., ladders, P].
    heads = np.concatenate([np.zeros_like(costs.units[:1]), costs.units.cumsum(axis=0)])
    at_ends = heads[first] + heads[-1] - heads[layers - last]
    kls = np.concatenate([np.zeros_like(here.kl_nats[:, :1]), here.kl_nats.cumsum(axis=1)], axis=1)
    kl_at_ends = kls[:, first] + kls[:, -1:] - kls[:, layers - last]
    found: list[tuple[float, int, int, int, int]] = []
    for high, total in enumerate(totals):
        for low in np.flatnonzero(totals < total).tolist():
            units = at_ends[:, high] + totals[low] - at_ends[:, low]
            fitting = np.flatnonzero(units <= costs.budget(bits))
            if not fitting.size:
                continue
            kl = kl_at_ends[..., high] + kls[:, -1:, low] - kl_at_ends[..., low]
            losses = here.scores(kl[:, fitting].T)
            index = int(np.lexsort((units[fitting], losses))[0])
            pick = int(fitting[index])
            found.append((float(losses[index]), int(units[pick]), high, low, pick))
    if not found:
        return None
    _, _, high, low, pick = min(found)
    a, b = ends[pick]
    named = at.index(a), len(at) - 1 - at.index(layers - b)
    choice = (high,) * a + (low,) * (layers - a - b) + (high,) * b
    labels = [costs.candidates[index].label for index in (high, low)]
    name = f"first {named[0]}, last {named[1]} {labels[0]}, rest {labels[1]}"
    return name, problem.allocation(choice)


def random_plan(problem: Problem, bits: float, *, seed: int) -> Allocation | None:
    """Return a random plan filled up to ``bits``, or None where nothing fits.

    From the smallest plan on, a random layer grows by its smallest step until no step fits, so
    that less than one step of the budget is left unused.
    """
    generator = np.random.default_rng(seed)
    units = problem.costs.units
    choice = units.argmin(axis=1)
    layers = np.arange(len(choice))
    left = problem.costs.budget(bits) - int(units[layers, choice].sum())
    if left < 0:
        return None
    while True:
        growth = units - units[layers, choice][:, None]
        steps = np.where(growth > 0, growth, np.iinfo(np.int64).max).min(axis=1)
        if not (steps <= left).any():
            return problem.allocation(tuple(int(i) for i in choice))
        layer = generator.choice(np.flatnonzero(steps <= left))
        choice[layer] = generator.choice(np.flatnonzero(growth[layer] == steps[layer]))
        left -= int(steps[layer])


def random_choices(
    problem: Problem, bits: float | None, number: int, *, seed: int
) -> list[Choice]:
    """Return random plans that fill sizes drawn evenly between the smallest plan and ``bits``."""
    generator = np.random.default_rng(seed)
    plans = uniform(problem)
    low, high = plans[0][1].effective_bits, bits or plans[-1][1].effective_bits
    sizes = [high, *generator.uniform(low, high, number - 1)]
    found = (random_plan(problem, size, seed=seed + i) for i, size in enumerate(sizes))
    return [plan.choice for plan in found if plan is not None]


def best(problem: Problem, plans: Iterable[Named], bits: float) -> Named | None:
    """Return the plan of least predicted loss within ``bits``, or None where none fits.

    The loss is the one the search minimises at this size; of equals the smaller plan is taken.
    """
    here = problem.at(bits)
    fitting = [(name, plan) for name, plan in plans if plan.effective_bits <= bits + 1e-9]
    return min(
        fitting,
        key=lambda named: (here.score(named[1].predicted_kl), named[1].effective_bits, named[0]),
        default=None,
    )
