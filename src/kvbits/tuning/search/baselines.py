"""What a search must beat: uniform plans, the ladder and random plans, at equal effective bits.

None is weakened: the uniform and ladder families are enumerated in full and the additive model
picks the best member for the comparison, as it does for the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.tables import Allocation

Named: TypeAlias = tuple[str, Allocation]


def uniform(problem: Problem) -> list[Named]:
    """Return every uniform plan, named ``K4V2``, smallest first."""
    layers = problem.costs.units.shape[0]
    plans = [
        (f"K{key}V{value}", problem.allocation((index,) * layers))
        for index, (key, value) in enumerate(problem.costs.pairs)
    ]
    return sorted(plans, key=lambda named: named[1].effective_bits)


def ladders(problem: Problem) -> Iterator[Named]:
    """Yield every ladder: the first ``a`` and the last ``b`` layers at one pair, the rest cheaper.

    The rule of thumb that engines offer as "skip the first and last layers". Here ``a`` and ``b``
    are free; the usual symmetric ladders are among them.
    """
    costs = problem.costs
    layers = costs.units.shape[0]
    totals = costs.units.sum(axis=0)
    for high, (key, value) in enumerate(costs.pairs):
        for low in np.flatnonzero(totals < totals[high]):
            other = costs.pairs[int(low)]
            for first in range(layers + 1):
                for last in range(layers - first):
                    choice = (high,) * first + (int(low),) * (layers - first - last)
                    choice += (high,) * last
                    name = (
                        f"first {first}, last {last} K{key}V{value}, rest K{other[0]}V{other[1]}"
                    )
                    if first + last:
                        yield name, problem.allocation(choice)


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
