from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.errors import CalibrationError, RecordError, UnsupportedModelError
from kvbits.evaluation.corpora import TokenSet
from kvbits.plan import CachePlan
from kvbits.tuning import Data, Silent, TuneSettings, tune
from kvbits.tuning.identity import weights_checksum

EXACT = TuneSettings(bits=4.5, tasks=("passkey",), task_n=2, random_plans=2, widths=(4, 2))
NSGA2 = EXACT.model_copy(update={"strategy": "nsga2", "trials": 14, "population": 4})


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def random_set(domain: str, split: str, seed: int) -> TokenSet:
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(seed))
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, : 1 if domain == "text" else 30] = False
    return TokenSet(f"{domain}_{split}", domain, split, ids, counted)


@pytest.fixture(scope="module")
def data():
    domains = ("text", "recall")
    return Data(
        [random_set(domain, "calibration", seed) for seed, domain in enumerate(domains)],
        [random_set(domain, "heldout", seed + 9) for seed, domain in enumerate(domains)],
    )


@pytest.fixture(scope="module")
def finished(model, tokenizer, data, tmp_path_factory):
    """One uninterrupted run of each strategy."""
    runs = {}
    for settings in (EXACT, NSGA2):
        path = tmp_path_factory.mktemp(settings.strategy)
        runs[settings.strategy] = tune(model, tokenizer, settings, path, data=data)
    return runs


class Killer:
    """Progress that kills its process, as ``kill -9`` would, at the n-th step of a stage."""

    def __init__(self, stage: str, step: int, torn: str | None = None) -> None:
        self.stage, self.left, self.torn = stage, step, torn
        self.now = ""

    def start(self, stage: str, total: int) -> None:
        self.now = stage
        self.advance(0)

    def advance(self, steps: int = 1) -> None:
        if self.now == self.stage:
            self.left -= steps
            if self.left <= 0:
                if self.torn:
                    with Path(self.torn).open("a") as handle:
                        handle.write('{"layer": 1, "si')
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None:
        if self.now == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(*args, progress, data) -> None:
    """Tune in a forked process that ends by SIGKILL; a fork spares importing torch again."""
    process = multiprocessing.get_context("fork").Process(
        target=tune, args=(*args, progress), kwargs={"data": data}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        (EXACT, [("attention errors", 2), ("sensitivity", 5), ("verification", 4)]),
        (EXACT, [("attention errors", 99), ("sensitivity", 99), ("verification", 99)]),
        (NSGA2, [("sensitivity", 0), ("search", 6), ("search", 11), ("verification", 3)]),
    ],
)
def test_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    settings, points, finished, model, tokenizer, data, tmp_path
):
    files = {"sensitivity": "sensitivity.jsonl", "search": "search.jsonl"}
    for stage, step in points:
        torn = str(tmp_path / files.get(stage, "verify.jsonl"))
        killer = Killer(stage, step, torn)
        run_until_killed(model, tokenizer, settings, tmp_path, progress=killer, data=data)
        assert not (tmp_path / "plan.json").exists()
    tune(model, tokenizer, settings, tmp_path, data=data)
    whole = finished[settings.strategy].run_dir
    for name in ("plan.json", "front.json", "pruned.json", "errors.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_finished_run_is_only_read_again(finished, model, tokenizer, data):
    result = finished["exact"]
    before = {path.name: path.stat().st_size for path in result.run_dir.iterdir()}
    again = tune(model, tokenizer, EXACT, result.run_dir, data=data)
    assert {path.name: path.stat().st_size for path in result.run_dir.iterdir()} == before
    assert again.plan == result.plan


@pytest.mark.parametrize("strategy", ["exact", "nsga2"])
def test_plan_fits_the_budget_and_tells_where_it_came_from(finished, strategy, model):
    plan = CachePlan.load(finished[strategy].run_dir / "plan.json")
    plan.check(model.config)
    assert plan.effective_bits <= 4.5
    assert plan.provenance.method == strategy
    assert [d.split for d in plan.provenance.datasets] == ["calibration"] * 2
    assert plan.provenance.created is None
    assert {(m.name, m.dataset.split) for m in plan.metrics if m.dataset} == {
        ("kl_nats", "heldout")
    }


def test_front_holds_measured_rivals_of_every_kind(finished):
    front = finished["exact"].front
    points = front["points"]
    measured = {point["origin"] for point in points if point["measured_kl"]}
    assert measured == {"exact", "uniform", "ladder", "random"}
    chosen = [point for point in points if point["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["effective_bits"] <= front["budget_bits"]
    assert {p["origin"] for p in points if p["tasks"]} >= {"full", "exact", "uniform", "ladder"}
    assert chosen[0]["tasks"]["passkey"].keys() == {
        "accuracy", "se", "n", "difference", "low", "high",
    }  # fmt: skip


def test_sizes_in_the_front_are_those_of_the_plans(finished, model):
    for point in finished["exact"].front["points"]:
        plan = CachePlan.from_pairs(model.config, point["pairs"])
        assert point["labels"] == [f"K{key}V{value}" for key, value in point["pairs"]]
        assert point["effective_bits"] == pytest.approx(plan.effective_bits, rel=1e-5)
        assert point["effective_bits_at_context"] > 0
        if point["origin"] in ("exact", "random"):
            assert point["effective_bits"] <= 16


def test_measured_kl_of_the_exact_front_falls_with_its_size(finished):
    """Random weights still give KLs that fall with bits; 2 and 4 bits differ by a factor of 20."""
    points = [p for p in finished["exact"].front["points"] if p["origin"] == "exact"]
    measured = [p for p in points if p["measured_kl"]]
    first, last = (pick(measured, key=lambda p: p["effective_bits"]) for pick in (min, max))
    assert first["effective_bits"] < last["effective_bits"]
    assert first["measured_kl"]["text"]["value"] > last["measured_kl"]["text"]["value"]


def test_report_can_read_the_run(finished):
    from kvbits.report.collect import collect

    run = collect(finished["exact"].run_dir)
    assert run.missing == ()
    assert run.chosen is not None
    assert run.domains == ("text", "recall")


def test_no_time_stands_in_the_results(finished):
    for name in ("plan.json", "front.json"):
        text = (finished["exact"].run_dir / name).read_text()
        document = json.loads(text)
        assert "seconds" not in text
        assert document.get("provenance", {}).get("created") is None


def test_other_settings_and_other_models_are_refused(finished, model, tokenizer, data):
    path = finished["exact"].run_dir
    with pytest.raises(RecordError, match=r"another settings bits \(4.5 there, 5.0 now\)"):
        tune(model, tokenizer, EXACT.model_copy(update={"bits": 5.0}), path, data=data)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(RecordError, match="another model weights"):
        tune(other, tokenizer, EXACT, path, data=data)
    with pytest.raises(RecordError, match="another data calibration recall"):
        tune(model, tokenizer, EXACT, path, data=Data(data.heldout, data.calibration))


def test_budget_below_the_smallest_plan_is_refused(model, tokenizer, data, tmp_path):
    settings = TuneSettings(bits=2.2)
    with pytest.raises(ValueError, match=r"bits must be at least 3.00 effective bits.*got 2.2"):
        tune(model, tokenizer, settings, tmp_path, data=data)


def test_model_without_a_packable_layer_is_refused(tokenizer, data, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="must have a full attention layer"):
        tune(MistralForCausalLM(config), tokenizer, EXACT, tmp_path, data=data)


def test_kivi_mode_counts_the_residual_at_a_context(model, tokenizer, data, tmp_path):
    settings = EXACT.model_copy(
        update={"bits": 5.5, "mode": "kivi", "context": 512, "task_n": 0, "random_plans": 0}
    )
    result = tune(model, tokenizer, settings, tmp_path, Silent(), data=data)
    assert result.plan.effective_bits_at(512) <= 5.5
    assert result.plan.effective_bits < result.plan.effective_bits_at(512)
    assert result.plan.layers[0].residual_length == 32


def test_methods_are_mixed_calibrated_and_told_apart(model, tokenizer, data, tmp_path):
    """Five layer plans a layer of two methods, one of which is fitted to the documents."""
    fitted = "kvquant:block_tokens=8,levels=activations,is_pre_rope=false,sink_tokens=0"
    settings = TuneSettings(
        bits=7.0, candidates=(fitted, "per-token"), widths=(4, 2), task_n=0, random_plans=1
    )
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    points = result.front["points"]
    labels = {label for point in points for label in point["labels"]}
    assert {"per-token K4V4", f"{fitted} K4V4"} <= labels
    assert result.plan.effective_bits <= 7.0
    assert result.plan.provenance.mode is None
    chosen = next(point for point in points if point["chosen"])
    for label, layer in zip(chosen["labels"], result.plan.layers, strict=True):
        is_fitted = any(group.value.kind == "outliers" for group in layer.groups)
        assert is_fitted == label.startswith("kvquant")
    saved = {path.name for path in (tmp_path / "calibrated").glob("*.json")}
    assert len(saved) == 2
    again = tune(model, tokenizer, settings, tmp_path, data=data)
    assert again.plan == result.plan


QUICK = EXACT.model_copy(update={"task_n": 0, "random_plans": 0, "trials": 6, "population": 4})


@pytest.mark.parametrize("strategy", ["exact+", "moead", "tpe", "uniform", "ladder", "random"])
def test_every_strategy_writes_a_plan_within_the_budget(
    strategy, model, tokenizer, data, tmp_path
):
    settings = QUICK.model_copy(update={"strategy": strategy})
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    assert result.plan.effective_bits <= 4.5
    chosen = [point for point in result.front["points"] if point["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["measured_kl"]
    trials = (tmp_path / "search.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in trials} == {"search"}
    if strategy == "uniform":
        assert len(set(chosen[0]["labels"])) == 1


def test_limits_are_searched_one_after_the_other_and_joined(model, tokenizer, data, tmp_path):
    settings = QUICK.model_copy(update={"strategy": "moead", "limits": (4.0, 6.0)})
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    lines = [json.loads(x) for x in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["4 bits"] * 6 + ["6 bits"] * 6
    assert result.plan.effective_bits <= 4.5


def test_memory_buys_a_plan_that_fits_it(model, tokenizer, data, tmp_path):
    full = CachePlan.uniform(model.config, 16, 16).bytes(1000, 3)
    settings = TuneSettings(
        memory=full // 3, context=1000, batch=3, widths=(4, 2), task_n=0, random_plans=0
    )
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    bought = result.front["bought"]
    assert bought["bytes"] == result.plan.bytes(1000, 3) <= full // 3
    assert bought["bytes_16bit"] == full
    assert result.plan.bytes(bought["tokens"], 3) <= full // 3
    assert result.plan.bytes(bought["tokens"] + 1, 3) > full // 3
    assert bought["tokens_16bit"] == 333


def test_memory_below_the_smallest_plan_is_refused_in_bits(model, tokenizer, data, tmp_path):
    settings = TuneSettings(memory=1000, context=1000, widths=(4, 2))
    with pytest.raises(ValueError, match=r"bits must be at least .*what memory=1000 bytes allow"):
        tune(model, tokenizer, settings, tmp_path, data=data)
    assert not (tmp_path / "study.json").exists()


def test_quality_buys_the_smallest_plan_that_measures_so(model, tokenizer, data, tmp_path):
    sizes = []
    for limit in (1e-2, 1e-4):
        path = tmp_path / f"{limit}"
        settings = TuneSettings(max_kl=limit, widths=(4, 2), task_n=0, random_plans=0)
        result = tune(model, tokenizer, settings, path, data=data)
        chosen = json.loads((path / "search.jsonl").read_text().splitlines()[-1])
        assert max(chosen["kl_nats"]) <= limit
        assert chosen["effective_bits"] == pytest.approx(result.plan.effective_bits)
        assert result.front["budget_bits"] == pytest.approx(result.plan.effective_bits)
        sizes.append(result.plan.effective_bits)
    assert sizes[0] < sizes[1]


def test_layers_may_have_one_width_for_both_sides(model, tokenizer, data, tmp_path):
    settings = QUICK.model_copy(update={"granularity": "layer"})
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    assert all(key == value for key, value in result.plan.pairs)


def test_weights_checksum_sees_one_changed_weight_and_no_order(model):
    before = weights_checksum(model)
    parameter = next(iter(model.parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] += 1
        changed = weights_checksum(model)
        parameter.view(-1)[0] -= 1
    assert changed != before
    assert weights_checksum(model) == before


@pytest.mark.parametrize("strategy", ["exact", "exact+", "random"])
def test_a_drop_in_a_task_buys_the_smallest_plan_that_keeps_it(
    strategy, model, tokenizer, data, tmp_path
):
    """A random model solves nothing, so that its smallest plan is no worse."""
    settings = TuneSettings(
        max_drop=0.5, tasks=("passkey",), task_n=2, widths=(4, 2), random_plans=0,
        strategy=strategy, trials=3,
    )  # fmt: skip
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    front = result.front
    sizes = [p["effective_bits"] for p in front["points"] if p["origin"] == strategy]
    if strategy != "random":
        assert result.plan.effective_bits == pytest.approx(min(sizes))
    assert front["budget_bits"] == pytest.approx(result.plan.effective_bits)
    assert front["drop"]["task"] == "passkey"
    assert front["drop"]["difference"] == 0
    assert front["drop"]["heldout"]["n"] == 2
    assert front["bought"]["bytes"] == result.plan.bytes(4096, 1)
    lines = (tmp_path / "drop.jsonl").read_text().splitlines()
    assert len(lines) >= 2
    again = tune(model, tokenizer, settings, tmp_path, data=data)
    assert again.plan == result.plan
    assert (tmp_path / "drop.jsonl").read_text().splitlines() == lines


def test_heads_are_measured_chosen_and_run_apart(model, tokenizer, data, tmp_path):
    settings = QUICK.model_copy(update={"granularity": "head", "random_plans": 1})
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    assert result.plan.effective_bits <= 4.5
    profile = [json.loads(x) for x in (tmp_path / "sensitivity.jsonl").read_text().splitlines()]
    assert {r["layer"] for r in profile} == {f"{a}.{b}" for a in range(3) for b in range(2)}
    assert any(len(layer.groups) == 2 for layer in result.plan.layers)
    reloaded = CachePlan.load(tmp_path / "plan.json")
    ids = torch.randint(1, 257, (1, 40))
    made = model.generate(ids, past_key_values=reloaded.new_cache(model), max_new_tokens=4)
    assert made.shape[1] > 40
    finer = next(point for point in result.front["points"] if point["chosen"])
    assert sum(map(sum, finer["pairs"])) / 6 <= 4.5

    from kvbits.report.collect import collect
    from kvbits.report.page import render

    run = collect(tmp_path)
    assert {row.layer for row in run.sensitivity} == {0, 1, 2}
    assert "K4V2" in render(run, model="tiny")


@pytest.mark.parametrize("signal", ["fisher", "e_o"])
def test_other_sensitivities_choose_a_plan_and_predict_in_nats(
    signal, model, tokenizer, data, tmp_path
):
    """All are brought to nats by one measured plan, the narrowest uniform one."""
    settings = QUICK.model_copy(update={"sensitivity": signal})
    result = tune(model, tokenizer, settings, tmp_path, data=data)
    assert result.plan.effective_bits <= 4.5
    assert not (tmp_path / "sensitivity.jsonl").exists()
    narrow = next(p for p in result.front["points"] if p["name"] == "K2V2")
    anchor = json.loads((tmp_path / "anchor.jsonl").read_text())["kl_nats"]
    assert list(narrow["predicted_kl"].values()) == pytest.approx(anchor, rel=1e-4)


def test_accuracy_as_a_sensitivity_needs_a_problem_that_is_lost(model, tokenizer, data, tmp_path):
    settings = QUICK.model_copy(update={"sensitivity": "accuracy", "task_n": 1})
    with pytest.raises(CalibrationError, match="must see a problem that some codec alone gets"):
        tune(model, tokenizer, settings, tmp_path, data=data)
    assert len((tmp_path / "accuracy.jsonl").read_text().splitlines()) == 12


def test_domains_of_the_user_s_own_are_tuned_and_proven_apart(model, tokenizer, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(4)))
    settings = TuneSettings(
        bits=4.5, widths=(4, 2), calibration=(f"mine={prompts}", "sums=task:arithmetic"),
        task_n=0, random_plans=0, chat_documents=2, answer_tokens=4, reasoning_documents=2,
    )  # fmt: skip
    result = tune(model, tokenizer, settings, tmp_path / "run")
    assert list(result.front["normalised_by"]) == ["mine", "sums"]
    study = json.loads((tmp_path / "run" / "study.json").read_text())
    assert study["split"] == {
        "calibration_documents": 4, "heldout_documents": 4, "shared_documents": 0,
    }  # fmt: skip
    hashes = json.loads((tmp_path / "run" / "documents.json").read_text())
    one, other = ({h for each in hashes[s].values() for h in each} for s in hashes)
    assert len(one) == len(other) == 4
    assert not one & other


def test_a_document_in_both_splits_is_refused(model, tokenizer, data, tmp_path):
    both = Data(data.calibration, [data.calibration[0], data.heldout[1]])
    with pytest.raises(CalibrationError, match="must share no document with calibration data"):
        tune(model, tokenizer, EXACT, tmp_path, data=both)
