"""``kvbits bench`` on a CPU: tables, records, figures, and errors that say what to do."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.bench import process_memory
from kvbits.cli import app

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def decode(model, output, *arguments):
    return run("decode", model, "--device", "cpu", "-o", output, "--new-tokens", 5, *arguments)


def test_decode_prints_a_table_and_appends_records(tiny_model_dir, tmp_path):
    arguments = ("--plan", "dynamic", "--plan", "K4V2@kivi", "--shape", "2x70")
    for _ in range(2):
        result = decode(tiny_model_dir, tmp_path, *arguments)
        assert result.exit_code == 0, result.output
    for word in ("variant", "step ms", "K4V2@kivi", "70", "records in"):
        assert word in result.output
    first, second, *again = records(tmp_path / "decode.jsonl")
    assert len(again) == 2
    assert (first["variant"], second["variant"]) == ("dynamic", "K4V2@kivi")
    assert second["subject"] == tiny_model_dir.name
    assert second["threads"] == torch.get_num_threads()
    assert {"machine", "versions", "commit", "command", "created"} <= set(second)
    assert "decoding with 70 tokens a row" in (tmp_path / "decode.html").read_text()


def test_a_config_without_weights_is_enough(tiny_model_dir, tmp_path):
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    result = decode(folder, tmp_path, "--plan", "K8V8", "--shape", "1x20", "--prompt")
    assert result.exit_code == 0, result.output
    assert "taking random ones" in result.output
    (record,) = records(tmp_path / "decode.jsonl")
    assert record["is_prompted"] is True
    assert record["generated_per_second"] > 0


SMALL = ("--device", "cpu", "--context", 64)


def test_memory_of_a_bad_plan_starts_no_process(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(process_memory, "measure", None)
    result = run("memory", tiny_model_dir, "--plan", "K5", *SMALL, "-o", tmp_path)
    assert result.exit_code == 1
    assert "plan must be 'dynamic', 'quanto4'" in result.output


def test_memory_stands_beside_the_formula(tiny_model_dir, tmp_path, monkeypatch):
    def in_this_process(model, names, *settings):
        return (process_memory.run(model, name, *settings) for name in names)

    monkeypatch.setattr(process_memory, "BATCH", 2)
    monkeypatch.setattr(process_memory, "measure", in_this_process)
    result = run("memory", tiny_model_dir, "--plan", "K4V4", *SMALL, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    (record,) = records(tmp_path / "memory.jsonl")
    assert record["cache_bytes"] == record["formula_bytes"]
    assert record["cache_bytes"] == CachePlan.uniform(_config(tiny_model_dir), 4, 4).bytes(67, 2)


def _config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@no_gpu
def test_kernels_need_a_gpu():
    result = run("kernels")
    assert result.exit_code == 1
    assert (
        "must run on a CUDA device to time kernels, got none; kvbits bench decode" in result.output
    )


def test_a_profile_needs_a_gpu(tiny_model_dir, tmp_path):
    result = decode(tiny_model_dir, tmp_path, "--profile")
    assert result.exit_code == 1
    assert "--profile must be left out where there is no CUDA device" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "K5"), "plan must be 'dynamic', 'quanto4'"),
        (("--shape", "8"), "shape must be BATCHxCONTEXT such as 8x32768, got '8'"),
        (("--plan", "K4V4", "--impl", "triton", "--shape", "1x20"), "impl='triton' cannot run"),
    ],
)
def test_a_bad_argument_is_one_line(tiny_model_dir, tmp_path, arguments, message):
    result = decode(tiny_model_dir, tmp_path, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "decode.jsonl").exists()
