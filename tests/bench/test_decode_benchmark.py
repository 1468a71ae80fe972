"""Records of whole decode steps and of process memory, on a CPU."""

from __future__ import annotations

import pytest

from kvbits.bench import decode, memory, process_memory
from kvbits.bench.workloads import Workload, parse_variant
from kvbits.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def variants(model, *names):
    return [parse_variant(name, model.config) for name in names]


def test_there_is_one_record_per_workload_and_cache(model):
    workloads = [Workload(2, 70, 6), Workload(1, 130, 6)]
    found = list(decode.measure(model, variants(model, "dynamic", "K4V2"), workloads))
    keys = [(r["batch"], r["context"], r["variant"]) for r in found]
    assert keys == [(2, 70, "dynamic"), (2, 70, "K4V2"), (1, 130, "dynamic"), (1, 130, "K4V2")]
    plan = parse_variant("K4V2", model.config).plan
    for record in found:
        assert record["step_ms"] > 0
        assert record["tokens_per_second"] == pytest.approx(
            1e3 * record["batch"] / record["step_ms"], rel=0.01
        )
        assert record["is_captured"] is False
    # The prompt is one token behind the stored ones, and the last token is never fed.
    assert found[1]["cache_bytes"] == plan.bytes(70 + 6, 2, state_bits=32)
    assert found[0]["speedup"] == found[2]["speedup"] == 1.0
    ratio = found[0]["step_ms"] / found[1]["step_ms"]
    assert found[1]["speedup"] == pytest.approx(ratio, abs=1e-3)


def test_repeats_are_summarised_by_the_run_in_the_middle(model):
    (record,) = decode.measure(model, variants(model, "K8V8"), [Workload(1, 20, 5)], repeats=3)
    low, high = record["step_ms_spread"]
    assert low <= record["step_ms"] <= high
    assert record["repeats"] == 3


def test_a_prompt_that_is_run_counts(model):
    workload = Workload(2, 40, 5)
    (record,) = decode.measure(model, variants(model, "K4V4"), [workload], is_prompted=True)
    seconds = record["prefill_seconds"] + 4 * record["step_ms"] / 1e3
    assert record["generated_per_second"] == pytest.approx(2 * 5 / seconds, rel=0.01)


def test_the_peak_of_a_process_stands_beside_the_formula(tiny_model_dir, monkeypatch):
    for name, value in {"BATCH": 2, "CHUNK": 32, "STEPS": 2}.items():
        monkeypatch.setattr(process_memory, name, value)
    for dtype in ("bfloat16", "float32"):
        record = process_memory.run(str(tiny_model_dir), "K4V2@kivi", 96, dtype)
        assert record["cache_bytes"] == record["formula_bytes"]
        assert record["context"] == 98
        assert record["effective_bits_at_context"] > record["effective_bits"]


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"K4V2: \w+"):
        next(process_memory.measure(str(tmp_path), ["K4V2"]))


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 63, 64])
def test_the_largest_batch_is_the_last_that_ran(limit, model, monkeypatch):
    tried = []

    def peak(_model, _plan, batch, _context):
        tried.append(batch)
        return 1000 + batch if batch <= limit else None

    monkeypatch.setattr(memory, "_peak_bytes", peak)
    plan = parse_variant("K4V2", model.config).plan
    free = 64 * memory._bytes(model, plan, 100)  # what 64 rows would take
    found = memory._largest(model, plan, 100, free)
    assert found == (limit, 1000 + limit if limit else 0)
    assert max(tried) <= 64
