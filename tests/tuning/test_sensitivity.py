from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbits.evaluation.corpora import TokenSet
from kvbits.evaluation.divergence import measure, reference_logits
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, profile_errors, profile_kl, rounded, rounded_or_none


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def token_set(domain: str, documents: int = 2) -> TokenSet:
    ids = torch.randint(1, 257, (documents, 50), generator=torch.Generator().manual_seed(0))
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return TokenSet(domain, domain, "calibration", ids, counted)


def make_meter(model, widths):
    candidates = of_mode(model.config, "per_token", widths)
    return Meter(model, [token_set("text"), token_set("recall", 1)], candidates)


@pytest.fixture
def meter(model):
    return make_meter(model, (2,))


def test_profile_measures_every_side_alone_on_the_deployed_path(model, tmp_path):
    records = profile_kl(make_meter(model, (4, 2)), run=RunDir(tmp_path), progress=Silent())
    keys = {(r["domain"], r["layer"], r["label"]) for r in records}
    assert len(records) == len(keys) == 2 * 3 * 2 * 2
    record = next(r for r in records if (r["layer"], r["label"]) == (1, "V2"))
    plan = CachePlan.from_pairs(model.config, [(16, 16), (16, 2), (16, 16)])
    text = token_set("text")
    expected = measure(model, plan, text, reference_logits(model, text))
    assert record["kl_nats"] == rounded(expected.kl_nats)
    assert record["kl_nats"] > 0


def test_error_of_a_single_document_is_unknown_not_zero(meter, tmp_path):
    records = profile_kl(meter, run=RunDir(tmp_path), progress=Silent())
    assert {r["kl_se"] is None for r in records if r["domain"] == "recall"} == {True}
    assert {r["kl_se"] is None for r in records if r["domain"] == "text"} == {False}


def test_finished_steps_are_not_measured_again(meter, tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    first = profile_kl(meter, run=run, progress=Silent())
    lines = run.file("sensitivity.jsonl").read_text().splitlines(keepends=True)
    run.file("sensitivity.jsonl").write_text("".join(lines[:-2]))
    calls = []
    original = Meter.divergence
    monkeypatch.setattr(Meter, "divergence", lambda *args: calls.append(args) or original(*args))
    again = profile_kl(meter, run=run, progress=Silent())
    assert len(calls) == 2
    assert [r["kl_nats"] for r in again] == [r["kl_nats"] for r in first]


def test_errors_are_measured_for_every_layer_and_candidate(model, tmp_path):
    meter = make_meter(model, (4, 2))
    run = RunDir(tmp_path)
    records = profile_errors(meter, run=run, progress=Silent())
    assert [(r["layer"], r["label"]) for r in records] == [
        (layer, label)
        for layer in range(3)
        for label in ("K16V16", "K4V4", "K4V2", "K2V4", "K2V2")
    ]
    of_label = {r["label"]: r["e_o"] for r in records[:5]}
    assert of_label["K16V16"] == 0 < of_label["K4V4"] < of_label["K2V2"]
    assert profile_errors(meter, run=run, progress=Silent()) == records


def test_incomplete_errors_are_measured_afresh(meter, tmp_path):
    run = RunDir(tmp_path)
    records = profile_errors(meter, run=run, progress=Silent())
    lines = run.file("errors.jsonl").read_text().splitlines(keepends=True)
    run.file("errors.jsonl").write_text(lines[0] + lines[1][:10])
    assert profile_errors(meter, run=run, progress=Silent()) == records


def test_kl_of_a_plan_covers_every_domain(meter):
    packed, exact = (meter.document_kl((column,) * 3) for column in (1, 0))
    assert [len(domain["document_kl_nats"]) for domain in packed] == [2, 1]
    assert min(domain["kl_nats"] for domain in packed) > 0
    assert [domain["kl_nats"] for domain in exact] == [0.0, 0.0]


def test_rounding_keeps_six_digits_and_turns_nan_to_none():
    assert rounded(0.123456789) == 0.123457
    assert rounded(1.23456789e-9) == 1.23457e-9
    assert rounded_or_none(float("nan")) is None
