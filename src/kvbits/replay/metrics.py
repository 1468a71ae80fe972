"""What a replay reports: one line of numbers for programs, and the same with more in a file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from kvbits.errors import RecordError
from kvbits.replay.harness import ExampleResult

PREFIX = "TEST_METRICS:"
REQUIRED = (
    "quality_main",
    "quality_delta_vs_ref",
    "greedy_match_ratio",
    "cache_error",
    "avg_bits_per_kv_token",
    "peak_kv_memory_mb",
    "prefill_latency_ms",
    "decode_tokens_per_s",
    "calibration_cost_s",
)
REP_WEIGHT, FIDELITY_WEIGHT = 0.7, 0.3
REFERENCE_QUALITY = 100.0
OVER_BUDGET_BITS = 0.5  # above the budget at 4096 tokens
TIMES = ("prefill_latency_ms", "decode_tokens_per_s", "calibration_cost_s")
_FIELD = re.compile(r"([A-Za-z_]\w*)=(\S+)")


def summarise(examples: Sequence[ExampleResult], budget_bits: int) -> dict[str, float]:
    """The metrics of a workload, the nine required ones first.

    quality_main = 100 (0.7 rep + 0.3 / (1 + cache_error)), rep = the mean over all steps of
    (match + exp(-KL)) / 2. Bits are averaged over tensors, steps and then examples.

    Raises:
        RecordError: If no example took a step.
    """
    steps = [step for example in examples for step in example.steps]
    if not steps:
        raise RecordError("examples must take at least one step, got none: all end at once")
    tensors = [tensor for step in steps for tensor in step.tensors]
    match = _mean(float(step.is_match) for step in steps)
    rep = _mean((step.is_match + math.exp(-step.kl_nats)) / 2 for step in steps)
    error = _mean(tensor.error for tensor in tensors)
    quality = 100 * (REP_WEIGHT * rep + FIDELITY_WEIGHT / (1 + error))
    seconds = sum(example.decode_seconds for example in examples)
    reference_bits = _of_examples(examples, "bits_at_reference")
    return {
        "quality_main": quality,
        "quality_delta_vs_ref": quality - REFERENCE_QUALITY,
        "greedy_match_ratio": match,
        "cache_error": error,
        "avg_bits_per_kv_token": _of_examples(examples, "bits"),
        "peak_kv_memory_mb": max(example.peak_bytes for example in examples) / 2**20,
        "prefill_latency_ms": 1000 * _mean(example.prefill_seconds for example in examples),
        "decode_tokens_per_s": len(steps) / seconds,
        "calibration_cost_s": sum(example.calibration_seconds for example in examples),
        "rep": rep,
        "kl_nats": _mean(step.kl_nats for step in steps),
        "avg_bits_with_meta": _of_examples(examples, "bits_with_meta"),
        "ref_bits_4096": reference_bits,
        "over_budget": float(reference_bits > budget_bits + OVER_BUDGET_BITS),
        "budget_clamps": float(sum(step.num_clamped for step in steps)),
        "num_steps": float(len(steps)),
    }


def _of_examples(examples: Sequence[ExampleResult], field: str) -> float:
    """Mean of a field of tensors over tensors, then steps, then examples that took one."""
    return _mean(
        _mean(_mean(getattr(tensor, field) for tensor in step.tensors) for step in each.steps)
        for each in examples
        if each.steps
    )


def _mean(values: Any) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def metrics_line(metrics: dict[str, float]) -> str:
    """The line: ``TEST_METRICS: key=value ...``, six decimals."""
    return " ".join([PREFIX, *(f"{name}={value:.6f}" for name, value in metrics.items())])


def parse_metrics(text: str) -> dict[str, float]:
    """Read the last line of metrics in the output of a run.

    Raises:
        RecordError: If there is none, or a required field is missing or not finite.
    """
    lines = [line for line in text.splitlines() if line.startswith(PREFIX)]
    if not lines:
        raise RecordError(f"FILE must hold a line that starts with {PREFIX}, got none")
    found = {name: _number(name, value) for name, value in _FIELD.findall(lines[-1])}
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise RecordError(f"{PREFIX} must have the field {missing[0]}, got none")
    return found


def parse_workload(text: str) -> dict[str, float]:
    """As ``parse_metrics``, with the workload behind every name: ``cache_error_needle-slice``."""
    found = parse_metrics(text)
    before = text[: text.rindex(PREFIX)]
    names = re.findall(r"^REPLAY: workload=(\S+)", before, re.MULTILINE)
    suffix = "_" + names[-1].replace("_", "-") if names else ""
    return {name + suffix: value for name, value in found.items()}


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecordError(f"{PREFIX} must have a finite number for {name}, got {text!r}")
    return value
