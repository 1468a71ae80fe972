"""Published benchmarks, by name: each a small file of what is asked and how it is judged."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvbits.evaluation.benchmarks.base import Benchmark
from kvbits.evaluation.benchmarks.blimp import Blimp
from kvbits.evaluation.benchmarks.gaokao import Gaokao
from kvbits.evaluation.benchmarks.grids import NeedleGrid, PasskeyGrid, Ruler
from kvbits.evaluation.benchmarks.gsm8k import Gsm8k
from kvbits.evaluation.benchmarks.humaneval import HumanEval
from kvbits.evaluation.benchmarks.lambada import Lambada
from kvbits.evaluation.benchmarks.livecodebench import LiveCodeBench
from kvbits.evaluation.benchmarks.longbench import LongBench
from kvbits.evaluation.benchmarks.math500 import Math500
from kvbits.evaluation.benchmarks.mmlu import Mmlu, MmluStem
from kvbits.evaluation.benchmarks.own import Arithmetic, Recall
from kvbits.evaluation.benchmarks.perplexity import C4Perplexity, WikiText2
from kvbits.evaluation.benchmarks.retrieval import Babi, KeyValueStore, KiviPassKey, LongEvalLines
from kvbits.plan.loading import one_sentence

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Gsm8k,
        Math500,
        Mmlu,
        MmluStem,
        Gaokao,
        LongBench,
        PasskeyGrid,
        NeedleGrid,
        Ruler,
        LongEvalLines,
        KeyValueStore,
        KiviPassKey,
        Babi,
        Lambada,
        Blimp,
        WikiText2,
        C4Perplexity,
        HumanEval,
        LiveCodeBench,
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
