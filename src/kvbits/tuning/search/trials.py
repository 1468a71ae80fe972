"""The loop that strategies share which measure whole plans: propose, measure, record, learn.

``search.jsonl`` is the truth: one line per trial. A stopped search asks its proposer for the
recorded trials again, which costs no measurement, and goes on behind them; so a proposer may draw
from nothing but its seed, the number of the trial and what it was told.

Trials are proposed in batches, of one unless several may be measured at a time, and told in their
order. So what is found does not depend on who measures, how many do, or which of them is slow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from kvbits.errors import RecordError
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.prune import pareto_mask
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Allocation, Choice
from kvbits.tuning.team import Alone, Kind, Record, Team

Evaluate: TypeAlias = Callable[[Choice], Sequence[Mapping[str, Any]]]
"""Measure a choice: per domain ``kl_nats``, ``document_kl_nats`` and ``document_tokens``."""

RECORDS = "search.jsonl"
SEARCH = Kind("search", ("loss", "effective_bits"))


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

    @property
    def independent(self) -> int:
        """Trials that may be asked for now before the first of them is told."""

    def ask(self) -> Choice | None:
        """Return the next trial, or None where there is nothing more to learn."""

    def tell(self, choice: Choice, record: Record) -> None:
        """Take note of what a trial measured; trials are told in the order they were asked for."""


class Listed:
    """Proposes given choices in order."""

    independent = sys.maxsize

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
    team: Team | None = None,
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
        team: Measures; this process alone by default.

    Returns:
        The records of this stage by choice, in the order in which they were first proposed.

    Raises:
        RecordError: The proposer would not have made the recorded trials.
    """
    log = _Log(run, stage, progress)
    found: dict[Choice, Record] = {}
    progress.start("search", trials)
    while log.asked < trials:
        batch = _ask(proposer, trials - log.asked)
        for number, choice in enumerate(batch, log.asked):
            log.expect(number, choice)
        measured = (team or Alone()).measure(
            SEARCH, batch, lambda choice: _record(problem, choice, evaluate(choice)), log.known
        )
        for choice, record in measured:
            log.add(choice, record)
        for choice in batch:
            found.setdefault(choice, log.known[choice])
            proposer.tell(choice, log.known[choice])
        if not batch:
            break
    progress.finish()
    return found


def _ask(proposer: Proposer, most: int) -> list[Choice]:
    """The next trials that need not know of one another; none where the proposer has no more."""
    batch = []
    for _ in range(min(most, proposer.independent)):
        choice = proposer.ask()
        if choice is None:
            break
        batch.append(choice)
    return batch


class _Log:
    """The lines of one stage, written as they come: a trial's when its plan is measured."""

    def __init__(self, run: RunDir, stage: str, progress: Progress) -> None:
        self._run, self._stage, self._progress = run, stage, progress
        records = run.records(RECORDS)
        self.known: dict[Choice, Record] = {}
        for record in records:
            self.known.setdefault(tuple(record["choice"]), record)
        of_stage = [record for record in records if record["stage"] == stage]
        self._done = {record["trial"]: tuple(record["choice"]) for record in of_stage}
        self._waiting: dict[Choice, list[int]] = {}
        self.asked = 0

    def expect(self, number: int, choice: Choice) -> None:
        """Take note of a proposed trial, and write its line if its plan is known already.

        Raises:
            RecordError: Another choice is recorded under its number.
        """
        self.asked = number + 1
        if self._done.get(number, choice) != choice:
            raise RecordError(
                f"{RECORDS} must replay to the same trials, got another choice in trial {number} "
                f"of {self._stage}; another version of a library wrote it, tune in a new "
                "directory with -o"
            )
        self._waiting.setdefault(choice, []).append(number)
        if choice in self.known:
            self.add(choice, self.known[choice])

    def add(self, choice: Choice, record: Record) -> None:
        """Write the lines of the trials that waited for a plan."""
        self.known.setdefault(choice, record)
        for number in self._waiting.pop(choice):
            if number not in self._done:
                line = {**self.known[choice], "stage": self._stage, "trial": number}
                self._run.append(RECORDS, line)
            self._progress.advance()


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
