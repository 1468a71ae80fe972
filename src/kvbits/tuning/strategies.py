"""What each strategy does with the measured sensitivities: a front, and the plan it would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from kvbits.tuning.drop import Answers
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.refine import better_measured, refinement_candidates
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines, exact
from kvbits.tuning.search.corrected import CorrectedProposer, corrected
from kvbits.tuning.search.moead import MoeadProposer
from kvbits.tuning.search.optuna_samplers import OptunaProposer, nsga2, tpe
from kvbits.tuning.search.smallest import SmallestProposer
from kvbits.tuning.search.trials import (
    Evaluate,
    Limit,
    Listed,
    Proposer,
    Space,
    measured_front,
    run_trials,
)
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.tables import Allocation, Choice
from kvbits.tuning.team import Alone, Record, Team

# Sizes among which the smallest plan within a drop is found. Finer ones cost half a measurement
# more each time and differ by less than any affordable number of problems can tell.
DROP_STEP_BITS = 0.125


class Search(NamedTuple):
    """Everything a strategy may use.

    Attributes:
        problem: Sizes and isolated sensitivities.
        space: Pruned and clustered; strategies that solve the problem take all candidates.
        evaluate: Measures a plan on calibration data.
        settings: Of the study.
        limit: The budget.
        run: Takes the records of trials.
        progress: Told about trials.
        team: Measures them.
        answers: To the task whose drop is the budget, if one is.
    """

    problem: Problem
    space: Space
    evaluate: Evaluate
    settings: TuneSettings
    limit: Limit
    run: RunDir
    progress: Progress
    team: Team = Alone()
    answers: Answers | None = None

    def trials(self, proposer: Proposer, most: int, stage: str = "search") -> Measured:
        """Run or resume trials."""
        return run_trials(
            self.problem,
            proposer,
            self.evaluate,
            trials=most,
            run=self.run,
            progress=self.progress,
            stage=stage,
            team=self.team,
        )


Measured: TypeAlias = dict[Choice, Record]


class Found(NamedTuple):
    """What a strategy found."""

    front: list[Allocation]
    chosen: Allocation


def search(given: Search) -> Found:
    """Run the strategy of the settings.

    Raises:
        ValueError: It found no plan within the limit.
    """
    if given.answers is not None:
        front = _whole_front(given)
        return Found(front, given.answers.smallest(front))
    if given.settings.strategy in ("exact", "exact+"):
        return _solved(given)
    front = measured_front(given.problem, _measured(given))
    return Found(front, _choose(given, front))


def _solved(given: Search) -> Found:
    problem, bits = given.problem, given.limit.bits
    if bits is None:
        assert given.limit.kl_nats is not None
        proposer = SmallestProposer(problem, given.limit.kl_nats)
        measured = given.trials(proposer, given.settings.trials)
        chosen = _choose(given, measured_front(problem, measured))
        grid = exact.budget_grid(problem.costs, chosen.effective_bits)
        return Found(exact.solve_front(problem, grid), problem.allocation(chosen.choice))
    first = refinement_candidates(problem, bits)
    if given.settings.strategy == "exact":
        measured = given.trials(Listed(first), len(first))
    else:
        most = len(first) + given.settings.trials
        measured = given.trials(CorrectedProposer(problem, first, [bits]), most)
        problem = corrected(problem, measured)
    chosen_choice = better_measured(given.problem, measured, first[0])
    front = exact.solve_front(problem, exact.budget_grid(problem.costs, bits))
    return Found(front, problem.allocation(chosen_choice))


def _whole_front(given: Search) -> list[Allocation]:
    """The front of the strategy over all sizes, full precision last."""
    problem, strategy = given.problem, given.settings.strategy
    layers = len(problem.costs.units)
    full = problem.allocation((0,) * layers)
    grid = exact.budget_grid(problem.costs, full.effective_bits, DROP_STEP_BITS)
    if strategy == "exact":
        front = exact.solve_front(problem, grid)
    elif strategy == "exact+":
        measured = given.trials(CorrectedProposer(problem, [], grid[:-1]), given.settings.trials)
        front = exact.solve_front(corrected(problem, measured), grid)
    else:
        front = measured_front(problem, _measured(given))
    return [*(plan for plan in front if plan.effective_bits < full.effective_bits), full]


def _measured(given: Search) -> Measured:
    """The trials of strategies that go by measured plans alone, under each of the soft limits."""
    limits = [Limit(bits=bits) for bits in given.settings.limits] or [given.limit]
    found: Measured = {}
    for limit in limits:
        proposer, most = PROPOSERS[given.settings.strategy](given._replace(limit=limit))
        stage = f"{limit.bits:g} bits" if given.settings.limits else "search"
        found |= given.trials(proposer, most, stage)
    return found


def _choose(given: Search, front: Sequence[Allocation]) -> Allocation:
    """The least loss within the budget in bits, or the smallest plan within that in KL."""
    fitting = [p for p in front if given.limit.excess(p.effective_bits, p.predicted_kl) <= 0]
    if not fitting:
        raise ValueError(
            f"trials must be enough to find a plan within the budget, got "
            f"{given.settings.trials}; strategy exact always finds one"
        )
    if given.limit.bits is None:
        return min(fitting, key=lambda plan: (plan.effective_bits, plan.loss))
    return min(fitting, key=lambda plan: (plan.loss, plan.effective_bits))


def _nsga2(given: Search) -> tuple[Proposer, int]:
    return _by_optuna(given, nsga2(given.settings.population))


def _tpe(given: Search) -> tuple[Proposer, int]:
    settings = given.settings
    return _by_optuna(given, tpe(settings.population, is_parallel=settings.parallel > 1))


def _by_optuna(given: Search, sampler: Callable[..., object]) -> tuple[Proposer, int]:
    settings = given.settings
    proposer = OptunaProposer(
        given.problem,
        given.space,
        given.limit,
        sampler,
        seed=settings.seed,
        parallel=settings.parallel,
    )
    return proposer, settings.trials


def _moead(given: Search) -> tuple[Proposer, int]:
    settings = given.settings
    proposer = MoeadProposer(
        given.problem,
        given.space,
        given.limit,
        population=settings.population,
        seed=settings.seed,
        parallel=settings.parallel,
    )
    return proposer, settings.trials


def _uniform(given: Search) -> tuple[Proposer, int]:
    return _listed([plan.choice for _, plan in baselines.uniform(given.problem)])


def _ladder(given: Search) -> tuple[Proposer, int]:
    bits = given.limit.bits or max(
        plan.effective_bits for _, plan in baselines.uniform(given.problem)
    )
    grid = [size for size in exact.budget_grid(given.problem.costs, bits) if size <= bits]
    ladders = [baselines.best_ladder(given.problem, size) for size in grid]
    return _listed([named[1].choice for named in ladders if named is not None])


def _random(given: Search) -> tuple[Proposer, int]:
    """Random plans that fill random sizes up to the budget."""
    return _listed(
        baselines.random_choices(
            given.problem, given.limit.bits, given.settings.trials, seed=given.settings.seed
        )
    )


def _listed(choices: Sequence[Choice]) -> tuple[Proposer, int]:
    distinct = list(dict.fromkeys(choices))
    return Listed(distinct), len(distinct)


PROPOSERS: Mapping[str, Callable[[Search], tuple[Proposer, int]]] = {
    "nsga2": _nsga2,
    "tpe": _tpe,
    "moead": _moead,
    "uniform": _uniform,
    "ladder": _ladder,
    "random": _random,
}
"""Strategies that measure whole plans: what they propose, and how often."""
