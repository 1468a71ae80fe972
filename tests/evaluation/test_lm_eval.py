"""The real lm-evaluation-harness on kvbits-tiny, with task files made here."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from kvbits import CachePlan, enable
from kvbits.errors import PlanError, RecordError
from kvbits.evaluation.comparison import compare
from kvbits.evaluation.harness_run import identity, open_run, run_samples, run_task
from kvbits.evaluation.samples import from_harness

MODEL = Path(__file__).resolve().parents[2] / "models" / "kvbits-tiny"
if not MODEL.exists():
    pytest.skip("models/kvbits-tiny is not in this checkout", allow_module_level=True)
NOT_INSTALLED = "lm-evaluation-harness is not installed; pip install 'kvbits[eval]'"
pytest.importorskip("lm_eval", reason=NOT_INSTALLED)
pytest.importorskip("accelerate", reason=NOT_INSTALLED)

NUM_NEW_TOKENS = 24
PROMPTS = (
    "The history of the city goes back to the time when the river",
    "In the north of the country, most of the people live in",
    "The first book of the series was published in the year",
)
CHOICES = (" water.", " the sea, where the ships of the king lay in the harbour.", " a mountain.")


@pytest.fixture(scope="module")
def loaded():
    from kvbits.cli.models import load_model

    return load_model(str(MODEL), "cpu", "float32")


@pytest.fixture(scope="module")
def answers(loaded):
    """What the model itself writes at full precision: the targets of the generation task."""
    texts = []
    for prompt in PROMPTS:
        ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
        made = loaded.model.generate(ids, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
        texts.append(loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, answers):
    """Three tasks, one for each kind of request of the harness."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")  # not the user's
    rows = [
        {"prompt": prompt, "answer": answer, "choices": CHOICES, "text": prompt + answer}
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1.0},
    }
    generation = {"until": ["<never>"], "do_sample": False, "max_gen_toks": NUM_NEW_TOKENS}
    tasks = {
        "local_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": generation,
            "metric_list": [{"metric": "exact_match"}],
        },
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{0}}",
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return folder


TASKS = ("local_generate", "local_choice", "local_text")


@pytest.fixture(scope="module")
def results(loaded, task_folder):
    """Results of every task at full precision, at 16 bits through a plan, and at 2 bits."""
    from kvbits.evaluation.lm_eval import KVBitsLM, evaluate

    found = {}
    config = loaded.model.config
    for name, plan in {
        "full": None,
        "K16V16": CachePlan.uniform(config, 16, 16),
        "K2V2": CachePlan.uniform(config, 2, 2),
    }.items():
        # chunks shorter than the texts, so that later ones read what earlier ones packed
        lm = KVBitsLM(
            loaded.model, tokenizer=loaded.tokenizer, plan=plan, batch_size=2, chunk_tokens=8
        )
        found[name] = evaluate(lm, TASKS, include_path=task_folder, num_fewshot=0)
    return found


def likelihoods(result):
    """Log-likelihood of every choice of every document."""
    return torch.tensor(
        [[r[0][0] for r in s["resps"]] for s in result["samples"]["local_choice"]],
        dtype=torch.float64,
    )


def test_sixteen_bits_change_nothing(results):
    full, exact = results["full"], results["K16V16"]
    assert full["results"]["local_generate"]["exact_match,none"] == 1.0
    assert exact["results"]["local_generate"]["exact_match,none"] == 1.0
    # float32 sums in another order, over at most 40 tokens of a few nats each
    torch.testing.assert_close(likelihoods(exact), likelihoods(full), rtol=1e-4, atol=1e-3)
    a, b = (r["results"]["local_text"]["word_perplexity,none"] for r in (full, exact))
    assert b == pytest.approx(a, rel=1e-4)


def test_two_bits_change_generation(results):
    packed = results["K2V2"]
    assert packed["results"]["local_generate"]["exact_match,none"] < 1.0


def test_two_bits_change_log_likelihoods(results):
    full, packed = results["full"], results["K2V2"]
    assert (likelihoods(full) - likelihoods(packed)).abs().min() > 0.01
    a, b = (r["results"]["local_text"]["word_perplexity,none"] for r in (full, packed))
    assert abs(b / a - 1) > 0.01


def test_log_likelihoods_are_those_of_decoding_token_by_token(loaded, results):
    """Against the deployed path: one token a step, each reading the packed cache."""
    plan = CachePlan.uniform(loaded.model.config, 2, 2)
    context = loaded.tokenizer(PROMPTS[0]).input_ids
    whole = loaded.tokenizer(PROMPTS[0] + CHOICES[1]).input_ids
    assert whole[: len(context)] == context
    cache, total = plan.new_cache(loaded.model), 0.0
    with enable(loaded.model), torch.no_grad():
        for here, following in pairwise(whole):
            ids = torch.tensor([[here]])
            logits = loaded.model(ids, past_key_values=cache).logits[0, -1]
            if cache.get_seq_length() >= len(context):
                total += float(logits.double().log_softmax(-1)[following])
    assert float(likelihoods(results["K2V2"])[0, 1]) == pytest.approx(total, rel=1e-4)


def test_results_name_the_plan(results):
    assert results["K2V2"]["config"]["cache_plan"].startswith("K2V2 0-11")
    assert results["full"]["config"]["effective_bits"] == 16.0


def test_the_harness_finds_the_class_by_name(task_folder):
    import lm_eval

    from kvbits.evaluation.lm_eval import KVBitsLM

    arguments = f"pretrained={MODEL},method=kivi,bits=4,dtype=float32"
    lm = lm_eval.api.registry.get_model("kvbits").create_from_arg_string(
        arguments, {"device": "cpu", "batch_size": 1}
    )
    assert isinstance(lm, KVBitsLM)
    assert lm.plan.describe().startswith("K4V4")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "kivi", "plan": "plan.json"}, ValueError, "plan must be given without method"),
        ({"method": "kvquant"}, ValueError, "method must need no calibration here"),
        ({"bits": 4}, ValueError, "bits must be given with a method"),
        ({"plan": "missing.json"}, PlanError, "readable plan file, got 'missing.json'"),
    ],
)
def test_bad_arguments_are_refused(loaded, settings, error, message):
    from kvbits.evaluation.lm_eval import KVBitsLM

    with pytest.raises(error, match=message):
        KVBitsLM(loaded.model, tokenizer=loaded.tokenizer, **settings)


@pytest.mark.parametrize("as_turns", [True, False])
def test_few_shot_examples_become_turns_of_the_chat_template(
    loaded, task_folder, monkeypatch, as_turns
):
    from kvbits.evaluation.lm_eval import KVBitsLM, evaluate

    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    plan = CachePlan.uniform(loaded.model.config, 4, 4)
    lm = KVBitsLM(loaded.model, tokenizer=loaded.tokenizer, plan=plan)
    found = evaluate(
        lm,
        ["local_choice"],
        include_path=task_folder,
        num_fewshot=2,
        limit=1,
        apply_chat_template=True,
        fewshot_as_multiturn=as_turns,
    )
    prompt = found["samples"]["local_choice"][0]["arguments"][0][0]
    assert prompt.count("<assistant>") == (2 if as_turns else 0)
    assert prompt.count("<user>") == (3 if as_turns else 1)


def test_an_unknown_task_is_refused(task_folder):
    from kvbits.evaluation.lm_eval import find_tasks

    with pytest.raises(ValueError, match="got 'local_nothing'"):
        find_tasks(["local_choice", "local_nothing"], task_folder)


# ----- runs in folders, compared


def test_two_runs_are_compared_example_by_example(results):
    full, packed = (from_harness(results[name]["samples"]) for name in ("full", "K2V2"))
    rows = {(row.task, row.metric): row for row in compare(full, packed)}
    generated = rows["local_generate", "exact_match"]
    scores = [s["exact_match"] for s in results["K2V2"]["samples"]["local_generate"]]
    assert generated.lost == tuple(i for i, score in enumerate(scores) if score == 0)
    assert generated.gained == ()
    text = rows["local_text", "log-likelihood (word_perplexity)"]
    assert text.gained is None
    # what the harness reports is exp of minus the weighted mean
    for value, name in ((text.first, "full"), (text.second, "K2V2")):
        reported = results[name]["results"]["local_text"]["word_perplexity,none"]
        assert torch.tensor(-value).exp().item() == pytest.approx(reported, rel=1e-5)


def test_a_run_goes_on_where_it_was_stopped(results, tmp_path):
    calls = []

    def once(name):
        calls.append(name)
        samples = {name: results["full"]["samples"][name]}
        return {"results": {name: results["full"]["results"][name]}, "samples": samples}

    def stopped(name):
        raise KeyboardInterrupt

    run = identity(None, {"limit": 3}, {"lm_eval": "1"})
    open_run(tmp_path, run)
    first = run_task(tmp_path, "local_choice", once)
    with pytest.raises(KeyboardInterrupt):
        run_task(tmp_path, "local_text", stopped)
    open_run(tmp_path, run)
    assert run_task(tmp_path, "local_choice", once) == first
    run_task(tmp_path, "local_text", once)
    assert calls == ["local_choice", "local_text"]
    tasks = {sample.task for sample in run_samples(tmp_path)}
    assert tasks == {"local_choice", "local_text"}
    with pytest.raises(RecordError, match="another settings"):
        open_run(tmp_path, identity(None, {"limit": 4}, {"lm_eval": "1"}))


def test_the_command_runs_tasks_and_compares_them(task_folder, tmp_path):
    from typer.testing import CliRunner

    from kvbits.cli import app

    names = "local_choice,local_generate"
    common = ("eval", MODEL, "--tasks", names, "--include-path", task_folder)
    folders = tmp_path / "full", tmp_path / "packed"
    for folder, plan in zip(folders, ((), ("--method", "per-token", "--bits", 2)), strict=True):
        arguments = (*common, "--limit", 2, "--num-fewshot", 1, *plan, "-o", folder)
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        assert result.exit_code == 0, result.output
        assert "local_choice" in result.output
    assert json.loads((folders[1] / "run.json").read_text())["plan"].startswith("K2V2")
    arguments = ("compare-evals", *folders, "--json")
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    choice, text = json.loads(result.stdout)
    assert (choice["task"], choice["metric"], choice["n"]) == ("local_choice", "acc", 2)
    assert choice["length_ratio"] is None
    assert text["task"] == "local_generate"
    counts = [
        {
            sample.doc_id: sample.response_tokens
            for sample in run_samples(folder)
            if sample.response
        }
        for folder in folders
    ]
    ratios = [counts[1][i] / counts[0][i] for i in counts[0]]
    assert len(ratios) == 2
    assert min(counts[0].values()) > 1
    assert text["length_ratio"]["ratio"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
