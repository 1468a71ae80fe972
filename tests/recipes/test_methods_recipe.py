"""The methods recipe: which plans it measures, and its table of records."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest

from kvbits.evaluation.corpora import SetSize, default_sets
from kvbits.evaluation.tasks import Passkey
from kvbits.methods import METHODS, build_method

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def load(monkeypatch):
    """Import a script of the recipe as it imports the others: by name."""
    monkeypatch.syspath_prepend(RECIPES / "methods")
    return importlib.import_module


def record(subject, bits, kl):
    domain = {"kl_nats": kl, "kl_se": kl / 10, "flips": 0.01, "perplexity": 5.0}
    return {
        "subject": subject,
        "method": subject,
        "effective_bits": bits,
        "effective_bits_at_context": bits,
        "context": 100,
        **dict.fromkeys(("text", "reasoning", "recall"), domain),
    }


def test_every_method_is_measured_at_every_width_it_has(load):
    exact, *subjects = load("measure").subjects()
    assert exact.method == load("figure").EXACT
    assert {each.method for each in subjects} == set(METHODS) - {"kvtuner"}
    assert len({each.name for each in subjects}) == len(subjects)
    for each in subjects:
        build_method(each.method, **each.settings)


def test_the_pareto_set_is_what_nothing_beats(load):
    records = [
        record("a", 2, 0.5),
        record("b", 3, 0.1),
        record("c", 3.5, 0.2),
        record("d", 4, 0.1),
    ]
    figure = load("figure")
    assert [each["subject"] for each in figure.pareto(records)] == ["a", "b"]
    table = figure.table(records)
    assert "| **b** | 3.00 | 3.00 | 0.10000 ± 0.01000 | 1.00 | 5.000 |" in table
    assert "| c |" in table


@pytest.mark.parametrize(
    "name",
    [
        "methods/results/kvbits-tiny",
        "ablation-kvquant/results/kvbits-tiny",
    ],
)
def test_committed_records_have_all_the_table_needs(name, load):
    records = load("figure").read_records(RECIPES / f"{name}.jsonl")
    assert len({each["subject"] for each in records}) == len(records)
    assert load("figure").table(records).count("\n") == len(records) + 1


def test_the_table_of_the_readme_is_that_of_the_records(load):
    figure = load("figure")
    records = figure.read_records(RECIPES / "methods/results/kvbits-tiny.jsonl")
    assert figure.table(records) in (RECIPES / "methods/README.md").read_text()


def test_a_table_takes_the_place_of_the_one_before(load, tmp_path):
    figure, readme = load("figure"), tmp_path / "README.md"
    readme.write_text(f"before\n{figure.MARKS[0]}old\n{figure.MARKS[1]}after\n")
    figure.put("| new |", readme)
    assert readme.read_text() == f"before\n{figure.MARKS[0]}| new |\n{figure.MARKS[1]}after\n"
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="must hold <!-- table --> and <!-- end of table -->"):
        figure.put("| new |", readme)


def test_a_row_is_named_by_its_widths_and_other_settings(load):
    settings = {"key_bits": 2, "value_bits": 1.5, "reorder": "none"}
    record = {"method": "skvq", "settings": settings}
    assert load("figure").title(record) == "skvq K2V1.5 reorder=none"


def test_rows_and_columns_are_chosen(load, capsys, tmp_path):
    measure = load("measure")
    rows = [each for each in measure.subjects() if measure.matches(each, "int8,qaq level*")]
    assert [each.name for each in rows] == ["int8", "qaq level=head", "qaq level=layer"]
    options = ["--out", str(tmp_path / "none"), "--problems", "9", "--list", "--columns"]
    measure.run(measure.parse().parse_args([*options, "arithmetic,passkey"]), rows[:2])
    printed = capsys.readouterr().out
    assert printed == "int8: passkey, arithmetic\nqaq level=head: passkey, arithmetic\n"
    with pytest.raises(SystemExit):
        measure.parse().parse_args([*options, "arithmetics"])
    assert "must be some of divergence, passkey, key_value, arithmetic" in capsys.readouterr().err


def test_the_cpu_subset_is_part_of_all_that_is_measured(load):
    measure = load("measure")
    assert set(map(str, measure.CPU_SUBSET)) < set(map(str, measure.subjects()))


def solved(accuracy, n):
    return {"arithmetic": {"accuracy": accuracy, "standard_error": 0.021, "n": n}}


def test_accuracies_join_their_plan_and_print_their_n(load, tmp_path):
    figure, path = load("figure"), tmp_path / "records.jsonl"
    lines = [
        record("a", 2, 0.5),
        record("b", 3, 0.1),
        {"subject": "a", "accuracy": solved(0.9, 200)},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = figure.read_records(path)
    assert [each["subject"] for each in records] == ["a", "b"]
    header, _, first, second = figure.table(records).splitlines()
    assert header.endswith("| arithmetic, % (n = 200) |")
    assert first.endswith("| 90.0 ± 2.1 |")
    assert second.endswith("|  |")
    mixed = [records[0], record("b", 3, 0.1) | {"accuracy": solved(0.5, 50)}]
    with pytest.raises(ValueError, match="n of arithmetic must be the same in all records"):
        figure.table(mixed)


def test_a_run_adds_what_is_missing(load, tiny_model_dir, tmp_path, monkeypatch):
    measure = load("measure")
    monkeypatch.setattr(measure, "TASKS", (Passkey(length=64),))
    size = SetSize(1, 40, 1, 2, 40)
    monkeypatch.setattr(measure, "default_sets", partial(default_sets, size=size))
    out = tmp_path / "out.jsonl"
    chosen = [measure.Subject("16 bits", {}), measure.Subject("int8", {})]

    def run(*options):
        options = ("--model", str(tiny_model_dir), "--out", str(out), *options)
        measure.run(
            measure.parse().parse_args(["--documents", "1", "--tokens", "40", *options]), chosen
        )
        return [json.loads(line) for line in out.read_text().splitlines()]

    exact, packed = run()
    assert exact["text"]["kl_nats"] == 0 < packed["text"]["kl_nats"]
    assert (exact["effective_bits"], packed["effective_bits"]) == (16, 8.5)
    *_, first, second = run("--problems", "2")
    assert [first["subject"], second["subject"]] == ["16 bits", "int8"]
    assert second["accuracy"]["passkey"]["n"] == 2
    assert len(run("--problems", "2")) == 4  # nothing is missing
    with pytest.raises(SystemExit, match="--out must not hold records of other texts"):
        run("--tokens", "30")
