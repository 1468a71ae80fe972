"""``kvbits replay`` and ``kvbits replay-parse`` on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.replay.metrics import REQUIRED, parse_metrics

MODEL = Path(__file__).resolve().parents[2] / "models" / "kvbits-tiny"


def run(*arguments):
    return CliRunner().invoke(app, [str(item) for item in arguments])


def replay(policy, *more):
    return run("replay", policy, "--model", MODEL, "--slice", "reasoning_slice", *more)


def test_a_run_prints_metrics_and_writes_trace_and_record(tmp_path):
    record, out = tmp_path / "records.jsonl", tmp_path / "out"
    result = replay(
        "kivi_overlap_4bit", "--max-examples", 1, "--packed", "-o", out, "--record", record
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("TEST_METRICS:") == 1
    assert "packed cache: 24 of 24 choices agree" in result.stderr
    found = parse_metrics(result.stdout)
    kept = json.loads((out / "reasoning_slice_metrics.json").read_text())
    assert kept["metrics"]["cache_error"] == pytest.approx(found["cache_error"], abs=1e-6)
    assert json.loads(record.read_text()) == kept
    trace = json.loads((out / "reasoning_slice_trace.json").read_text())
    assert trace["slice_sha256"].startswith("a5d32e21")
    (example,) = trace["examples"]
    assert len(example["plan"]) == len(example["steps"][0]["tensors"]) == 24
    assert len(example["steps"]) == 24
    (tmp_path / "log.txt").write_text(result.stdout)
    parsed = run("replay-parse", tmp_path / "log.txt")
    assert parsed.exit_code == 0
    names = {f"{name}_reasoning-slice" for name in REQUIRED}
    assert names <= set(json.loads(parsed.stdout))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    def choose_bits(self, *a): return 9", "choose_bits (layer 0, kind key) must return"),
        ("    def choose_bits(self, *a): 1 / 0", "choose_bits (layer 0, kind key) must not raise"),
        (
            "    def quantizer_family(self, *a): return 'int4'",
            "quantizer_family (layer 0, kind key)",
        ),
        (
            "    def calibration_mode(self, *a): return 'x'",
            "calibration_mode (layer all, kind both)",
        ),
    ],
)
def test_a_bad_policy_ends_with_code_2_and_no_metrics(tmp_path, line, message):
    path = tmp_path / "bad.py"
    text = "from kvbits.replay import AdaptiveQuantPolicy\nclass Bad(AdaptiveQuantPolicy):\n"
    path.write_text(f"{text}{line}\n")
    result = replay(path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"kvbits: {message}")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(tmp_path):
    result = replay(tmp_path / "none.py")
    assert result.exit_code == 2
    assert "POLICY must be an existing file" in result.stderr
    result = run("replay", "default", "--slice", "hotpot")
    assert result.exit_code == 1
    assert "--slice must be one of" in result.stderr


@pytest.mark.parametrize("text", ["", "TEST_METRICS: quality_main=1.0"])
def test_the_parser_fails_on_what_is_incomplete(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text)
    result = run("replay-parse", path)
    assert result.exit_code == 1
    assert result.stdout == ""
