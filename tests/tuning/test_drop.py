from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from kvbits.evaluation.statistics import paired_difference
from kvbits.tuning import drop
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.drop import Answers, DropLimit, fewest_problems
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Allocation

N = 400


@pytest.fixture(scope="module")
def candidates(tiny_model_dir):
    return of_mode(AutoConfig.from_pretrained(tiny_model_dir), "per_token", (8, 4, 3, 2))


@pytest.fixture
def solve(monkeypatch):
    """Answers that get worse with the bits a plan saves; the calls made."""
    calls = []

    def run_task(model, tokenizer, task, *, n, seed, split, plan):
        bits = 16.0 if plan is None else plan.effective_bits
        calls.append((bits, split, plan is None))
        lost = round(n * max(0.0, 5.0 - bits) * 0.02)  # 2 points for every bit below 5
        order = np.random.default_rng(seed).permutation(n)
        return SimpleNamespace(correct=tuple(bool(i >= lost) for i in order), seconds=0.0)

    monkeypatch.setattr(drop, "run_task", run_task)
    return calls


def answers(candidates, path, most=0.02, rule="estimate", n=N):
    limit = DropLimit(most, rule, "passkey", n, 0)
    return Answers(None, None, candidates, limit, RunDir(path), Silent())


def front_of(candidates) -> list[Allocation]:
    """Plans of every mixture of two neighbouring uniform widths, and full precision."""
    labels = [column.label for column in candidates.columns]
    columns = [labels.index(f"K{bits}V{bits}") for bits in (2, 3, 4, 8)]
    steps = list(pairwise(columns))
    choices = [(high,) * k + (low,) * (3 - k) for low, high in steps for k in range(3)]
    choices += [(columns[-1],) * 3, (0, 0, 0)]
    bits = [candidates.plan(choice).effective_bits for choice in choices]
    return [Allocation(c, b, (0.0,), 0.0) for c, b in zip(choices, bits, strict=True)]


def test_bisection_finds_the_smallest_plan_within_the_drop(candidates, tmp_path, solve):
    front = front_of(candidates)
    assert [p.effective_bits for p in front] == sorted(p.effective_bits for p in front)
    found = answers(candidates, tmp_path).smallest(front)
    fitting = [p for p in front if (5.0 - p.effective_bits) * 0.02 <= 0.02 + 1e-9]
    assert found == fitting[0]
    assert len(solve) <= 6  # full precision and log2 of eleven plans
    assert {split for _, split, _ in solve} == {"valid"}


def test_the_next_smaller_plan_was_measured_and_refused(candidates, tmp_path, solve):
    front = front_of(candidates)
    found = front.index(answers(candidates, tmp_path).smallest(front))
    assert any(bits == pytest.approx(front[found - 1].effective_bits) for bits, *_ in solve)


def test_the_interval_rule_asks_for_more_bits_than_the_estimate(candidates, tmp_path, solve):
    front = front_of(candidates)
    by_estimate = answers(candidates, tmp_path / "a").smallest(front)
    careful = answers(candidates, tmp_path / "b", rule="interval")
    by_interval = careful.smallest(front)
    assert by_interval.effective_bits > by_estimate.effective_bits
    assert careful.difference(by_interval.choice).low >= -0.02


def test_full_precision_is_left_where_nothing_else_passes(candidates, tmp_path, monkeypatch):
    def run_task(*_, n, plan, **__):
        return SimpleNamespace(correct=(plan is None,) * n, seconds=0.0)

    monkeypatch.setattr(drop, "run_task", run_task)
    front = front_of(candidates)
    assert answers(candidates, tmp_path).smallest(front).choice == (0, 0, 0)


def test_answers_are_read_again_from_disk(candidates, tmp_path, solve):
    front = front_of(candidates)
    first = answers(candidates, tmp_path).smallest(front)
    count = len(solve)
    assert answers(candidates, tmp_path).smallest(front) == first
    assert len(solve) == count


def test_account_says_whether_the_limit_is_shown_and_how_many_problems_would_tell(
    candidates, tmp_path, solve
):
    """4 bits lose 8 of 400: the interval reaches beyond a limit of 3 %."""
    front = front_of(candidates)
    plan = next(p for p in front if p.effective_bits == pytest.approx(4.0))
    told = answers(candidates, tmp_path, most=0.03).account(plan.choice)
    assert told["difference"] == pytest.approx(-0.02)
    assert told["low"] < -0.03 < told["difference"]
    assert not told["is_shown"]
    half = told["difference"] - told["low"]
    assert told["problems_needed"] == pytest.approx(N * (half / 0.01) ** 2, rel=0.01)
    sure = answers(candidates, tmp_path, most=0.2).account(plan.choice)
    assert sure["is_shown"]
    assert sure["problems_needed"] is None


@pytest.mark.parametrize("most", [0.01, 0.02, 0.05])
def test_fewest_problems_are_where_an_unchanged_plan_passes(most):
    n = fewest_problems(most, "interval")
    assert paired_difference([True] * n, [True] * n).low >= -most
    assert paired_difference([True] * (n - 1), [True] * (n - 1)).low < -most
    assert fewest_problems(most, "estimate") == round(1 / most)
