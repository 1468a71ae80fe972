"""The recipe that runs kvbits-tiny through the benchmarks: its plans, a small run, its table."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from kvbits.errors import RecordError
from kvbits.evaluation.benchmarks import build_benchmark

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "kvbits-tiny"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "evaluate-tiny")
    yield importlib.import_module
    for name in ("evaluate", "table"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"context": "The sun sets in the", "target": word} for word in ("west", "east")]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "lambada_test.jsonl").write_text(text)
    (folder / "wikitext2_test.raw").write_text(" The old lamp stood near the bridge . \n" * 20)
    return folder


def test_every_plan_fits_the_bundled_model(load):
    if not MODEL.exists():
        pytest.skip("models/kvbits-tiny is not in this checkout")
    model = SimpleNamespace(config=AutoConfig.from_pretrained(MODEL))
    evaluate = load("evaluate")
    known = evaluate.plans({})
    assert len(known) == 16
    assert len({evaluate.slug(name) for name in known}) == 16
    for name, build in known.items():
        if "KVQuant" in name:  # needs the weights
            continue
        plan = build(model, [])
        if plan is not None:
            plan.check(model.config)
            bits = 4.5 if "tuned" in name else None
            assert bits is None or plan.effective_bits == pytest.approx(bits)


def test_a_run_goes_on_where_it_was_and_its_table_pairs_examples(
    load, data, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    evaluate, table = load("evaluate"), load("table")
    small = [
        evaluate.Benched(build_benchmark("wikitext2", window=64), 3),
        evaluate.Benched(build_benchmark("lambada"), 2),
        evaluate.Benched(build_benchmark("arithmetic", n=2), 2),
    ]
    monkeypatch.setattr(evaluate, "benchmarks", lambda lengths, window: small)
    out = tmp_path / "out"
    options = ["--data", str(data), "--out", str(out), "--model", str(tiny_model_dir)]
    options += ["--device", "cpu", "--only", "16 bits|per token K2V2"]
    parse = evaluate.parser().parse_args
    assert evaluate.run(parse([*options, "--minutes", "0"])) == 6
    assert evaluate.run(parse(options)) == 0
    shutil.rmtree(out / "16-bits" / "lambada")  # as if it had been killed there
    capsys.readouterr()
    assert evaluate.run(parse(options)) == 0
    assert capsys.readouterr().out.startswith("16 bits, lambada: ")
    assert evaluate.run(parse(options)) == 0
    assert capsys.readouterr().out == ""  # nothing was left to run

    full, packed = table.rows(out)
    assert (full.name, packed.name) == ("16 bits", "per token K2V2")
    assert full.cells["wikitext2"].n == 3
    assert full.cells["wikitext2"].interval == pytest.approx((0.0, 0.0))
    assert packed.cells["wikitext2"].value != full.cells["wikitext2"].value
    assert full.length_ratio == pytest.approx((1.0, 1.0, 1.0))
    text = table.markdown([full, packed])
    assert "wikitext2, perplexity (n = 3)" in text
    assert "| 16 bits | 16.00 |" in text
    assert full.flips == (0, 0)
    assert "| +0 −0 | 1.00 [1.00, 1.00] |" in text
    assert text.count("[") == 3 + 2  # of three packed scores, and of two lengths
    assert json.dumps(table.summary([full, packed]), allow_nan=False)


def test_a_table_without_full_precision_is_refused(load, tmp_path):
    with pytest.raises(RecordError, match="must hold '16-bits', got none"):
        load("table").rows(tmp_path)
