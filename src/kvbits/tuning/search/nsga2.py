"""Evolutionary search over groups of layers, every trial measured end to end.

Slower than the integer programme by the cost of one measurement a trial, but free of its
assumption that sensitivities add up, and able to search for a task score instead of a KL.

``search.jsonl`` is the truth: one line per measured trial. Optuna's journal beside it lets its
tools look at the study; when a kill leaves the two apart, the journal is rebuilt by replaying the
records, which costs no measurement. Every trial draws from a generator seeded by (seed, trial
number) alone, so a replayed, a resumed and an uninterrupted study ask for the same trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from kvbits.errors import RecordError
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.prune import pareto_mask
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Allocation, Choice

Evaluate: TypeAlias = Callable[[Choice], tuple[float, ...]]
"""Measure a choice: the KL of every domain on calibration data, nats per token."""

RECORDS = "search.jsonl"
JOURNAL = "optuna.journal"


class Space(NamedTuple):
    """What may vary: one decision per group of layers, among the group's Pareto set."""

    groups: tuple[tuple[int, ...], ...]
    candidates: tuple[tuple[int, ...], ...]  # per group, columns of CostTable

    def choice(self, picks: Sequence[int]) -> Choice:
        """Return the candidate index of every layer, given one of every group."""
        layers = {
            layer: pick for group, pick in zip(self.groups, picks, strict=True) for layer in group
        }
        return tuple(layers[layer] for layer in range(len(layers)))


class Settings(NamedTuple):
    """How long and from where to search."""

    trials: int
    population: int
    seed: int
    budget_bits: float


def search(
    problem: Problem,
    space: Space,
    evaluate: Evaluate,
    settings: Settings,
    *,
    run: RunDir,
    progress: Progress,
) -> list[Allocation]:
    """Run or resume NSGA-II; return the undominated measured plans, smallest first.

    Objectives: the normalised KL (``problem.score``) and effective bits; plans over the budget are
    constrained-dominated by plans within. The uniform plans are the first trials.

    Source: KVTuner (arXiv 2502.04420): groups, two objectives, the budget a soft constraint.
    Differs from the paper: NSGA-II, as in the authors' code, where the text says MOEA/D; the
    objective is teacher-forced KL through the quantized cache instead of task accuracy.

    Returns:
        Allocations whose ``predicted_kl`` and ``loss`` are measured on calibration data.
    """
    done = run.records(RECORDS)
    study = _open_study(problem, space, settings, run, done)
    measured = {tuple(r["choice"]): tuple(r["kl_nats"]) for r in done}
    progress.start("search", settings.trials)
    progress.advance(len(done))
    for number in range(len(done), settings.trials):
        trial, choice = _ask(study, problem, space, settings, number)
        if choice not in measured:
            measured[choice] = evaluate(choice)
        record = {
            "trial": number,
            "choice": choice,
            "labels": problem.costs.labels(choice),
            "effective_bits": problem.costs.effective_bits(choice),
            "kl_nats": measured[choice],
        }
        run.append(RECORDS, record)
        _tell(study, problem, settings, trial, choice, measured[choice])
        progress.advance()
    progress.finish()
    return _front(problem, measured)


def _front(problem: Problem, measured: dict[Choice, tuple[float, ...]]) -> list[Allocation]:
    bits = np.array([problem.costs.effective_bits(choice) for choice in measured])
    losses = np.array([problem.score(np.array(kl)) for kl in measured.values()])
    points = [
        Allocation(choice, float(size), kl, float(loss))
        for (choice, kl), size, loss in zip(measured.items(), bits, losses, strict=True)
    ]
    kept = [p for p, keep in zip(points, pareto_mask(bits, losses), strict=True) if keep]
    return sorted(kept, key=lambda point: point.effective_bits)


def _open_study(
    problem: Problem,
    space: Space,
    settings: Settings,
    run: RunDir,
    done: list[dict[str, Any]],
) -> Any:
    """Open the journal if it holds exactly the recorded trials; else rebuild it from them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run.file(f"{JOURNAL}.lock").unlink(missing_ok=True)  # left by a kill; this process has the run
    run.records(JOURNAL)  # cuts a torn last line
    study = _load(run)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    waiting = optuna.trial.TrialState.WAITING
    told = [state for state in states if state != waiting]
    if len(told) == len(done) and all(state.is_finished() for state in told) and states:
        return study
    run.file(JOURNAL).unlink()
    study = _load(run)
    for picks in _uniform_picks(problem, space):
        study.enqueue_trial(_params(problem, picks))
    for number, record in enumerate(done):
        trial, choice = _ask(study, problem, space, settings, number)
        if list(choice) != record["choice"]:
            raise RecordError(
                f"{RECORDS} must replay to the same trials, got another choice in trial {number}; "
                "it was written by another version of optuna, tune in a new directory with -o"
            )
        _tell(study, problem, settings, trial, choice, tuple(record["kl_nats"]))
    return study


def _load(run: RunDir) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(run.file(JOURNAL))))
    return optuna.create_study(
        storage=storage,
        study_name="kvbits",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )


def _sampler(settings: Settings, number: int) -> Any:
    """Return a sampler whose draws depend on the seed and the trial number only."""
    import optuna

    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its successor needs optuna >= 5
        return optuna.samplers.NSGAIISampler(
            population_size=settings.population,
            seed=seed,
            constraints_func=lambda trial: (trial.user_attrs["excess_bits"],),
        )


def _ask(
    study: Any, problem: Problem, space: Space, settings: Settings, number: int
) -> tuple[Any, Choice]:
    study.sampler = _sampler(settings, number)
    trial = study.ask()
    _ = trial.relative_params  # enters trials with given parameters into their generation too
    picks = []
    for group, candidates in enumerate(space.candidates):
        names = [_name(problem, index) for index in candidates]
        picked = trial.suggest_categorical(f"group{group}", names)
        picks.append(candidates[names.index(picked)])
    return trial, space.choice(picks)


def _tell(
    study: Any,
    problem: Problem,
    settings: Settings,
    trial: Any,
    choice: Choice,
    kl_nats: tuple[float, ...],
) -> None:
    bits = problem.costs.effective_bits(choice)
    trial.set_user_attr("excess_bits", bits - settings.budget_bits)
    study.tell(trial, [problem.score(np.array(kl_nats)), bits])


def _uniform_picks(problem: Problem, space: Space) -> list[list[int]]:
    return [
        [index] * len(space.groups)
        for index in range(len(problem.costs.candidates))
        if all(index in candidates for candidates in space.candidates)
    ]


def _params(problem: Problem, picks: Sequence[int]) -> dict[str, str]:
    return {f"group{group}": _name(problem, index) for group, index in enumerate(picks)}


def _name(problem: Problem, index: int) -> str:
    return problem.costs.candidates[index].label
