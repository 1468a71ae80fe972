"""Optuna's multi-objective samplers over groups of layers: NSGA-II and TPE.

Slower than the integer programme by the cost of one measurement a trial, but free of its
assumption that sensitivities add up.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvbits.tuning.problem import Problem
from kvbits.tuning.search.trials import Limit, Space
from kvbits.tuning.tables import Choice
from kvbits.tuning.team import Record


def check_optuna(use: str = "the strategies nsga2 and tpe") -> None:
    """Say how to get optuna where it is missing.

    Raises:
        ImportError: It cannot be imported.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ImportError(
            f"optuna must be installed for {use}, got none; pip install 'kvbits[tune]'"
        ) from None


def nsga2(population: int) -> Callable[..., Any]:
    """Return a maker of NSGA-II samplers."""
    import optuna

    def make(**settings: Any) -> Any:
        return optuna.samplers.NSGAIISampler(population_size=population, **settings)

    return make


def tpe(population: int, *, is_parallel: bool = False) -> Callable[..., Any]:
    """Return a maker of TPE samplers that start with ``population`` random trials.

    Where trials are proposed while others are not known yet, those count as bad ones, so that
    proposals keep a distance.
    """
    import optuna

    def make(**settings: Any) -> Any:
        return optuna.samplers.TPESampler(
            n_startup_trials=population, multivariate=True, constant_liar=is_parallel, **settings
        )

    return make


class OptunaProposer:
    """Minimises the normalised KL (``Problem.score``) and effective bits.

    Plans beyond the limit are constrained-dominated by plans within. The uniform plans are the
    first trials. Every trial draws from a generator seeded by (seed, trial number) alone.

    Source: KVTuner (arXiv 2502.04420): groups, two objectives, the budget a soft constraint.
    Differs from the paper: NSGA-II, as in the authors' code, or TPE, where the text says MOEA/D;
    the objective is teacher-forced KL through the quantized cache instead of task accuracy.

    Args:
        problem: Sizes and scores.
        space: What may vary.
        limit: Soft constraint.
        make_sampler: Makes a sampler from ``seed`` and ``constraints_func``.
        seed: Of the study.
        parallel: Trials that may be proposed before the first of them is known.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        limit: Limit,
        make_sampler: Callable[..., Any],
        *,
        seed: int,
        parallel: int = 1,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._problem, self._space, self._limit = problem, space, limit
        self._make, self._seed = make_sampler, seed
        self._study = optuna.create_study(directions=["minimize", "minimize"])
        for picks in space.uniform():
            self._study.enqueue_trial(self._params(picks))
        self.independent, self._number = parallel, 0
        self._asked: deque[Any] = deque()

    def ask(self) -> Choice:
        self._study.sampler = self._sampler()
        trial: Any = self._study.ask()
        _ = trial.relative_params  # enters trials with given parameters into their generation too
        picks = []
        for group, candidates in enumerate(self._space.candidates):
            names = [self._name(index) for index in candidates]
            picked = trial.suggest_categorical(f"group{group}", names)
            picks.append(candidates[names.index(picked)])
        self._number += 1
        self._asked.append(trial)
        return self._space.choice(picks)

    def tell(self, choice: Choice, record: Record) -> None:
        bits, kl_nats = self._problem.costs.effective_bits(choice), record["kl_nats"]
        trial = self._asked.popleft()
        trial.set_user_attr("excess", self._limit.excess(bits, kl_nats))
        self._study.tell(trial, [self._problem.score(kl_nats), bits])

    def _sampler(self) -> Any:
        seed = int(np.random.SeedSequence([self._seed, self._number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental options, and names to come
            return self._make(
                seed=seed, constraints_func=lambda trial: (trial.user_attrs["excess"],)
            )

    def _params(self, picks: Sequence[int]) -> dict[str, str]:
        return {f"group{group}": self._name(index) for group, index in enumerate(picks)}

    def _name(self, index: int) -> str:
        return self._problem.costs.candidates[index].label
