"""Verification: the front and its rivals measured end to end on data no search has seen.

The search chose by estimates on calibration data and nothing here changes its choice, so that the
held-out numbers of the chosen plan are not the best of many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from kvbits.evaluation.accuracy import run_task
from kvbits.evaluation.positions import PositionBin
from kvbits.evaluation.statistics import Difference, paired_difference, paired_mean_difference
from kvbits.evaluation.tasks import TASKS
from kvbits.tuning.progress import Progress
from kvbits.tuning.rivals import Entry
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, rounded, rounded_or_none
from kvbits.tuning.team import Alone, Kind, Team

RECORDS = "verify.jsonl"
VERIFICATION = Kind("verification")

Labels: TypeAlias = tuple[str, ...]
Key: TypeAlias = tuple[Labels, str]
"""A plan, as the label of every layer, and the domain or task it was measured on."""


class TaskSettings(NamedTuple):
    """Tasks that the chosen plan, full precision and the best rivals are run on."""

    names: tuple[str, ...]
    n: int
    seed: int


class Verifier:
    """Measures plans on held-out data; every measurement is one line of ``verify.jsonl``.

    Args:
        meter: The model with the held-out token sets.
        tokenizer: The model's tokenizer.
        tasks: What to run besides KL.
        run: Where the records are, and go.
        team: Measures.
    """

    def __init__(
        self,
        meter: Meter,
        tokenizer: Any,
        tasks: TaskSettings,
        run: RunDir,
        team: Team | None = None,
    ) -> None:
        self.meter, self.tokenizer, self.tasks, self.run = meter, tokenizer, tasks, run
        self.team = team or Alone()
        self.records: dict[Key, Mapping[str, Any]] = {}
        for record in run.records(RECORDS):
            self._file(record)

    def labels(self, entry: Entry) -> Labels:
        """Return the label of every layer of a plan."""
        return self.meter.candidates.labels(entry.allocation.choice)

    def run_all(self, entries: Sequence[Entry], progress: Progress) -> None:
        """Measure what is not recorded yet: KLs of all plans, tasks of those that ask for them.

        Equal plans are measured once. Full precision has no KL to itself.
        """
        names = self.tasks.names if self.tasks.n else ()
        steps: dict[Key, tuple[Entry, Callable[[Entry, Key], dict[str, Any]]]] = {}
        for entry in entries:
            if entry.origin != "full":
                labels = self.labels(entry)
                for domain in self.meter.token_sets:
                    steps.setdefault((labels, domain), (entry, self._measure_kl))
        for entry in entries:
            if entry.measures_tasks:
                for name in names:
                    steps.setdefault((self.labels(entry), name), (entry, self._measure_task))
        progress.start("verification", len(steps))
        progress.advance(len(steps.keys() & self.records.keys()))

        def one(key: Key) -> dict[str, Any]:
            entry, measure = steps[key]
            return measure(entry, key)

        for _, record in self.team.measure(VERIFICATION, steps, one, self.records):
            self.run.append(RECORDS, record)
            self._file(record)
            progress.advance()
        progress.finish()

    def kl(self, labels: Labels) -> dict[str, Mapping[str, Any]]:
        """Return the KL records of a plan by domain; empty where it was not measured."""
        keys = {domain: (labels, domain) for domain in self.meter.token_sets}
        return {name: self.records[key] for name, key in keys.items() if key in self.records}

    def task(self, labels: Labels, name: str) -> Mapping[str, Any] | None:
        """Return the record of a plan on a task, if it was run."""
        return self.records.get((labels, name))

    def kl_difference(self, a: Labels, b: Labels, domain: str) -> Difference:
        """Return KL of ``a`` minus that of ``b`` over the same documents, with a 95 % interval."""
        first, second = self.records[a, domain], self.records[b, domain]
        return paired_mean_difference(
            first["document_kl_nats"], second["document_kl_nats"], first["document_tokens"]
        )

    def task_difference(self, a: Labels, b: Labels, name: str) -> Difference:
        """Return accuracy of ``a`` minus that of ``b`` on the same problems, 95 % interval."""
        return paired_difference(
            self.records[a, name]["correct"], self.records[b, name]["correct"]
        )

    def _file(self, record: Mapping[str, Any]) -> None:
        self.records[tuple(record["labels"]), record["domain"] or record["task"]] = record

    def _measure_kl(self, entry: Entry, key: Key) -> dict[str, Any]:
        labels, domain = key
        token_set = self.meter.token_sets[domain]
        plan = self.meter.candidates.plan(entry.allocation.choice)
        result = self.meter.divergence(plan, domain)
        return {
            "kind": "kl",
            "name": entry.name,
            "origin": entry.origin,
            "labels": labels,
            "effective_bits": plan.effective_bits,
            "domain": domain,
            "task": None,
            "data": token_set.name,
            "split": token_set.split,
            "checksum": token_set.checksum,
            "num_tokens": result.num_tokens,
            "n": result.num_documents,
            "kl_nats": rounded(result.kl_nats),
            "kl_se": rounded_or_none(result.kl_se),
            "top1_agreement": rounded(result.top1_agreement),
            "flips": rounded(result.flips),
            "perplexity": rounded(result.perplexity),
            "perplexity_reference": rounded(result.perplexity_reference),
            "document_kl_nats": [rounded(value) for value in result.document_kl_nats],
            "document_tokens": list(result.document_tokens),
            "excess_nll": rounded(result.excess_nll),
            "excess_nll_se": rounded_or_none(result.excess_nll_se),
            "positions": [_position(each) for each in result.positions],
            "cache_bytes": result.cache_bytes,
            "seconds": round(result.seconds, 3),
        }

    def _measure_task(self, entry: Entry, key: Key) -> dict[str, Any]:
        labels, name = key
        plan = self.meter.candidates.plan(entry.allocation.choice)
        result = run_task(
            self.meter.model,
            self.tokenizer,
            TASKS[name](),
            n=self.tasks.n,
            seed=self.tasks.seed,
            split="test",
            plan=None if entry.origin == "full" else plan,
        )
        return {
            "kind": "task",
            "name": entry.name,
            "origin": entry.origin,
            "labels": labels,
            "effective_bits": plan.effective_bits,
            "domain": None,
            "task": name,
            "data": name,
            "split": "test",
            "seed": self.tasks.seed,
            "n": result.n,
            "accuracy": rounded(result.accuracy),
            "accuracy_se": rounded(result.standard_error),
            "correct": list(result.correct),
            "cache_bytes": result.cache_bytes,
            "seconds": round(result.seconds, 3),
        }


def _position(found: PositionBin) -> dict[str, Any]:
    return found._asdict() | {
        "kl_nats": rounded(found.kl_nats),
        "kl_se": rounded_or_none(found.kl_se),
    }
