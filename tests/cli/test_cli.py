"""The command line, run in process on a tiny random model."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
from report_synthetic import write_run
from typer.testing import CliRunner, Result

import kvbits
from kvbits import CachePlan
from kvbits.cli import app
from kvbits.cli.options import parse_size
from kvbits.memory import MOST_TOKENS, largest_fitting


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(item) for item in arguments])


def one_line(result: Result) -> str:
    """Return the only line of an error, which must be on stderr."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvbits: ")
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def plan_path(tiny_model_dir, tmp_path_factory) -> Path:
    from transformers import AutoConfig

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    CachePlan.uniform(AutoConfig.from_pretrained(tiny_model_dir), 4, 2).save(path)
    return path


@pytest.fixture
def text_path(tmp_path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("Every cached token is stored once and never encoded again. " * 20)
    return path


def test_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"kvbits {kvbits.__version__}"


def test_every_command_has_help():
    for name in ("inspect", "tune", "generate", "evaluate", "report", "compare"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert name in result.output


# ----- inspect


def test_inspect_shows_layers_and_costs(tiny_model_dir):
    result = run("inspect", tiny_model_dir)
    assert result.exit_code == 0, result.output
    assert "0-2" in result.output
    assert "full_attention" in result.output
    assert "K4V2" in result.output


def test_inspect_shows_how_layers_run_on_a_gpu(tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 1, "architectures": ["x"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(run("inspect", tmp_path, "--context", 4096, "--json").stdout)["kernels"]
    assert found[-1]["plan"] == "K2V2"
    assert found[-1]["layers"] == "0-1"
    assert found[-1]["choice"].startswith("int8, 64-token tiles")
    config["head_dim"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "reference: head_dim must be one of" in run("inspect", tmp_path).output


def test_inspect_json_agrees_with_the_plan(tiny_model_dir, plan_path):
    result = run(
        "inspect",
        tiny_model_dir,
        "--plan",
        plan_path,
        "--memory",
        "1MB",
        "--context",
        256,
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    plan = CachePlan.load(plan_path)
    offer = found["plans"][-1]
    assert offer["name"] == "plan.json"
    assert offer["effective_bits"] == plan.effective_bits
    assert offer["bytes_at_context"] == plan.bytes(256)
    assert plan.bytes(offer["max_context"]) <= 1_000_000 < plan.bytes(offer["max_context"] + 1)
    assert plan.bytes(256, offer["max_batch"]) <= 1_000_000
    assert plan.bytes(256, offer["max_batch"] + 1) > 1_000_000
    assert len(found["layers"]) == 3


def test_fewer_bits_buy_more_context(tiny_model_dir):
    result = run("inspect", tiny_model_dir, "--memory", "4MB", "--json")
    fits = [offer["max_context"] for offer in json.loads(result.stdout)["plans"]]
    assert fits == sorted(fits)
    assert fits[-1] > 4 * fits[0]


@pytest.mark.parametrize("limit", [0, 1, 2, 63, 64, 65, 1000])
def test_largest_finds_the_last_that_fits(limit):
    assert largest_fitting(lambda number: number <= limit) == limit


def test_largest_stops_where_nothing_grows():
    assert largest_fitting(lambda number: True) >= MOST_TOKENS // 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100), ("8g", 8 * 10**9)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


# ----- generate


def test_generate_on_a_plan_accounts_for_the_cache(tiny_model_dir, plan_path):
    result = run(
        "generate", tiny_model_dir, "--plan", plan_path, "--prompt", "hello", "--max-new-tokens", 8
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("hello")
    assert "times smaller than" in result.stderr
    assert "effective bits at this length" in result.stderr


def test_generate_is_the_same_with_the_same_seed(tiny_model_dir):
    arguments = ("generate", tiny_model_dir, "--prompt", "a", "--temperature", 1.5, "--seed", 3)
    first, second = (
        run(*arguments, "--max-new-tokens", 12),
        run(*arguments, "--max-new-tokens", 12),
    )
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout


def test_generate_at_16_bits_equals_no_plan(tiny_model_dir, tmp_path):
    from transformers import AutoConfig

    path = tmp_path / "exact.json"
    CachePlan.uniform(AutoConfig.from_pretrained(tiny_model_dir), 16, 16).save(path)
    arguments = ("generate", tiny_model_dir, "--prompt", "abc", "--max-new-tokens", 12)
    packed, stock = run(*arguments, "--plan", path), run(*arguments)
    assert packed.exit_code == 0, packed.output
    assert packed.stdout == stock.stdout


def test_generate_ends_at_a_stop_token(tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    arguments = ("--prompt", "abc", "--max-new-tokens", 20)
    first = json.loads((model / "generation_config.json").read_text())
    stops = list(range(257))
    (model / "generation_config.json").write_text(json.dumps(first | {"eos_token_id": stops}))
    assert "1 tokens in" in run("generate", model, *arguments).output
    assert "20 tokens in" in run("generate", tiny_model_dir, *arguments).output


def test_generate_refuses_an_empty_prompt(tiny_model_dir):
    result = run("generate", tiny_model_dir, "--prompt", "")
    assert result.exit_code == 1
    assert "--prompt must hold text" in one_line(result)


def test_generate_refuses_chat_without_a_template(tiny_model_dir):
    result = run("generate", tiny_model_dir, "--prompt", "x", "--chat")
    assert result.exit_code == 1
    assert "--chat must be used with a chat model" in one_line(result)


# ----- evaluate


def test_evaluate_prints_and_records(tiny_model_dir, plan_path, text_path, tmp_path):
    records = tmp_path / "records.jsonl"
    result = run(
        "evaluate", tiny_model_dir, "--plan", plan_path, "--text", text_path,
        "--window-tokens", 64, "--windows", 3, "-o", records, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)["records"]
    assert record["kind"] == "divergence"
    assert record["value"] > 0
    assert record["n"] == 3
    assert json.loads(records.read_text()) == record


def test_evaluate_sees_that_two_bits_are_worse_than_eight(tiny_model_dir, text_path):
    """A single forward would show no difference: the cache has to be in the path."""
    found = []
    for bits in (8, 2):
        result = run(
            "evaluate", tiny_model_dir, "--key-bits", bits, "--value-bits", bits,
            "--text", text_path, "--window-tokens", 64, "--windows", 2, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["records"][0]["value"])
    assert found[1] > 10 * found[0] > 0


def test_evaluate_reads_each_file_of_a_folder(tiny_model_dir, text_path):
    (text_path.parent / "other.txt").write_text("Another text of the same folder. " * 10)
    result = run("evaluate", tiny_model_dir, "--data", text_path.parent, "--json")
    assert result.exit_code == 0, result.output
    kinds = [(r["kind"], r["data"]) for r in json.loads(result.stdout)["records"]]
    assert kinds == [("perplexity", "notes"), ("perplexity", "other")]


def test_evaluate_compares_tasks_in_pairs(tiny_model_dir, plan_path, monkeypatch):
    from kvbits.evaluation import tasks

    class Echo:
        """One short problem, so that a model of 512 positions can be asked."""

        name, max_new_tokens, stop = "echo", 4, "\n"

        def generate(self, n, *, seed, split):
            example = tasks.Example(prompt="say a:", answer="a", completion=" a\n", task="echo")
            return [example] * n

        def is_correct(self, completion, example):
            return completion.strip() == example.answer

    monkeypatch.setitem(tasks.TASKS, "echo", Echo)
    result = run("evaluate", tiny_model_dir, "--plan", plan_path, "--task", "echo", "-n", 4)
    assert result.exit_code == 0, result.output
    assert "difference, points" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key-bits", 4], "--key-bits and --value-bits must be given together"),
        (["--task", "chess"], "--task must be among arithmetic, .* got 'chess'"),
        (["--key-bits", 5, "--value-bits", 4], "key_bits must be one of"),
        (["--data", "no-such-folder"], "--data must be a folder with"),
        (["--text", "no-such-file.txt"], "path must be an existing file"),
    ],
)
def test_evaluate_refuses_contradictions(tiny_model_dir, arguments, message):
    result = run("evaluate", tiny_model_dir, *arguments)
    assert result.exit_code == 1
    line = one_line(result)
    assert re.search(message, line), line


# ----- report


def test_report_writes_the_page(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "report.html")
    assert "none chosen yet" in (tmp_path / "report.html").read_text()


def test_report_of_no_run_fails(tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert "must hold study.json" in one_line(result)


# ----- failing


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["inspect"],
        ["inspect", "m", "--no-such-option"],
        ["inspect", "m", "--memory", "lots"],
        ["tune", "m", "--bits", "99"],
        ["tune", "m", "--mode", "none"],
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert one_line(result)


def test_an_unknown_folder_is_named():
    result = run("inspect", "./no/such/model")
    assert result.exit_code == 1
    assert "MODEL must be an existing model folder or a hub id" in one_line(result)


def test_a_folder_without_config_is_named(tmp_path):
    result = run("generate", tmp_path, "--prompt", "x")
    assert result.exit_code == 1
    assert "must be a folder with config.json" in one_line(result)


def test_offline_nothing_is_fetched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("inspect", "nobody/nothing")
    assert result.exit_code == 1
    assert "while HF_HUB_OFFLINE is set" in one_line(result)


def test_a_download_is_announced(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    result = run("inspect", "nobody/nothing")
    assert result.exit_code == 1
    assert "fetching it from the Hugging Face hub" in result.stderr.splitlines()[0]


def test_a_missing_device_is_one_line(tiny_model_dir):
    result = run("generate", tiny_model_dir, "--prompt", "x", "--device", "abacus")
    assert result.exit_code == 1
    assert "device must be one torch can use here, got 'abacus'" in one_line(result)


def test_a_plan_for_another_model_is_refused(tiny_model_dir, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    path = tmp_path / "other.json"
    CachePlan.uniform(config, 4, 4).save(path)
    result = run("evaluate", tiny_model_dir, "--plan", path)
    assert result.exit_code == 1
    assert one_line(result)


def test_verbose_adds_the_traceback(tmp_path):
    result = run("report", tmp_path, "--verbose")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("kvbits: run directory must hold study.json")


def test_tune_prints_tables_files_and_the_next_command(tiny_model_dir, tmp_path, monkeypatch):
    from kvbits.tuning import study

    asked = []

    def pretend(model, tokenizer, settings, run_dir, progress, **_):
        asked.append(settings)
        progress.start("pretending", 1)
        progress.advance()
        progress.finish()
        write_run(Path(run_dir))

    monkeypatch.setattr(study, "tune", pretend)
    arguments = ("--bits", 4.5, "--mode", "kivi", "--task", "arithmetic,passkey", "-n", 7)
    more = ("--widths", "4,3", "-o", tmp_path / "run")
    result = run("tune", tiny_model_dir, *arguments, *more)
    assert result.exit_code == 0, result.output
    (settings,) = asked
    assert (settings.bits, settings.mode, settings.task_n) == (4.5, "kivi", 7)
    assert settings.widths == (4, 3)
    assert settings.tasks == ("arithmetic", "passkey")
    assert "* exact-" in result.stdout
    assert (tmp_path / "run" / "report.html").exists()
    page, use = result.stdout.splitlines()[-2:]
    assert page.split() == ["page", str(tmp_path / "run" / "report.html")]
    assert f"kvbits generate {tiny_model_dir} --plan {tmp_path / 'run' / 'plan.json'}" in use


def test_tune_without_options_uses_the_settings_own_defaults(
    tiny_model_dir, tmp_path, monkeypatch
):
    from kvbits.tuning import study
    from kvbits.tuning.settings import TuneSettings

    asked = []
    monkeypatch.setattr(
        study, "tune", lambda model, tokenizer, settings, *_, **__: asked.append(settings)
    )
    run("tune", tiny_model_dir, "-o", tmp_path)
    assert asked == [TuneSettings()]


def test_tune_takes_budgets_in_bytes_and_published_searches(tiny_model_dir, tmp_path, monkeypatch):
    from kvbits.tuning import study
    from kvbits.tuning.settings import RECIPES, TuneSettings

    asked = []
    monkeypatch.setattr(
        study, "tune", lambda model, tokenizer, settings, *_, **__: asked.append(settings)
    )
    run("tune", tiny_model_dir, "--recipe", "kvtuner", "--mode", "kivi", "-o", tmp_path)
    arguments = ("--memory", "24GB", "--context", 131072, "--batch", 4, "--strategy", "exact+")
    more = ("--objective", "sum", "--weights", "2,1,0.5", "--granularity", "layer")
    run("tune", tiny_model_dir, *arguments, *more, "-o", tmp_path)
    assert asked == [
        TuneSettings(mode="kivi", **RECIPES["kvtuner"]),
        TuneSettings(
            memory=24 * 10**9, context=131072, batch=4, strategy="exact+", objective="sum",
            domain_weights=(2, 1, 0.5), granularity="layer",
        ),
    ]  # fmt: skip


def test_choices_of_the_command_line_are_those_of_the_settings():
    from kvbits.tuning.settings import RECIPES, TuneSettings

    command = importlib.import_module("kvbits.cli.tune")  # the package has its function
    fields = TuneSettings.model_fields
    for name in ("strategy", "granularity", "sensitivity", "objective", "drop_rule", "count"):
        choices = getattr(command, name.title().replace("_", ""))
        assert {choice.value for choice in choices} == set(get_args(fields[name].annotation))
    assert {choice.value for choice in command.Recipe} == set(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chess"], "tasks must be among arithmetic"),
        (["--widths", "5"], "widths must be among"),
        (["--widths", "few"], "--widths must be numbers such as 8,4,2"),
        (["--weights", "1,2"], "domain_weights must be given with objective sum"),
        (["--memory", "1GB"], "context must be given with memory"),
        (["--bits", "4", "--max-kl", "0.1"], "bits must be the only budget, got max_kl too"),
        (["--recipe", "kvtuner", "--trials", "9"], "--trials must not be given with --recipe"),
        (["--candidates", "awq"], "candidates must be among per-token"),
        (["--candidates", "kvarn", "--mode", "kivi"], "mode must not be given together with"),
        (["--text", "a.txt"], "text and heldout_text must be given together"),
        (["--max-drop", "1"], "--max-drop must be a share such as 1% or 0.01, got '1'"),
        (["--max-drop", "1%", "-n", "32"], "task_n must be at least 100 to tell a drop of 1 %"),
        (["--drop-rule", "interval"], "drop_rule must be given with max_drop"),
        (["--max-drop", "1%", "--drop-rule", "interval"], "task_n must be at least 276"),
    ],
)
def test_tune_settings_that_cannot_be_are_refused(tiny_model_dir, tmp_path, arguments, message):
    result = run("tune", tiny_model_dir, *arguments, "-o", tmp_path / "run")
    assert result.exit_code == 1
    assert message in one_line(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tune_then_generate_for_real(tiny_model_dir, text_path, tmp_path):
    """The whole way on a random model, and again: a finished run changes nothing."""
    other = tmp_path / "other.txt"
    other.write_text("What was held out is measured once, after the search has chosen. " * 60)
    text_path.write_text(text_path.read_text() * 4)
    arguments = (
        "tune", tiny_model_dir, "--bits", 5, "--text", text_path, "--heldout-text", other,
        "-n", 2, "-o", tmp_path / "run",
    )  # fmt: skip
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    assert CachePlan.load(tmp_path / "run" / "plan.json").effective_bits <= 5
    again = run(*arguments)
    assert again.stdout == first.stdout
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan
    used = run(
        "generate", tiny_model_dir, "--plan", tmp_path / "run" / "plan.json", "--prompt", "a"
    )
    assert used.exit_code == 0, used.output


def test_interrupting_the_tuner_says_how_to_go_on(tiny_model_dir, tmp_path, monkeypatch):
    from kvbits.tuning import study

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "tune", interrupted)
    result = run("tune", tiny_model_dir, "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert str(tmp_path / "run") in result.stderr
    assert "the same command continues" in result.stderr
