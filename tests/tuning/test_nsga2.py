from __future__ import annotations

import json

import numpy as np
import pytest

from kvbits.errors import RecordError
from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import nsga2

SPACE = nsga2.Space(((0, 2), (1,), (3, 4, 5)), ((0, 1, 5, 9), (1, 2, 5, 6), (0, 1, 5, 9)))


class Killed(Exception):
    pass


def run_search(problem: Problem, path, *, trials: int = 30, kill_after: int | None = None):
    """Search with the additive model as the measurement; stop short like a kill would."""
    calls = 0

    def evaluate(choice):
        nonlocal calls
        if calls == kill_after:
            raise Killed
        calls += 1
        return tuple(problem.predicted_kl(choice).tolist())

    settings = nsga2.Settings(trials=trials, population=8, seed=7, budget_bits=5.0)
    return nsga2.search(problem, SPACE, evaluate, settings, run=RunDir(path), progress=Silent())


def test_space_spreads_a_pick_over_its_group():
    assert SPACE.choice([9, 6, 1]) == (9, 6, 9, 1, 1, 1)


def test_front_is_undominated_and_starts_with_the_uniform_plans(problem, tmp_path):
    front = run_search(problem, tmp_path)
    sizes = [point.effective_bits for point in front]
    assert sizes == sorted(set(sizes))
    assert [p.loss for p in front] == sorted((p.loss for p in front), reverse=True)
    lines = RunDir(tmp_path).records("search.jsonl")
    assert len(lines) == 30
    assert [line["choice"] for line in lines[:2]] == [[1] * 6, [5] * 6]


def test_interrupted_search_ends_like_an_uninterrupted_one(problem, tmp_path):
    whole = run_search(problem, tmp_path / "whole")
    for kill_after in (0, 5, 12):
        with pytest.raises(Killed):
            run_search(problem, tmp_path / "killed", kill_after=kill_after)
    assert run_search(problem, tmp_path / "killed") == whole
    texts = [(tmp_path / name / "search.jsonl").read_bytes() for name in ("whole", "killed")]
    assert texts[0] == texts[1]


def test_torn_journal_and_stale_lock_are_survived(problem, tmp_path):
    whole = run_search(problem, tmp_path / "whole")
    run_search(problem, tmp_path / "torn", trials=11)
    journal = tmp_path / "torn" / "optuna.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    (tmp_path / "torn" / "optuna.journal.lock").symlink_to(journal)
    with (tmp_path / "torn" / "search.jsonl").open("a") as handle:
        handle.write('{"trial": 11, "cho')
    assert run_search(problem, tmp_path / "torn") == whole


def test_finished_search_measures_nothing_again(problem, tmp_path):
    whole = run_search(problem, tmp_path)
    assert run_search(problem, tmp_path, kill_after=0) == whole


def test_search_improves_on_its_first_generation(problem, tmp_path):
    """Eight random trials against 92 more: the chance that none of them is better is nil."""

    def best(front):
        return min(p.loss for p in front if p.effective_bits <= 5.0)

    early = best(run_search(problem, tmp_path / "a", trials=8))
    late = best(run_search(problem, tmp_path / "b", trials=60))
    assert late < early


def test_records_of_another_search_are_refused(problem, tmp_path):
    run_search(problem, tmp_path, trials=12)
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    lines[3]["choice"] = np.roll(lines[3]["choice"], 1).tolist()
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "optuna.journal").unlink()
    with pytest.raises(RecordError, match="same trials, got another choice in trial 3"):
        run_search(problem, tmp_path)
