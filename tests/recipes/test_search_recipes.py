"""The recipes about searching: what they compare, and the arithmetic of their tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from kvbits.tuning.candidates import Candidates, of_methods
from kvbits.tuning.costs import cost_table
from kvbits.tuning.problem import build_problem
from kvbits.tuning.tables import Allocation, SensitivityTable

ROOT = Path(__file__).resolve().parents[2]


def load(recipe: str):
    path = ROOT / "recipes" / recipe / "measure.py"
    name = f"{recipe.replace('-', '_')}_measure"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def problem_of(candidates: Candidates):
    """Sensitivities that fall five times a bit, keys and methods at random."""
    generator = np.random.default_rng(0)
    bits = np.array([float(option.bits) for option in candidates.sides])
    shape = (3, len(candidates.layers), len(bits))
    kl = generator.lognormal(sigma=1.0, size=shape) * 5.0**-bits
    sides = tuple(option.label for option in candidates.sides)
    table = SensitivityTable(("text", "reasoning", "recall"), sides, kl)
    return build_problem(table, cost_table(candidates), bits=4.0, objective="minimax")


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return AutoConfig.from_pretrained(tiny_model_dir)


def test_mixed_plan_has_every_single_method_as_a_special_case(config):
    mixing = load("mixing")
    names = mixing.METHODS[:3]  # without what needs a larger head
    mixing.METHODS, mixing.BUDGETS = names, (5.0, 6.5)
    candidates = of_methods(config, names, mixing.WIDTHS)
    problem = problem_of(candidates)
    found = list(mixing.contenders(problem, candidates))
    assert {each.kind for each in found} == {"mixed", "tuned", "uniform"}
    for budget in mixing.BUDGETS:
        here = {(e.kind, e.method): e.plan for e in found if e.budget == budget}
        best = here["mixed", "all"].loss
        assert all(plan.effective_bits <= budget for plan in here.values())
        assert all(best <= plan.loss * (1 + 1e-6) for plan in here.values())
        for (kind, method), plan in here.items():
            if kind != "mixed":
                labels = candidates.labels(plan.choice)
                assert {label.partition(":")[0] for label in labels} <= {method, "K16V16"}
            if kind == "uniform":
                assert here["tuned", method].loss <= plan.loss * (1 + 1e-6)


def test_differences_in_the_mixing_table_are_paired():
    mixing = load("mixing")

    def record(kind, kl):
        heldout = {"kl_nats": sum(kl) / 2, "document_kl_nats": kl, "document_tokens": [10, 10]}
        return {
            "budget": 4.0, "kind": kind, "method": "all" if kind == "mixed" else "kivi",
            "labels": ["kivi K4V4"], "effective_bits": 3.9, "predicted_loss": 1.0,
            "heldout": {"text": heldout},
        }  # fmt: skip

    text = mixing.table([record("mixed", [0.1, 0.3]), record("uniform", [0.2, 0.4])])
    assert "| 4 | kivi, uniform K4V4 | 3.90 | 0.30000 | +0.10000 ± 0.00000 * |" in text


def lab_of(costs_problem, losses):
    """A lab whose held-out data says what a dictionary says."""
    problem = costs_problem._replace(objective="minimax", norms=np.ones(3))
    return SimpleNamespace(
        problem=problem, heldout=lambda choice: [{"kl_nats": losses[choice]}] * 3
    )


def test_hypervolume_is_the_mean_of_decades_below_the_smallest_plan(config):
    cost = load("search-cost")
    problem = problem_of(of_methods(config, ["per-token"], (4, 2)))
    layers = problem.costs.units.shape[0]
    smallest, better = (4,) * layers, (4,) * (layers - 1) + (1,)
    start = problem.costs.effective_bits(smallest)
    cost.MOST_BITS = start + 2.0
    lab = lab_of(problem, {smallest: 1.0, better: 0.01})
    assert cost.hypervolume(lab, []) == 0.0

    def plan(choice, bits):
        return Allocation(choice, bits, (0.0,) * 3, 0.0)

    # Two decades better over half of the width, then nothing more; worse plans change nothing.
    front = [plan(better, start + 1.0), plan(smallest, start + 1.5)]
    assert cost.hypervolume(lab, front) == pytest.approx(1.0)
    assert cost.hypervolume(lab, [plan(better, start + 3.0)]) == 0.0


def test_strategies_are_charged_for_what_they_need_before_their_first_trial(config):
    cost = load("search-cost")
    problem = problem_of(of_methods(config, ["per-token"], (4, 2)))
    layers = problem.costs.units.shape[0]

    def measured(choice):
        return [{"kl_nats": kl} for kl in problem.predicted_kl(choice)]

    measured.tokens_per_plan = 10
    space = cost.Space(tuple((i,) for i in range(layers)), ((1, 2, 3, 4),) * layers)
    lab = cost.Lab(problem, space, measured, measured, 500.0, 20.0, None, 12)
    last = {s: list(cost.points(lab, s, 0))[-1] for s in cost.STRATEGIES}
    assert last["exact"].tokens == 500
    assert last["random"].tokens <= 120
    for name in ("moead", "nsga2", "tpe"):
        assert last[name].tokens == 20 + 120
    assert last["exact+"].tokens == 500 + 10 * last["exact+"].trials
    assert all(point.front for point in last.values())
    assert cost.hypervolume(lab, last["exact"].front) >= cost.hypervolume(
        lab, last["uniform"].front
    )


def point(strategy, seed, trials, tokens, hypervolume):
    return {"strategy": strategy, "seed": seed, "trials": trials, "tokens": tokens,
            "hypervolume": hypervolume, "plans_in_front": 1}  # fmt: skip


def test_curve_means_over_seeds_and_savings_are_counted_at_equal_quality():
    cost = load("search-cost")
    records = [
        *(point("moead", seed, 10, 1e6, value) for seed, value in ((0, 1.0), (1, 1.2))),
        *(point("moead", seed, 100, 1e7, value) for seed, value in ((0, 1.9), (1, 2.1))),
        point("moead", 0, 101, 1.1e7, 9.0),  # one seed alone
        point("exact", 0, 0, 2e5, 2.1),
        point("random", 0, 100, 1e7, 1.0),
    ]
    assert cost.curve(records, "moead") == [
        (1.0, pytest.approx(1.1), pytest.approx(2**0.5 / 10)),
        (10.0, pytest.approx(2.0), pytest.approx(2**0.5 / 10)),
    ]
    said = list(cost.reached(records))
    assert said[1:] == ["- exact at 0.200 million tokens, 50.0 x fewer"]


def test_one_pass_over_all_domains_is_told_apart_again(tiny_model_dir, config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvbits.evaluation.corpora import SetSize, default_sets
    from kvbits.tuning.rundir import RunDir
    from kvbits.tuning.sensitivity import Meter

    cost = load("search-cost")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    size = SetSize(text_documents=2, text_tokens=32, reasoning_documents=2, recall_documents=2,
                   recall_tokens=64)  # fmt: skip
    sets = default_sets(tokenizer, size=size)
    candidates = of_methods(config, ["per-token"], (2,))
    memo = cost.Memo(model, sets, candidates, RunDir(tmp_path), "calibration")
    apart = Meter(model, sets, candidates).document_kl((1, 1, 1))
    together = memo((1, 1, 1))
    assert [d["kl_nats"] for d in together] == pytest.approx(
        [d["kl_nats"] for d in apart], rel=1e-3
    )
    again = cost.Memo(None, sets, candidates, RunDir(tmp_path), "calibration")
    assert again((1, 1, 1)) == together


# ----- calibration domains


def plan_record(budget, expected, share, n=100):
    correct = [i < round(share * n) for i in np.random.default_rng(0).permutation(n)]
    tasks = ("arithmetic", "copy", "facts", "lines")
    solved = dict.fromkeys(tasks, correct)
    return {"budget": budget, "expected": expected, "correct": solved}


def test_predictors_are_ranked_by_what_they_say_of_accuracy():
    """One orders plans as accuracy does, one knows their size alone, one is noise."""
    domains = load("calibration-domains")
    domains.RESAMPLES = 200
    generator = np.random.default_rng(1)
    records = [plan_record(16.0, {"good": 0.0, "size": -16.0, "noise": 0.0}, 1.0)]
    for index in range(42):
        bits, harm = (2.75, 3.25, 3.75)[index % 3], float(generator.uniform(0, 0.2))
        share = 0.5 + 0.12 * bits - harm
        expected = {"good": -share, "size": -bits, "noise": float(generator.normal())}
        records.append(plan_record(bits, expected, share))
    rows = {name: (overall, within) for name, overall, within in domains.ranking(records)}
    assert next(iter(rows)) == "good"
    assert rows["good"][0].value > 0.98
    assert rows["size"][1].value == 0.0
    assert 0.3 < rows["size"][0].value < rows["good"][0].value
    assert rows["noise"][0].low < 0 < rows["noise"][0].high
    assert "| good | " in domains.table(records)
    assert domains.reliability(records[1:]) > 0.9


def test_plans_of_the_domain_study_fill_three_sizes(config):
    domains = load("calibration-domains")
    problem = problem_of(of_methods(config, ["per-token"], domains.WIDTHS))
    smallest = problem.costs.effective_bits((9,) * 3)
    domains.BUDGETS = tuple(smallest + extra for extra in (0.5, 1.0, 1.5))
    drawn = domains.choices(problem, 12)
    assert len({choice for _, choice in drawn}) == 12
    assert {bits for bits, _ in drawn} == set(domains.BUDGETS)
    assert all(problem.costs.effective_bits(choice) <= bits for bits, choice in drawn)
