"""``kvbits methods`` and ``kvbits calibrate``."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
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
    for extra in ("quanto", "hqq"):
        assert f"kvbits[{extra}]" in result.output


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
        (
            ("--method", "per-token", "--set", "group_size=24"),
            "group_size must divide head_dim=32, got 24",
        ),
    ],
)
def test_a_bad_argument_is_one_line_and_nothing_is_written(
    tiny_model_dir, tmp_path, arguments, message
):
    result = run("calibrate", tiny_model_dir, *arguments, "-o", tmp_path / "made")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "made").exists()


ON_TEXT = ("--documents", "2", "--device", "cpu", "--set", "sink_tokens=2")


@pytest.mark.parametrize(("method", "arrays"), [("skvq", 6), ("oscar", 6), ("kvquant", 6)])
def test_what_was_fitted_lies_beside_the_plan(tiny_model_dir, tmp_path, method, arrays):
    (tmp_path / "text.txt").write_text("kvbits fits. " * 400)
    made = tmp_path / "made"
    result = run(
        *("calibrate", tiny_model_dir, "--method", method, *ON_TEXT, "-o", made),
        *("--text", tmp_path / "text.txt"),
    )
    assert result.exit_code == 0, result.output
    plan = CachePlan.load(made / "plan.json")
    assert len(plan.arrays) == arrays  # two for each of three layers
    assert len(list(made.iterdir())) == 2
    assert run("inspect", tiny_model_dir, "--plan", made / "plan.json").exit_code == 0


@pytest.mark.parametrize("method", ["skvq", "oscar", "kvquant", "qaq"])
@pytest.mark.parametrize(
    ("layer", "projection", "message"),
    [
        (1, "v_proj", "value_states must be finite, got NaN or infinity in layer 1"),
        (2, "q_proj", "(queries|logits) must be finite, got NaN or infinity"),  # the last layer
    ],
)
def test_what_is_not_finite_writes_nothing(
    tiny_model_dir, tmp_path, method, layer, projection, message
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    attention = model.model.layers[layer].self_attn
    getattr(attention, projection).weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    for path in tiny_model_dir.glob("token*"):
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    result = run(
        *("calibrate", tmp_path / "broken", "--method", method, *ON_TEXT),
        *("-o", tmp_path / "made"),
    )
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split()))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xa5\x00", "path must be text in UTF-8, got .* with other bytes at 0"),
        (b"", "path must hold at least one document"),
        (b"x", "text must fill 4 windows of at most 512 tokens, got 1 .*; give more text"),
    ],
)
def test_text_that_is_none_or_too_short_writes_nothing(tiny_model_dir, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    result = run(
        *("calibrate", tiny_model_dir, "--method", "skvq", "--text", tmp_path / "text.txt"),
        *("--device", "cpu", "-o", tmp_path / "made"),
    )
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split()))
    assert not (tmp_path / "made").exists()


def test_a_few_documents_need_little_text(tiny_model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("kvbits fits. " * 30)
    result = run(
        *("calibrate", tiny_model_dir, "--method", "skvq", "--text", tmp_path / "text.txt"),
        *("--documents", "1", "--device", "cpu", "-o", tmp_path / "made"),
    )
    assert result.exit_code == 0, result.output


def test_a_file_in_place_of_the_folder_is_refused_before_any_work(tiny_model_dir, tmp_path):
    (tmp_path / "made").write_text("mine")
    result = run(
        *("calibrate", tiny_model_dir, "--method", "kvquant", "-o", tmp_path / "made"),
    )
    assert result.exit_code == 1
    assert "--output must be a folder, got the file" in " ".join(result.output.split())
    assert "calibrating" not in result.output
    assert (tmp_path / "made").read_text() == "mine"


def test_a_calibrated_plan_is_measured_from_its_files(tiny_model_dir, tmp_path):
    """What the README shows: calibrate, copy the folder, evaluate."""
    made = run(
        *("calibrate", tiny_model_dir, "--method", "kvquant", "--bits", "3"),
        *("--documents", "2", "--device", "cpu", "-o", tmp_path / "made"),
    )
    assert made.exit_code == 0, made.output
    shutil.copytree(tmp_path / "made", tmp_path / "copy")
    (tmp_path / "text.txt").write_text("kvbits fits. " * 40)
    result = run(
        *("evaluate", tiny_model_dir, "--plan", tmp_path / "copy" / "plan.json", "--json"),
        *("--text", tmp_path / "text.txt", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (
        found["effective_bits"] == CachePlan.load(tmp_path / "made" / "plan.json").effective_bits
    )
    assert found["records"][0]["plan"]["method"] == "kvquant"
    assert found["records"][0]["plan"]["pairs"] == [[3, 3]] * 3


def test_too_little_text_writes_nothing(tiny_model_dir, tmp_path):
    for method in ("skvq", "oscar", "kvquant"):
        result = run(
            *("calibrate", tiny_model_dir, "--method", method, "-o", tmp_path / "made"),
            *("--documents", "1", "--set", "sink_tokens=100000", "--device", "cpu"),
        )
        assert result.exit_code == 1
        assert "calibration text must have a document of" in " ".join(result.output.split())
        assert not (tmp_path / "made").exists()
