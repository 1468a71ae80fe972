"""Strategies that measure whole plans, with the additive model as the measurement."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from kvbits.errors import RecordError
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search.moead import MoeadProposer
from kvbits.tuning.search.optuna_samplers import OptunaProposer, check_optuna, nsga2, tpe
from kvbits.tuning.search.trials import Limit, Listed, Space, measured_front, run_trials

SPACE = Space(((0, 2), (1,), (3, 4, 5)), ((0, 1, 5, 9), (1, 2, 5, 6), (0, 1, 5, 9)))
WIDE = Space(tuple((i,) for i in range(6)), (tuple(range(1, 10)),) * 6)  # 531,441 plans
LIMIT = Limit(bits=5.0)


class Killed(Exception):
    pass


def moead_proposer(problem: Problem, space: Space = SPACE):
    return MoeadProposer(problem, space, LIMIT, population=8, seed=7)


def nsga2_proposer(problem: Problem, space: Space = SPACE):
    return OptunaProposer(problem, space, LIMIT, nsga2(8), seed=7)


def tpe_proposer(problem: Problem, space: Space = SPACE):
    return OptunaProposer(problem, space, LIMIT, tpe(8), seed=7)


def parallel_moead(problem: Problem, space: Space = SPACE):
    return MoeadProposer(problem, space, LIMIT, population=8, seed=7, parallel=5)


def parallel_nsga2(problem: Problem, space: Space = SPACE):
    return OptunaProposer(problem, space, LIMIT, nsga2(8), seed=7, parallel=8)


def parallel_tpe(problem: Problem, space: Space = SPACE):
    return OptunaProposer(problem, space, LIMIT, tpe(8, is_parallel=True), seed=7, parallel=5)


PROPOSERS = (moead_proposer, nsga2_proposer, tpe_proposer)


def domains_of(problem: Problem, choice):
    return [
        {"kl_nats": kl, "document_kl_nats": [kl], "document_tokens": [10]}
        for kl in problem.predicted_kl(choice).tolist()
    ]


class Backwards:
    """A team that hands in the last step first."""

    def measure(self, kind, steps, one, known):
        for step in reversed(list(dict.fromkeys(steps))):
            if step not in known:
                yield step, one(step)


def run_search(
    make, problem: Problem, path, *, trials: int = 30, kill_after: int | None = None, team=None
):
    """Search; stop short like a kill would."""
    calls = 0

    def evaluate(choice):
        nonlocal calls
        if calls == kill_after:
            raise Killed
        calls += 1
        return domains_of(problem, choice)

    run, settings = RunDir(path), {"trials": trials, "progress": Silent(), "team": team}
    found = run_trials(problem, make(problem), evaluate, run=run, **settings)
    return measured_front(problem, found)


def test_space_spreads_a_pick_over_its_group_and_knows_its_uniform_plans():
    assert SPACE.choice([9, 6, 1]) == (9, 6, 9, 1, 1, 1)
    assert SPACE.uniform() == [(1, 1, 1), (5, 5, 5)]


def test_excess_is_the_share_beyond_the_worse_of_both_limits():
    assert Limit(bits=4.0).excess(5.0, [9.0]) == pytest.approx(0.25)
    assert Limit(kl_nats=0.1).excess(16.0, [0.05, 0.3]) == pytest.approx(2.0)
    assert Limit(bits=4.0, kl_nats=0.1).excess(4.0, [0.05]) <= 0
    assert Limit().excess(99.0, [99.0]) == 0


@pytest.mark.parametrize("make", PROPOSERS)
def test_front_is_undominated_and_starts_with_the_uniform_plans(make, problem, tmp_path):
    front = run_search(make, problem, tmp_path)
    sizes = [point.effective_bits for point in front]
    assert sizes == sorted(set(sizes))
    assert [p.loss for p in front] == sorted((p.loss for p in front), reverse=True)
    lines = RunDir(tmp_path).records("search.jsonl")
    assert len(lines) == 30
    assert [line["choice"] for line in lines[:2]] == [[1] * 6, [5] * 6]


@pytest.mark.parametrize("make", PROPOSERS)
def test_interrupted_search_ends_like_an_uninterrupted_one(make, problem, tmp_path):
    whole = run_search(make, problem, tmp_path / "whole")
    for kill_after in (0, 5, 8):
        with pytest.raises(Killed):
            run_search(make, problem, tmp_path / "killed", kill_after=kill_after)
        with (tmp_path / "killed" / "search.jsonl").open("a") as handle:
            handle.write('{"trial": 11, "cho')
    assert run_search(make, problem, tmp_path / "killed") == whole
    texts = [(tmp_path / name / "search.jsonl").read_bytes() for name in ("whole", "killed")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("make", [parallel_moead, parallel_nsga2, parallel_tpe])
def test_parallel_search_finds_the_same_whoever_is_first(make, problem, tmp_path):
    """In whatever order plans of a batch are measured, and wherever the search was interrupted."""
    whole = run_search(make, problem, tmp_path / "whole")
    assert run_search(make, problem, tmp_path / "back", team=Backwards()) == whole
    for kill_after in (0, 7, 9):
        with pytest.raises(Killed):
            run_search(make, problem, tmp_path / "killed", kill_after=kill_after, team=Backwards())
    assert run_search(make, problem, tmp_path / "killed") == whole
    logs = [
        RunDir(tmp_path / name).records("search.jsonl") for name in ("whole", "back", "killed")
    ]
    in_order = [sorted(log, key=lambda line: line["trial"]) for log in logs]
    assert in_order[0] == in_order[1] == in_order[2]
    assert [line["trial"] for line in in_order[0]] == list(range(30))
    assert logs[0] != logs[1]


def test_generations_measured_at_once_are_those_of_nsga2(problem, tmp_path):
    """Nothing is learnt within a generation, so that workers cost no quality."""
    fronts = [
        run_search(make, problem, tmp_path / make.__name__)
        for make in (nsga2_proposer, parallel_nsga2)
    ]
    assert fronts[0] == fronts[1]


def test_finished_search_measures_nothing_again(problem, tmp_path):
    whole = run_search(moead_proposer, problem, tmp_path)
    assert run_search(moead_proposer, problem, tmp_path, kill_after=0) == whole


@pytest.mark.parametrize(
    ("make", "space", "first"),
    [
        *((moead_proposer, WIDE, 9), (nsga2_proposer, SPACE, 8), (tpe_proposer, SPACE, 8)),
        *((parallel_moead, WIDE, 9), (parallel_tpe, SPACE, 8)),
    ],
)
def test_search_improves_on_its_first_generation(make, space, first, problem, tmp_path):
    """The uniform plans and a few random ones against more than 50 trials behind them."""

    def best(trials):
        front = run_search(lambda p: make(p, space), problem, tmp_path, trials=trials)
        return min(p.loss for p in front if p.effective_bits <= 5.0)

    assert best(60) < best(first)


@pytest.mark.parametrize("make", PROPOSERS)
def test_search_keeps_within_its_soft_limit_more_often_than_chance(make, problem, tmp_path):
    """Of random picks a third fits (counted over the whole space); of later trials most do."""
    sizes = [
        problem.costs.effective_bits(SPACE.choice([a, b, c]))
        for a in SPACE.candidates[0]
        for b in SPACE.candidates[1]
        for c in SPACE.candidates[2]
    ]
    by_chance = np.mean(np.array(sizes) <= 5.0)
    run_search(make, problem, tmp_path, trials=60)
    late = RunDir(tmp_path).records("search.jsonl")[20:]
    assert np.mean([line["effective_bits"] <= 5.0 for line in late]) > by_chance


def test_moead_comes_near_the_front_of_the_whole_space(problem, tmp_path):
    """Sixty trials in 64 plans: none within the limit is 2 % better than the best found."""
    every = {
        SPACE.choice([a, b, c])
        for a in SPACE.candidates[0]
        for b in SPACE.candidates[1]
        for c in SPACE.candidates[2]
    }
    losses = [problem.allocation(c).loss for c in every if problem.costs.effective_bits(c) <= 5.0]
    front = run_search(moead_proposer, problem, tmp_path, trials=60)
    found = min(p.loss for p in front if p.effective_bits <= 5.0)
    assert found <= 1.02 * min(losses)


def test_records_of_another_search_are_refused(problem, tmp_path):
    run_search(nsga2_proposer, problem, tmp_path, trials=12)
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    lines[3]["choice"] = np.roll(lines[3]["choice"], 1).tolist()
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match="same trials, got another choice in trial 3"):
        run_search(nsga2_proposer, problem, tmp_path)


def test_plans_of_another_stage_are_recorded_but_not_measured_again(problem, tmp_path):
    run, choices = RunDir(tmp_path), [(1,) * 6, (5,) * 6]
    calls = []

    def evaluate(choice):
        calls.append(choice)
        return domains_of(problem, choice)

    for stage in ("4 bits", "6 bits"):
        found = run_trials(
            problem, Listed(choices), evaluate, trials=9, run=run, progress=Silent(), stage=stage
        )
        assert list(found) == choices
    assert calls == choices
    stages = [line["stage"] for line in run.records("search.jsonl")]
    assert stages == ["4 bits"] * 2 + ["6 bits"] * 2


def test_missing_optuna_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna must be .*pip install 'kvbits\[tune\]'"):
        check_optuna()
