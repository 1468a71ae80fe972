"""A benchmark on one plan, from items to kept results: what the command and recipes share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbits.evaluation.benchmarks.base import Benchmark, Item
from kvbits.evaluation.benchmarks.results import results
from kvbits.evaluation.benchmarks.running import RunSettings, finish, run_benchmark, settings_of
from kvbits.evaluation.benchmarks.source import Source
from kvbits.evaluation.harness_run import RESULTS, identity, open_run, read_object
from kvbits.evaluation.records import library_versions

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


def scored(
    benchmark: Benchmark,
    items: Sequence[Item],
    model: Any,
    tokenizer: Any,
    plan: CachePlan | None,
    settings: RunSettings,
    source: Source,
    *,
    facts: Mapping[str, Any],
    folder: Path | None = None,
    execute: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run a benchmark, or read what the same run found before.

    Args:
        benchmark: The benchmark.
        items: What `make_items` made of it.
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        plan: The cache plan; None is full precision.
        settings: How to run.
        source: Where the items' data was read, whose checksums are recorded.
        facts: What else makes the run the one it is, such as the model's name.
        folder: Where records and results are kept; None keeps nothing.
        execute: Runs a program of the benchmark and says whether it ended well.
        progress: Called with the number of items done.

    Raises:
        RecordError: If another run lies in the folder.
    """
    place = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    asked = settings_of(benchmark, settings, source) | dict(facts)
    manifest = identity(plan, asked, library_versions() | place)
    if folder is not None:
        open_run(folder, manifest)
        done = folder / f"{benchmark.name}{RESULTS}"
        if done.exists():
            return read_object(done)
    outcome = run_benchmark(
        benchmark,
        items,
        model,
        tokenizer,
        plan,
        settings,
        folder=folder,
        execute=execute,
        progress=progress,
    )
    found: dict[str, Any] = json.loads(json.dumps(results(benchmark, outcome, manifest)))
    if folder is not None:
        finish(folder, benchmark, outcome, found)
    return found
