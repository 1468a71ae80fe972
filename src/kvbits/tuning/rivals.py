"""Which plans are verified: the front near what matters, and at every such size its rivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvbits.tuning.candidates import Candidates
from kvbits.tuning.given import GivenRival, as_choice
from kvbits.tuning.problem import Problem
from kvbits.tuning.search import baselines
from kvbits.tuning.search.baselines import Named
from kvbits.tuning.tables import Allocation

# Searched plans and ladders are measured at sizes this close to the budget, in effective bits.
NEAR_BITS = 1.0


RULES = ("uniform", "ladder", "random")
GIVEN = "given"


class Entry(NamedTuple):
    """One plan to verify."""

    name: str
    origin: str  # of the search, or uniform, ladder, random, given or full
    allocation: Allocation
    measures_tasks: bool = False

    def fits(self, bits: float) -> bool:
        """Whether the plan stores at most ``bits`` effective bits."""
        return self.allocation.effective_bits <= bits + 1e-9


def searched_origin(strategy: str) -> str:
    """Name what a strategy finds; rules that are rivals too are told apart from those."""
    return f"best {strategy}" if strategy in RULES else strategy


def choose(problem: Problem, front: Sequence[Allocation], bits: float) -> Allocation | None:
    """Return the plan of least calibration loss within ``bits``; the smaller of equals."""
    found = baselines.best(problem, [("", plan) for plan in front], bits)
    return None if found is None else found[1]


def list_entries(
    problem: Problem,
    front: Sequence[Allocation],
    *,
    origin: str,
    bits: float,
    chosen: Allocation,
    random_seeds: Sequence[int],
) -> list[Entry]:
    """List what to verify: the uniform plans; the front and the best ladder at the budget and at
    the sizes of the uniform plans near it; random plans that fill the budget.

    Uniform plans that another beats in both size and predicted loss are left out. Tasks are
    measured at full precision, on the chosen plan, and on the best baseline of each kind within
    the budget, "best" by calibration data alone.
    """
    uniform = _undominated(baselines.uniform(problem))
    packed = [plan.effective_bits for _, plan in uniform[:-1]]
    sizes = sorted({*(size for size in packed if abs(size - bits) <= NEAR_BITS), bits})
    listed = [
        Entry("full precision", "full", uniform[-1][1], measures_tasks=True),
        *_searched(problem, front, origin, chosen, sizes),
        *(Entry(name, "uniform", plan) for name, plan in uniform[:-1]),
        *_ladders(problem, sizes),
        *_random(problem, bits, random_seeds),
    ]
    return _with_tasks(problem, listed, bits)


def given_entries(
    problem: Problem, given: Iterable[GivenRival], candidates: Candidates
) -> list[Entry]:
    """List rivals from elsewhere; tasks are measured on them whatever their size."""
    plans = ((each.name, problem.allocation(as_choice(each, candidates))) for each in given)
    return [Entry(name, GIVEN, plan, measures_tasks=True) for name, plan in plans]


def _undominated(plans: Iterable[Named]) -> list[Named]:
    """Keep the Pareto set, smallest first, and always the largest plan: full precision."""
    ordered = sorted(plans, key=lambda named: (named[1].effective_bits, named[1].loss))
    kept = ordered[:1]
    for named in ordered[1:-1]:
        if named[1].loss < kept[-1][1].loss:
            kept.append(named)
    return [*kept, ordered[-1]]


def _searched(
    problem: Problem,
    front: Sequence[Allocation],
    origin: str,
    chosen: Allocation,
    sizes: Iterable[float],
) -> list[Entry]:
    """The chosen plan, its neighbours on the front, and the best plan within every size."""
    picked = {chosen.choice: chosen}
    for size in sizes:
        plan = choose(problem, front, size)
        if plan is not None:
            picked.setdefault(plan.choice, plan)
    larger = [plan for plan in front if plan.effective_bits > chosen.effective_bits + 1e-9]
    smaller = [plan for plan in front if plan.effective_bits < chosen.effective_bits - 1e-9]
    for plan in (*larger[:1], *smaller[-1:]):
        picked.setdefault(plan.choice, plan)
    ordered = sorted(picked.values(), key=lambda plan: plan.effective_bits)
    return [
        Entry(f"{origin} {plan.effective_bits:.2f}", origin, plan, plan is chosen)
        for plan in ordered
    ]


def _ladders(problem: Problem, sizes: Iterable[float]) -> list[Entry]:
    found = {}
    for size in sizes:
        best = baselines.best_ladder(problem, size)
        if best is not None:
            found[best[1].choice] = Entry(best[0], "ladder", best[1])
    return list(found.values())


def _random(problem: Problem, bits: float, seeds: Sequence[int]) -> list[Entry]:
    plans = [baselines.random_plan(problem, bits, seed=seed) for seed in seeds]
    return [
        Entry(f"random {number}", "random", plan)
        for number, plan in enumerate(plans, start=1)
        if plan is not None
    ]


def _with_tasks(problem: Problem, listed: Sequence[Entry], bits: float) -> list[Entry]:
    """Mark the best fitting entry of every kind of rival."""
    marked = set()
    for origin in RULES:
        plans = [(entry.name, entry.allocation) for entry in listed if entry.origin == origin]
        best = baselines.best(problem, plans, bits)
        if best is not None:
            marked.add((origin, best[0]))
    return [
        entry._replace(measures_tasks=entry.measures_tasks or (entry.origin, entry.name) in marked)
        for entry in listed
    ]
