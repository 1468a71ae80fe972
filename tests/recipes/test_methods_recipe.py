"""The methods recipe: which plans it measures, and its table of records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from kvbits.methods import METHODS, build_method

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name):
    path = RECIPES / "methods" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"methods_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(subject, bits, kl):
    domain = {"kl_nats": kl, "kl_se": kl / 10, "flips": 0.01, "perplexity": 5.0}
    return {"subject": subject, "effective_bits": bits, "effective_bits_at_context": bits} | {
        "context": 100,
        **dict.fromkeys(("text", "reasoning", "recall"), domain),
    }


def test_every_method_is_measured_at_every_width_it_has():
    subjects = list(load("measure").subjects())
    assert {each.method for each in subjects} == set(METHODS) - {"kvtuner"}
    assert len({each.name for each in subjects}) == len(subjects)
    for each in subjects:
        build_method(each.method, **each.settings)


def test_the_pareto_set_is_what_nothing_beats():
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
        "methods/results/kvbits-tiny-fitted",
        "ablation-kvquant/results/kvbits-tiny",
    ],
)
def test_committed_records_have_all_the_table_needs(name):
    path = RECIPES / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({each["subject"] for each in records}) == len(records)
    assert load("figure").table(records).count("\n") == len(records) + 1
