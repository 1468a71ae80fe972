"""Rivals from elsewhere, and what a study records for the report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.errors import PlanError, RecordError
from kvbits.evaluation.corpora import TokenSet
from kvbits.plan import CachePlan
from kvbits.tuning import Data, TuneSettings, rivals, tune
from kvbits.tuning.budget import memory_curve
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.given import GivenRival, as_choice, check_given, load_rival
from kvbits.tuning.published import recipe_rival, recipe_settings
from kvbits.tuning.settings import RECIPES

SETTINGS = TuneSettings(bits=4.5, task_n=0, random_plans=1, widths=(4, 2))
PAIRS = [(4, 4), (2, 2), (4, 2)]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rival(model):
    return CachePlan.from_pairs(model.config, PAIRS)


@pytest.fixture(scope="module")
def candidates(model):
    return of_mode(model.config, "per_token", (4, 2))


def token_set(split: str, seed: int) -> TokenSet:
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(seed))
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return TokenSet(f"text_{split}", "text", split, ids, counted)


@pytest.fixture(scope="module")
def tuned(model, tiny_model_dir, rival, tmp_path_factory):
    """A finished run, and the same again with a rival."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = Data([token_set("calibration", 0)], [token_set("heldout", 9)])
    path = tmp_path_factory.mktemp("run")
    alone = tune(model, tokenizer, SETTINGS, path, data=data, command="kvbits tune a")
    lines = (path / "verify.jsonl").read_text().splitlines()
    given = [GivenRival("theirs", "their.json", rival)]
    beside = tune(model, tokenizer, SETTINGS, path, data=data, given=given, command="kvbits b")
    return alone, beside, lines


def test_a_finished_run_measures_only_the_rival_that_is_new(tuned):
    alone, beside, before = tuned
    after = (beside.run_dir / "verify.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    new = [json.loads(line) for line in after[len(before) :]]
    assert {(record["kind"], record["name"]) for record in new} == {("kl", "theirs")}
    assert beside.plan == alone.plan


def test_a_rival_is_a_point_with_numbers_of_its_own(tuned):
    _, beside, _ = tuned
    (point,) = [p for p in beside.front["points"] if p["origin"] == "given"]
    assert point["name"] == "theirs"
    assert point["pairs"] == [list(pair) for pair in PAIRS]
    assert point["measured_kl"]["text"]["value"] > 0


def test_the_chosen_plan_is_compared_with_rivals_and_neighbours(tuned):
    alone, beside, _ = tuned
    compared = {(row["baseline"], row["origin"]) for row in beside.front["comparisons"]}
    assert ("theirs", "given") in compared
    chosen = next(p["name"] for p in beside.front["points"] if p["chosen"])
    neighbours = {name for name, origin in compared if origin == "exact"}
    assert neighbours
    assert chosen not in neighbours
    assert not any(row["origin"] == "given" for row in alone.front["comparisons"])


def test_the_last_command_is_kept_and_is_no_part_of_the_study(tuned):
    _, beside, _ = tuned
    study = json.loads((beside.run_dir / "study.json").read_text())
    assert study["command"] == "kvbits b"


def test_verification_records_positions_and_the_loss(tuned):
    _, beside, _ = tuned
    lines = (beside.run_dir / "verify.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "kl"]
    for record in records:
        assert sum(each["num_tokens"] for each in record["positions"]) == record["num_tokens"]
        mean = sum(each["num_tokens"] * each["kl_nats"] for each in record["positions"])
        assert mean / record["num_tokens"] == pytest.approx(record["kl_nats"], rel=1e-4)
        assert record["excess_nll_se"] > 0


def test_the_front_tells_every_plan_and_its_memory(tuned):
    _, beside, _ = tuned
    for point in beside.front["points"]:
        assert point["summary"].endswith("effective bits")
    for row in beside.front["memory"]:
        assert row["bytes"] == beside.plan.bytes(row["context"])
        assert row["bytes_16bit"] == beside.plan.bytes_16bit(row["context"])


def test_memory_is_told_at_the_studys_own_context_and_batch(rival):
    settings = TuneSettings(bits=4, context=1000, batch=3)
    curve = {row["context"]: row["bytes"] for row in memory_curve(rival, settings)}
    assert curve[1000] == rival.bytes(1000, 3)
    assert {256, 131_072} <= set(curve)


def test_a_published_recipe_searches_for_the_same_budget(
    model, tiny_model_dir, tmp_path, monkeypatch
):
    """The recipe itself, but for fewer trials."""
    short = RECIPES["kvtuner"] | {"trials": 16, "population": 6}
    monkeypatch.setitem(RECIPES, "kvtuner", short)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = Data([token_set("calibration", 0)], [token_set("heldout", 9)])
    found = recipe_rival(model, tokenizer, SETTINGS, "kvtuner", tmp_path, data=data)
    assert found.name == "kvtuner recipe"
    assert found.plan.provenance.method == "moead"
    assert found.plan.effective_bits <= SETTINGS.bits
    lines = (tmp_path / "rivals" / "kvtuner" / "search.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"4 bits", "6 bits"}


def test_a_recipe_keeps_what_the_study_shares_with_it():
    settings = recipe_settings(TuneSettings(bits=4.5, mode="kivi", seed=3, task_n=9), "kvtuner")
    assert (settings.bits, settings.mode, settings.seed) == (4.5, "kivi", 3)
    assert (settings.strategy, settings.widths, settings.trials) == ("moead", (8, 4, 2), 200)
    assert settings.task_n == 0


# ----- finding the candidates of a rival


def test_a_rival_is_told_in_the_studys_candidates(rival, candidates):
    choice = as_choice(GivenRival("theirs", "p.json", rival), candidates)
    assert candidates.labels(choice) == ("K4V4", "K2V2", "K4V2")
    assert candidates.plan(choice).layers == rival.layers


def test_tasks_are_run_on_a_rival_whatever_its_size(rival, candidates):
    problem = SimpleNamespace(allocation=lambda choice: choice)
    given = [GivenRival("theirs", "p.json", rival)]
    (entry,) = rivals.given_entries(problem, given, candidates)
    assert (entry.name, entry.origin, entry.measures_tasks) == ("theirs", "given", True)


@pytest.mark.parametrize(
    ("pairs", "mode"), [([(4, 4), (3, 3), (2, 2)], "per_token"), ([(4, 4)] * 3, "kivi")]
)
def test_what_the_study_cannot_store_is_refused(model, candidates, pairs, mode):
    plan = CachePlan.from_pairs(model.config, pairs, mode=mode)
    layer = 1 if mode == "per_token" else 0
    message = rf"candidate of the study \(K16V16, K4V4.*\), got p.json .* in layer {layer}; tune"
    with pytest.raises(PlanError, match=message):
        check_given([GivenRival("theirs", "p.json", plan)], candidates)


def test_rivals_of_one_name_are_refused(rival, candidates):
    given = [GivenRival("theirs", name, rival) for name in ("a/p.json", "b/p.json")]
    with pytest.raises(ValueError, match="rivals must have different names, got 'theirs' twice"):
        check_given(given, candidates)


def test_a_plan_file_is_named_after_itself(rival, tmp_path):
    rival.save(tmp_path / "theirs.json")
    found = load_rival(tmp_path / "theirs.json")
    assert (found.name, found.plan) == ("theirs", rival)


def test_a_run_of_a_recipe_is_named_after_the_recipe(rival, tmp_path):
    rival.save(tmp_path / "plan.json")
    settings = TuneSettings(bits=4.5, **RECIPES["kvtuner"]).model_dump(mode="json")
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings}))
    assert load_rival(tmp_path).name == "kvtuner recipe"
    settings["trials"] = 20
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings}))
    assert load_rival(tmp_path).name == tmp_path.name


def test_an_unfinished_run_is_no_rival(tmp_path):
    with pytest.raises(RecordError, match=r"rival must be a plan file or a finished run, got"):
        load_rival(tmp_path)
