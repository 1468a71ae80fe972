"""What a run of a benchmark reports: means with standard errors, and what they depend on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from kvbits.evaluation.benchmarks.base import Benchmark
from kvbits.evaluation.benchmarks.running import Outcome
from kvbits.evaluation.samples import Sample
from kvbits.evaluation.statistics import clustered_mean


def results(benchmark: Benchmark, outcome: Outcome, manifest: dict[str, Any]) -> dict[str, Any]:
    """Sum up a run, in the form of lm-evaluation-harness's results.

    Args:
        benchmark: The benchmark.
        outcome: What its run found.
        manifest: Plan, settings and versions of the run.
    """
    samples = outcome.samples
    tasks = _by(samples, [sample.task for sample in samples])
    hashes = "".join(sample.prompt_hash for sample in samples)
    return manifest | {
        "results": {name: means(part) for name, part in tasks.items()},
        "n-samples": {name: {"effective": len(part)} for name, part in tasks.items()},
        "groups": {name: _groups(part) for name, part in tasks.items()},
        "summary": benchmark.summary(samples),
        "prompts_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "cache_bytes": outcome.cache_bytes,
        "seconds": outcome.seconds,
    }


def means(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The mean of every metric and its standard error, named as the harness names them."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample.metrics):
        having = [sample for sample in samples if name in sample.metrics]
        weights = [sample.weights.get(name, 1.0) for sample in having]
        sums = [s.metrics[name] * w for s, w in zip(having, weights, strict=True)]
        mean, error = clustered_mean(sums, weights)
        found[f"{name},none"] = mean
        found[f"{name}_stderr,none"] = None if math.isnan(error) else error
    return found


def _groups(samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    parts = _by(samples, [sample.group for sample in samples])
    return {name: means(part) | {"n": len(part)} for name, part in parts.items() if name}


def _by(samples: Sequence[Sample], names: Iterable[str]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample, name in zip(samples, names, strict=True):
        found.setdefault(name, []).append(sample)
    return found
