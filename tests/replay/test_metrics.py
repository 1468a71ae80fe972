"""Metrics against numbers worked out by hand, and a parser that takes nothing less."""

from __future__ import annotations

import math

import pytest
from replay_helpers import settings

from kvbits.errors import RecordError
from kvbits.replay.harness import ExampleResult, StepResult
from kvbits.replay.metrics import (
    REQUIRED,
    metrics_line,
    parse_metrics,
    parse_workload,
    summarise,
)
from kvbits.replay.step import TensorRecord


def step(is_match, kl, bits, error, reference=4.0):
    tensor = TensorRecord((4,), bits, bits + 1, reference, error)
    other = TensorRecord((4,), bits + 2, bits + 3, reference, error / 2)
    return StepResult(1, 2, is_match, kl, 10, 3, (tensor, other))


def example(*steps, **changes):
    plain = ExampleResult("a", 9, (settings(),), steps, "", 2**21, 0.5, 2.0, 0.25)
    return plain._replace(**changes)


def test_metrics_pool_steps_but_average_bits_by_example():
    examples = [
        example(step(True, 0.0, 4.0, 0.2), step(False, 1.0, 6.0, 0.4)),
        example(step(True, 0.5, 9.0, 0.0), peak_bytes=2**20, prefill_seconds=0.1),
        example(peak_bytes=0.0),  # its first token ended the text
    ]
    found = summarise(examples, 4)
    rep = (1 + 0.5 * math.exp(-1) + 0.5 + 0.5 * math.exp(-0.5)) / 3
    error = (0.2 + 0.1 + 0.4 + 0.2 + 0 + 0) / 6
    assert tuple(found)[:9] == REQUIRED
    assert found["greedy_match_ratio"] == pytest.approx(2 / 3)
    assert found["rep"] == pytest.approx(rep)
    assert found["cache_error"] == pytest.approx(error)
    assert found["quality_main"] == pytest.approx(100 * (0.7 * rep + 0.3 / (1 + error)))
    assert found["quality_delta_vs_ref"] == pytest.approx(found["quality_main"] - 100)
    assert found["avg_bits_per_kv_token"] == pytest.approx(((5 + 7) / 2 + 10) / 2)
    assert found["avg_bits_with_meta"] == pytest.approx(((6 + 8) / 2 + 11) / 2)
    assert found["peak_kv_memory_mb"] == 2
    assert found["prefill_latency_ms"] == pytest.approx(1100 / 3)
    assert found["decode_tokens_per_s"] == pytest.approx(3 / 6)
    assert found["calibration_cost_s"] == pytest.approx(0.75)
    assert found["budget_clamps"] == 9


@pytest.mark.parametrize(("reference", "is_over"), [(4.5, 0), (4.5001, 1)])
def test_half_a_bit_above_the_budget_is_still_within(reference, is_over):
    assert summarise([example(step(True, 0.0, 4.0, 0.1, reference))], 4)["over_budget"] == is_over


def test_a_run_without_a_step_fails():
    with pytest.raises(RecordError, match="examples must take at least one step"):
        summarise([example()], 4)


LINE = metrics_line(dict.fromkeys(REQUIRED, 1.25))


def test_a_line_reads_back():
    assert LINE.startswith("TEST_METRICS: quality_main=1.250000 quality_delta_vs_ref=1.250000 ")
    assert parse_metrics(f"noise\n{LINE}\nmore") == dict.fromkeys(REQUIRED, 1.25)


def test_the_last_line_counts_with_its_workload():
    text = (
        f"REPLAY: workload=needle_slice policy=x\n{LINE}\nREPLAY: workload=reasoning_slice\n"
        f"{LINE.replace('cache_error=1.25', 'cache_error=7.5')}\n"
    )
    found = parse_workload(text)
    assert found["cache_error_reasoning-slice"] == 7.5
    assert set(found) == {f"{name}_reasoning-slice" for name in REQUIRED}


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, "nan", "inf", "-inf", "x", ""])
def test_missing_and_non_finite_fields_are_refused(name, value):
    field = f"{name}=1.250000"
    text = LINE.replace(field, "" if value is None else f"{name}={value}")
    message = f"must have the field {name}|must have a finite number for {name}"
    with pytest.raises(RecordError, match=message):
        parse_metrics(text)


def test_text_without_a_line_is_refused():
    with pytest.raises(RecordError, match="FILE must hold a line that starts with TEST_METRICS"):
        parse_metrics("quality_main=1")
