"""The loop that strategies share which measure whole plans: propose, measure, record, learn.

``search.jsonl`` is the truth: one line per trial. A stopped search asks its proposer for the
recorded trials again, which costs no measurement, and goes on behind them; so a proposer may draw
from nothing but its seed, the number of the trial and what it was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from kvbits.errors import RecordError
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.prune import pareto_mask
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Allocation, Choice

Evaluate: TypeAlias = Callable[[Choice], Sequence[Mapping[str, Any]]]
"""Measure a choice: per domain ``kl_nats``, ``document_kl_nats`` and ``document_tokens``."""
Record: TypeAlias = Mapping[str, Any]

RECORDS = "search.jsonl"


class Space(NamedTuple):
    """What may vary: one decision per group of layers, among the group's Pareto set."""

    groups: tuple[tuple[int, ...], ...]
    candidates: tuple[tuple[int, ...], ...]  # per group, columns of CostTable

    def choice(self, picks: Sequence[int]) -> Choice:
        """Return the candidate of every layer, given one of every group."""
        layers = {
            layer: pick for group, pick in zip(self.groups, picks, strict=True) for layer in group
        }
        return tuple(layers[layer] for layer in range(len(layers)))

    def uniform(self) -> list[tuple[int, ...]]:
        """Return the picks of every uniform plan that is in the space."""
        shared = set.intersection(*map(set, self.candidates))
        return [(index,) * len(self.groups) for index in sorted(shared)]


class Limit(NamedTuple):
    """What a plan should not exceed; None is no limit. A drop in a task is checked apart."""

    bits: float | None = None
    kl_nats: float | None = None  # in every domain

    def excess(self, bits: float, kl_nats: Sequence[float]) -> float:
        """Return how far a plan is beyond, as a share of the limit; not above 0 if it is not."""
        over = []
        if self.bits is not None:
            over.append((bits - 1e-9) / self.bits - 1)
        if self.kl_nats is not None:
            over.append(max(kl_nats) / self.kl_nats - 1)
        return max(over, default=0.0)


class Proposer(Protocol):
    """Chooses what to measure next."""

    def ask(self) -> Choice | None:
        """Return the next trial, or None where there is nothing more to learn."""

    def tell(self, choice: Choice, record: Record) -> None:
        """Take note of what the last trial measured."""


class Listed:
    """Proposes given choices in order."""

    def __init__(self, choices: Iterable[Choice]) -> None:
        self._choices = iter(choices)

    def ask(self) -> Choice | None:
        return next(self._choices, None)

    def tell(self, choice: Choice, record: Record) -> None: ...


def run_trials(
    problem: Problem,
    proposer: Proposer,
    evaluate: Evaluate,
    *,
    trials: int,
    run: RunDir,
    progress: Progress,
    stage: str = "search",
) -> dict[Choice, Record]:
    """Run or resume ``trials`` trials; plans that were measured in any stage are not again.

    Args:
        problem: Sizes and scores.
        proposer: A fresh one.
        evaluate: Measures a plan on calibration data.
        trials: Trials at most.
        run: Holds and takes the records.
        progress: Told about every trial.
        stage: Names the trials of this proposer where a run has several.

    Returns:
        The records of this stage by choice, in the order in which they were first proposed.

    Raises:
        RecordError: The proposer would not have made the recorded trials.
    """
    records = run.records(RECORDS)
    known: dict[Choice, Record] = {tuple(record["choice"]): record for record in records}
    done = [record for record in records if record["stage"] == stage]
    found: dict[Choice, Record] = {}
    progress.start("search", trials)
    for number in range(trials):
        choice = proposer.ask()
        if choice is None:
            break
        if number < len(done) and tuple(done[number]["choice"]) != choice:
            raise RecordError(
                f"{RECORDS} must replay to the same trials, got another choice in trial {number} "
                f"of {stage}; another version of a library wrote it, tune in a new directory "
                "with -o"
            )
        if choice not in known:
            known[choice] = _record(problem, choice, evaluate(choice))
        if number >= len(done):
            run.append(RECORDS, {**known[choice], "stage": stage, "trial": number})
        found.setdefault(choice, known[choice])
        proposer.tell(choice, known[choice])
        progress.advance()
    progress.finish()
    return found


def _record(problem: Problem, choice: Choice, domains: Sequence[Record]) -> dict[str, Any]:
    kl_nats = [float(domain["kl_nats"]) for domain in domains]
    return {
        "choice": choice,
        "labels": problem.costs.labels(choice),
        "effective_bits": problem.costs.effective_bits(choice),
        "kl_nats": kl_nats,
        "document_kl_nats": [domain["document_kl_nats"] for domain in domains],
        "document_tokens": [domain["document_tokens"] for domain in domains],
        "loss": problem.score(kl_nats),
        "predicted_loss": problem.allocation(choice).loss,
    }


def measured_front(problem: Problem, records: Mapping[Choice, Record]) -> list[Allocation]:
    """Return the undominated measured plans, smallest first.

    Their ``predicted_kl`` and ``loss`` are those measured on calibration data.
    """
    points = [
        Allocation(
            choice,
            problem.costs.effective_bits(choice),
            tuple(record["kl_nats"]),
            problem.score(record["kl_nats"]),
        )
        for choice, record in records.items()
    ]
    bits = np.array([point.effective_bits for point in points])
    keep = pareto_mask(bits, np.array([point.loss for point in points]))
    kept = [point for point, is_kept in zip(points, keep, strict=True) if is_kept]
    return sorted(kept, key=lambda point: point.effective_bits)
