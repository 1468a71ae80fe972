"""``kvbits tune --rival``, and the command that a study keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from report_synthetic import write_run
from transformers import AutoConfig
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.cli.output import command_line
from kvbits.plan import CachePlan
from kvbits.tuning import study


@pytest.fixture
def told(monkeypatch):
    """What ``study.tune`` was told besides the settings."""
    found = []

    def pretend(model, tokenizer, settings, run_dir, progress, **more):
        found.append(more)
        write_run(Path(run_dir))

    monkeypatch.setattr(study, "tune", pretend)
    return found


def test_rivals_are_read_before_the_model_and_given_to_the_study(tiny_model_dir, tmp_path, told):
    plan = CachePlan.uniform(AutoConfig.from_pretrained(tiny_model_dir), 4, 4)
    plan.save(tmp_path / "theirs.json")
    arguments = ["tune", str(tiny_model_dir), "--rival", str(tmp_path / "theirs.json")]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (given,) = told[0]["given"]
    assert (given.name, given.plan) == ("theirs", plan)


def test_a_rival_that_is_no_finished_run_is_one_line_and_nothing_is_written(
    tiny_model_dir, tmp_path, told
):
    arguments = ["tune", str(tiny_model_dir), "--rival", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "rival must be a plan file or a finished run" in result.stderr
    assert told == []
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_has_no_limit_for_the_budget_is_refused(tiny_model_dir, tmp_path, told):
    arguments = ["tune", str(tiny_model_dir), "--rival", "kvtuner", "--max-kl", "0.01"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "bits must be the budget where kvtuner is a rival" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_is_kept_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kvbits", "tune", "my model", "--bits", "4"])
    assert command_line() == "kvbits tune 'my model' --bits 4"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    assert command_line() is None
