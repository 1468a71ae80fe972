"""``kvbits export``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def plan_path(tiny_model_dir, tmp_path_factory):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model_dir)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    CachePlan.from_pairs(config, [(8, 4), (4, 4), (4, 2)]).save(path)
    return path


def test_flags_losses_and_files_are_printed(plan_path):
    result = run("export", plan_path, "--to", "vllm")
    assert result.exit_code == 0, result.output
    assert "--kv-cache-dtype int4_per_token_head --kv-cache-dtype-skip-layers 0" in result.output
    assert "values 2 → 4 bits" in result.output
    assert "kv-cache-dtype-skip-layers:\n- '0'" in result.output


def test_files_are_written(plan_path, tmp_path):
    result = run("export", plan_path, "--to", "modelopt", "-o", tmp_path / "made")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["hf_quant_config.json", "modelopt_quant_cfg.yaml"]
    assert f"written to {tmp_path / 'made' / names[0]}" in result.output.replace("\n", "")


def test_scripts_read_json(plan_path):
    found = json.loads(run("export", plan_path, "--to", "sglang", "--json").stdout)
    assert found["arguments"] == ["--kv-cache-dtype", "fp8_e4m3"]
    assert [layer["wanted"] for layer in found["layers"]] == ["K8V4", "K4V4", "K4V2"]
    assert found["engine_bits"] == 8.0
    narrow = run("export", plan_path, "--to", "sglang", "--allow-narrower", "--json").stdout
    assert json.loads(narrow)["arguments"] == ["--kv-cache-dtype", "nvfp4"]


@pytest.mark.parametrize(
    ("to", "message"),
    [("vlm", "engine must be one of vllm"), ("kvtuner", "at most 8 bits in a KVTuner file")],
)
def test_a_refusal_is_one_line_and_nothing_is_written(tiny_model_dir, tmp_path, to, message):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model_dir)
    path = tmp_path / "plan.json"
    CachePlan.from_pairs(config, [(16, 16), (4, 4), (4, 2)]).save(path)
    result = run("export", path, "--to", to, "-o", tmp_path / "made")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "made").exists()
