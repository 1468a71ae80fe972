"""Published benchmarks, by name: each a small file of what is asked and how it is judged."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvbits.evaluation.benchmarks.base import Benchmark
from kvbits.evaluation.benchmarks.lambada import Lambada
from kvbits.evaluation.benchmarks.own import Arithmetic, Recall
from kvbits.evaluation.benchmarks.perplexity import C4Perplexity, WikiText2
from kvbits.evaluation.benchmarks.retrieval import NeedleGrid, PasskeyGrid, Ruler
from kvbits.plan.loading import one_sentence

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Lambada,
        WikiText2,
        C4Perplexity,
        PasskeyGrid,
        NeedleGrid,
        Ruler,
        Recall,
        Arithmetic,
    )
}
"""Every benchmark, by name."""

__all__ = ["BENCHMARKS", "Benchmark", "build_benchmark"]


def build_benchmark(name: str, **settings: Any) -> Benchmark:
    """Make a benchmark by name.

    Args:
        name: A key of ``BENCHMARKS``.
        **settings: Fields of its class.

    Raises:
        ValueError: If there is no such benchmark, or a setting is unknown or out of range.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    try:
        return BENCHMARKS[name](**settings)
    except ValidationError as error:
        raise ValueError(one_sentence(error)) from None
