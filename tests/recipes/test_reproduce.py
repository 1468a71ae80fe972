"""The recipes of published tables: the numbers they carry, and dry runs of their rows."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest

from kvbits.methods.kvtuner import presets

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "reproduce"
if not (RECIPES.parents[1] / "models" / "kvbits-tiny").exists():
    pytest.skip("models/kvbits-tiny is not in this checkout", allow_module_level=True)
TABLES = ("kvtuner_table5", "kvtuner_table8", "kvquant_wikitext2", "kivi_longbench")


@pytest.fixture
def load(monkeypatch):
    """Import a script of the recipe as it imports the others: by name."""
    monkeypatch.syspath_prepend(RECIPES)
    yield importlib.import_module
    for name in ("reproduce", *TABLES):
        sys.modules.pop(name, None)


def dry_run(load, name, out, *options):
    module = load(name)
    make = getattr(module, "options", None) or (lambda: load("reproduce").parse(""))
    return module.main(make().parse_args(["--dry-run", "--out", str(out), *options]))


@pytest.mark.parametrize("name", TABLES)
def test_published_numbers_are_of_the_tables_columns_and_have_a_source(name, load):
    table = load("reproduce").read_published(name)
    assert "arXiv" in table.citation
    for model in table.models:
        assert len({row["config"] for row in model.rows}) == len(model.rows)
        for row in model.rows:
            assert set(row["published"]) <= set(table.columns)
            assert all(math.isfinite(value) for value in row["published"].values())


@pytest.mark.parametrize(
    ("name", "rounding"), [("kvtuner_table5", 1e-4), ("kivi_longbench", 0.01)]
)
def test_published_averages_are_those_of_their_columns(name, rounding, load):
    checked = 0
    for model in load("reproduce").read_published(name).models:
        for row in model.rows:
            values = [v for column, v in row["published"].items() if column != "average"]
            if values:
                mean = sum(values) / len(values)
                assert row["published"]["average"] == pytest.approx(mean, abs=rounding)
                checked += 1
    assert checked >= 6


@pytest.mark.parametrize("name", ["kvtuner_table5", "kvtuner_table8"])
def test_kvtuners_names_give_the_mean_width_of_their_presets(name, load):
    for model in load("reproduce").read_published(name).models:
        for row in model.rows:
            found = re.search(r"C(\d\.\d\d)$", row["config"])
            if found is None:
                continue
            preset = presets()[row["plan"]["preset"]]
            assert len(preset.pairs) == model.layers
            mean = sum(map(sum, preset.pairs)) / (2 * model.layers)
            assert mean == pytest.approx(float(found[1]), abs=0.011)  # the paper cuts, not rounds
            assert ("KIVI" in row["config"]) == (preset.mode == "kivi") or name == "kvtuner_table8"


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        # scales of heads of 32 channels: 1 bit a value in either mode
        ("kvtuner_table5", ["--only", "BF16|KIVI C3.25", "--columns", "cot_4,multi_turn_4"], 4.25),
        ("kvtuner_table8", ["--only", "16 bits|C3.25", "--columns", "64x128"], 4.25),
        ("kivi_longbench", ["--only", "fp16|KIVI-2", "--columns", "hotpotqa"], 3.0),
    ],
)
def test_a_dry_run_prints_ours_beside_published_and_checks_bytes(
    name, options, bits, load, tmp_path, capsys
):
    full, packed = dry_run(load, name, tmp_path, *options)
    printed = capsys.readouterr().out
    assert "Dry run on a tiny random model: our numbers mean nothing." in printed
    assert (full["effective_bits"], packed["effective_bits"]) == (16.0, bits)
    assert packed["cache_bytes"] < full["cache_bytes"]
    columns = set(full["ours"])
    assert columns
    assert all(math.isfinite(value) for value in packed["ours"].values())
    assert all(f"({packed['published'][column]:.4g})" in printed for column in columns)
    kept = json.loads(next(tmp_path.rglob("table.json")).read_text())
    assert kept["is_dry_run"]
    assert kept["rows"] == [full, packed]


def test_a_second_run_reads_what_the_first_found(load, tmp_path, monkeypatch):
    """Calibration reads another file, which is no part of what is measured on the first one."""
    options = ["--only", "fp16|nuq3-1%"]
    first = dry_run(load, "kvquant_wikitext2", tmp_path, *options)
    # 24 bits for each of two outliers of 32 channels, and a range of every value token
    assert [row["effective_bits"] for row in first] == [16.0, 5.0]
    monkeypatch.setattr(
        "kvbits.evaluation.benchmarks.scored.run_benchmark", lambda *a, **k: pytest.fail("ran")
    )
    assert dry_run(load, "kvquant_wikitext2", tmp_path, *options) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_first_model_runs(name, load, tmp_path):
    columns = {  # of which the others take as long again and ask for nothing else
        "kvtuner_table5": ("--columns", "cot_16,multi_turn_16"),
        "kivi_longbench": ("--columns", "qasper,trec,repobench-p,passage_retrieval_en"),
    }
    found = dry_run(load, name, tmp_path, *columns.get(name, ()))
    assert len(found) == len(load("reproduce").read_published(name).models[0].rows)


def test_a_model_of_no_table_is_refused(load):
    table = load("reproduce").read_published("kivi_longbench")
    assert table.model("runs/LongChat-7b-v1.5-32k/").family == "llama"
    with pytest.raises(SystemExit, match="MODEL must be among lmsys/longchat"):
        table.model("some/other")


def test_without_model_and_dry_run_nothing_starts(load, tmp_path):
    module = load("kvquant_wikitext2")
    arguments = load("reproduce").parse("").parse_args(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="MODEL must be given, got none; or pass --dry-run"):
        module.main(arguments)
