"""``kvbits score``: one command, the same options for every benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.cli.plans import Wanted, choose
from kvbits.evaluation.benchmarks import BENCHMARKS
from kvbits.plan import CachePlan

PROBLEMS = [
    {"question": f"Ann has {n} pens and buys 3. How many?", "answer": f"#### {n + 3}"}
    for n in range(6)
]
WORDS = [{"context": f"Item {n} of the list is called", "target": f"item{n}"} for n in range(5)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    files = {"gsm8k_test": PROBLEMS, "gsm8k_train": PROBLEMS, "lambada_test": WORDS}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["score", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_list_names_every_benchmark_with_its_data():
    code, out, _ = invoke("--list", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == set(BENCHMARKS)
    assert rows["gsm8k"]["files"][0]["name"] == "gsm8k_test.jsonl"
    code, out, _ = invoke("--list")
    assert code == 0
    assert "lambada_test.jsonl" in out
    assert "and 20 more" in out  # LongBench


def test_a_run_is_kept_resumed_and_compared(tiny_model_dir, data, tmp_path):
    full, packed = tmp_path / "full", tmp_path / "packed"
    common = ["gsm8k", tiny_model_dir, "--data", data, "--shots", 2, "--batch-size", 3]
    common += ["--set", "max_new_tokens=8", "--limit", 4]
    code, out, err = invoke(*common, "-o", full)
    assert code == 0, err
    assert "full precision" in out
    assert str(full) in out
    found = json.loads((full / "gsm8k.results.json").read_text())
    assert found["n-samples"]["gsm8k"]["effective"] == 4
    assert found["settings"]["shots"] == 2
    assert set(found["settings"]["data"]) == {"gsm8k_test.jsonl", "gsm8k_train.jsonl"}
    assert set(found["versions"]) >= {"kvbits", "torch", "transformers", "device", "dtype"}
    assert len((full / "gsm8k.samples.jsonl").read_text().splitlines()) == 4

    before = (full / "gsm8k.results.json").stat().st_mtime_ns
    assert invoke(*common, "-o", full)[0] == 0
    assert (full / "gsm8k.results.json").stat().st_mtime_ns == before  # read, not run again

    two_bits = ["--key-bits", 2, "--value-bits", 2, "--residual", 4, "--per-channel-keys"]
    code, _, err = invoke(*common, *two_bits, "-o", full)
    assert code == 1
    assert "must be a new folder or that of the same run" in err
    assert invoke(*common, *two_bits, "--quantize-prefill", "-o", packed)[0] == 0
    result = CliRunner().invoke(app, ["compare-evals", str(full), str(packed), "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {(row["task"], row["metric"], row["n"]) for row in rows} == {
        ("gsm8k", "acc", 4),
        ("gsm8k", "strict", 4),
    }


def test_changed_data_is_another_run(tiny_model_dir, data, tmp_path):
    arguments = ["lambada", tiny_model_dir, "--data", data, "-o", tmp_path / "run"]
    assert invoke(*arguments)[0] == 0
    (data / "lambada_test.jsonl").write_text(json.dumps(WORDS[0]) + "\n")
    code, _, err = invoke(*arguments)
    assert code == 1
    assert "another settings" in err


def test_likelihoods_depend_on_the_bits_and_are_printed_as_json(tiny_model_dir, data):
    values = []
    for options in ([], ["--key-bits", 16, "--value-bits", 16], ["--method", "kivi"]):
        extra = ["--residual", 0] if "kivi" in options else []
        code, out, err = invoke(
            "lambada", tiny_model_dir, "--data", data, "--json", *options, *extra
        )
        assert code == 0, err
        values.append(json.loads(out)["results"]["lambada"]["log-likelihood (word),none"])
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm8k"], "BENCHMARK and MODEL must be given"),
        (["gsm9k", "{model}"], "benchmark must be one of gsm8k"),
        (["gsm8k", "{model}", "--set", "shots=3"], "shots"),
        (["gsm8k", "{model}", "--multi-turn"], "--multi-turn must be given with --chat-template"),
        (["gsm8k", "{model}", "--chat-template"], "--chat-template must be given for a tokenizer"),
        (["lambada", "{model}", "--shots", "1"], "--shots must be 0 for lambada, got 1"),
        (["blimp", "no-such-model"], "--data must hold blimp_100.jsonl"),
        (["mmlu", "no-such-model"], "--data must hold mmlu_test.jsonl"),
        (["humaneval", "{model}"], "--output must be given for humaneval"),
        (
            ["lambada", "{model}", "--execute-in", "docker:python:3.12"],
            "--execute-in must be given for a benchmark whose answers are programs",
        ),
        (["gsm8k", "{model}", "--shots", "2"], "at most 0 tokens to leave 512"),
    ],
)
def test_wrong_use_is_one_sentence(tiny_model_dir, data, arguments, message):
    given = [each.format(model=tiny_model_dir) for each in arguments]
    code, _, err = invoke(*given, "--data", data)
    assert code == 1
    # the progress bar may have begun
    line = next(line for line in err.splitlines() if line.startswith("kvbits:"))
    assert message in line


def config(tiny_model_dir):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(tiny_model_dir)


def test_options_are_those_of_the_modes_and_methods(tiny_model_dir, tmp_path):
    made = config(tiny_model_dir)
    assert choose(made, Wanted()) is None
    plain = choose(made, Wanted(key_bits=4, value_bits=2))
    assert plain == CachePlan.uniform(made, 4, 2)
    wanted = Wanted(
        key_bits=4,
        value_bits=2,
        symmetric=True,
        residual_length=32,
        group_size=16,
        per_channel_keys=True,
    )
    assert choose(made, wanted) == CachePlan.uniform(
        made, 4, 2, mode="kivi", symmetric=True, residual_length=32, group_size=16
    )
    kivi = choose(made, Wanted(method="kivi", key_bits=4, value_bits=4, residual_length=64))
    assert kivi.layers[0].residual_length == 64
    plain.save(tmp_path / "plan.json")
    assert choose(made, Wanted(plan=tmp_path / "plan.json")) == plain


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(plan=Path("x"), key_bits=4), "--plan must be given alone, got --key-bits with it"),
        (
            Wanted(key_bits=4),
            "must be given together, got no --value-bits",
        ),
        (
            Wanted(residual_length=4),
            "must be given together, got no --key-bits",
        ),
        (
            Wanted(method="kivi", per_channel_keys=True),
            "--per-channel-keys or --per-token must be given without --method, got 'kivi' too",
        ),
        (Wanted(method="kvquant"), "--method must need no calibration here, got 'kvquant'"),
        (Wanted(method="kivi", symmetric=True), "symmetric"),
        (Wanted(key_bits=5, value_bits=4), "key_bits must be one of"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tiny_model_dir, wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(config(tiny_model_dir), wanted)
