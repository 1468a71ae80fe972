"""``kvbits methods`` and ``kvbits calibrate``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.cli import app
from kvbits.methods import METHODS


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_methods_are_listed_with_their_sources():
    result = run("methods")
    assert result.exit_code == 0
    for name, method in METHODS.items():
        assert name in result.output
        assert all(sentence in result.output for sentence in method.differs)


def test_methods_are_listed_for_scripts():
    rows = json.loads(run("methods", "--json").output)
    assert [row["name"] for row in rows] == list(METHODS)
    assert rows[1]["settings"]["residual_length"] == 128


def test_a_plan_is_written(tiny_model_dir, tmp_path):
    result = run(
        *("calibrate", tiny_model_dir, "--method", "kivi", "--bits", "4"),
        *("--set", "sink_tokens=4", "--set", "flush=joint", "-o", tmp_path / "made"),
    )
    assert result.exit_code == 0, result.output
    plan = CachePlan.load(tmp_path / "made" / "plan.json")
    assert plan.describe() in result.output
    assert (plan.layers[0].sink_tokens, plan.layers[0].flush) == (4, "joint")
    assert plan.pairs[0] == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "kivy"), "method must be one of"),
        (("--method", "kivi", "--bits", "5"), "key_bits must be 2, 3, 4 or 8, got 5"),
        (("--method", "kivi", "--set", "sinks"), "--set must be name=value, got 'sinks'"),
        (("--method", "fp8", "--bits", "4"), "key_bits must not be given, got 4"),
    ],
)
def test_a_bad_argument_is_one_line_and_nothing_is_written(
    tiny_model_dir, tmp_path, arguments, message
):
    result = run("calibrate", tiny_model_dir, *arguments, "-o", tmp_path / "made")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "made").exists()
