"""What ``kvbits evaluate`` does with a loaded model: measure, keep the rows, print them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from kvbits.cli.models import Loaded
from kvbits.cli.output import console, progress_bars, size, table
from kvbits.evaluation import records
from kvbits.evaluation.accuracy import paired_difference, run_task
from kvbits.evaluation.corpora import TokenSet, default_sets, text_set
from kvbits.evaluation.divergence import measure
from kvbits.evaluation.perplexity import perplexity
from kvbits.evaluation.tasks import TASKS, Task
from kvbits.evaluation.texts import dataset_texts
from kvbits.plan import CachePlan


class Row(NamedTuple):
    """One line of the printed table: what, where, how much, and on how much data."""

    measure: str
    data: str
    value: str
    n: str


def choose_tasks(names: Iterable[str]) -> list[Task]:
    """Make the named tasks.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = []
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--task must be among {', '.join(sorted(TASKS))}, got {name!r}")
        chosen.append(TASKS[name]())
    return chosen


class Measuring:
    """A loaded model and a plan, and what was measured so far.

    Args:
        loaded: model and tokenizer.
        plan: the plan; None measures full precision.
        seed: seed of generated data.
        output: file that each measurement is appended to, if any.
    """

    def __init__(
        self, loaded: Loaded, plan: CachePlan | None, *, seed: int, output: Path | None
    ) -> None:
        self.loaded, self.plan, self.seed, self.output = loaded, plan, seed, output
        self.rows: list[Row] = []
        self.records: list[records.Record] = []

    def default_sets(self) -> None:
        """Measure on the held-out sets of the three default domains."""
        for token_set in default_sets(self.loaded.tokenizer, "heldout", seed=self.seed):
            self.token_set(token_set)

    def text(self, source: Path | str, windows: int | None, window_tokens: int) -> None:
        """Measure on the windows of a text file, or of a dataset given by name."""
        is_file = isinstance(source, Path)
        made = text_set(
            self.loaded.tokenizer,
            None if is_file else dataset_texts(str(source)),
            path=source if is_file else None,
            name=source.stem if isinstance(source, Path) else source,
            documents=windows,
            max_tokens=window_tokens,
        )
        self.token_set(made)

    def token_set(self, token_set: TokenSet) -> None:
        """Measure divergence from full precision, or perplexity where there is no plan."""
        model = self.loaded.model
        if self.plan is None:
            found = perplexity(model, token_set)
            self._add("perplexity", token_set.name, f"{found.perplexity:.3f}", found.num_tokens)
            self._keep(records.perplexity_record(found, token_set, None, model))
            return
        kl = measure(model, self.plan, token_set)  # both passes side by side: any size of text
        name, n = token_set.name, kl.num_tokens
        self._add("forward KL, nats", name, f"{kl.kl_nats:.5f} ± {kl.kl_se:.5f}", n)
        self._add("top-1 agreement", name, f"{100 * kl.top1_agreement:.2f} %", n)
        change = f"{kl.perplexity:.3f} (16 bits: {kl.perplexity_reference:.3f})"
        self._add("perplexity", name, change, n)
        self._keep(records.divergence_record(kl, token_set, self.plan, model))

    def task(self, task: Task, n: int, batch_size: int) -> None:
        """Solve problems at full precision and, with a plan, on its cache; compare in pairs."""
        full = self._solve(task, n, batch_size, None)
        share = f"{100 * full.accuracy:.1f} ± {100 * full.standard_error:.1f} %"
        self._add("accuracy, 16 bits", task.name, share, n)
        if self.plan is None:
            return
        packed = self._solve(task, n, batch_size, self.plan)
        share = f"{100 * packed.accuracy:.1f} ± {100 * packed.standard_error:.1f} %"
        self._add("accuracy, packed", task.name, share, n)
        gap, low, high = (100 * value for value in paired_difference(packed, full))
        self._add("difference, points", task.name, f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]", n)
        self._add("cache of a batch", task.name, size(packed.cache_bytes), n)

    def _solve(self, task: Task, n: int, batch_size: int, plan: CachePlan | None) -> Any:
        label = f"{task.name}, {'16 bits' if plan is None else 'packed'}"
        model, seed = self.loaded.model, self.seed
        with progress_bars() as bars:
            bar = bars.add_task(label, total=n)
            found = run_task(
                model,
                self.loaded.tokenizer,
                task,
                n=n,
                seed=seed,
                split="test",
                plan=plan,
                batch_size=batch_size,
                progress=lambda done: bars.advance(bar, done),
            )
        self._keep(records.accuracy_record(found, plan, model, seed=seed, split="test"))
        return found

    def _add(self, measure: str, data: str, value: str, n: int) -> None:
        self.rows.append(Row(measure, data, value, f"{n:,}"))

    def _keep(self, record: records.Record) -> None:
        self.records.append(record)
        if self.output is not None:
            records.append_record(self.output, record)

    def print(self, *, as_json: bool) -> None:
        """Print everything measured."""
        bits = 16.0 if self.plan is None else self.plan.effective_bits
        name = "full precision" if self.plan is None else self.plan.describe()
        if as_json:
            found = {"model": self.loaded.name, "plan": name, "effective_bits": bits}
            kept = [record.model_dump(mode="json") for record in self.records]
            typer.echo(json.dumps(found | {"records": kept}, indent=2))
            return
        rows = table("measure", "data", "value", "n")
        for row in self.rows:
            rows.add_row(*row)
        console().print(f"{self.loaded.name}: {name}")
        console().print(rows)
