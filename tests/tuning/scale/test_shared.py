"""Real processes over real storages; ``kill -9`` is SIGKILL. A fork spares importing again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from kvbits.errors import RecordError, StorageError
from kvbits.tuning.calibrated import check_calibrated
from kvbits.tuning.identity import Data
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.scale import lock, process, shared
from kvbits.tuning.scale.ledger import Ledger
from kvbits.tuning.scale.shared import Shared
from kvbits.tuning.scale.storage import open_storage
from kvbits.tuning.team import Kind

KIND = Kind("search", ("loss",))
IDENTITY = {"settings": {"bits": 4.0, "text": None, "heldout_text": None}, "versions": {"x": 1}}
NO_DATA = Data((), ())
STEPS = [(0, index) for index in range(8)]
FORK = multiprocessing.get_context("fork")
_names = itertools.count()


@pytest.fixture
def study() -> str:
    """A name of its own in the one database of all tests."""
    return f"study-{next(_names)}"


class Worker:
    """A process that measures ``STEPS`` and writes down what it measured and what it was given.

    The first of all workers to reach ``hang`` says so and stops there.
    """

    def __init__(self, address, study, folder: Path, *, machine=None, hang=None) -> None:
        self.address, self.study, self.folder = address, study, folder
        self.machine, self.hang = machine, hang
        self.process = FORK.Process(target=self.run)
        self.process.start()

    def run(self) -> None:
        if self.machine:
            process._machine = lambda: self.machine
            shared.BEAT_S, lock.GRACE_S = 0.05, 1.0  # a victim may die with the lock in its hand
        run = RunDir(self.folder / f"run-{os.getpid()}")
        team = Shared(self.address, self.study, grace_s=1.0)
        with team.join(IDENTITY, run, NO_DATA):
            for step, record in team.measure(KIND, STEPS, self.measure, {}):
                run.append("given.jsonl", {"step": step, **record})

    def measure(self, step):
        with (self.folder / "measured").open("a") as handle:
            handle.write(f"{step[1]}\n")
        marker = self.folder / "hangs"
        if step == self.hang and not marker.exists():
            partial = marker.with_suffix(f".{os.getpid()}")
            partial.write_text(str(os.getpid()))
            partial.rename(marker)
            signal.pause()
        time.sleep(0.01)
        return {"loss": step[1] / 2, "by": os.getpid()}

    def given(self):
        path = self.folder / f"run-{self.process.pid}" / "given.jsonl"
        return {line["step"][1]: line for line in map(json.loads, path.read_text().splitlines())}


def measured(folder: Path) -> Counter[int]:
    return Counter(map(int, (folder / "measured").read_text().split()))


def wait_for(path: Path) -> int:
    """The process that wrote its number there."""
    for _ in range(1000):
        if path.exists():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"nothing wrote {path.name}")


def end(workers) -> None:
    for worker in workers:
        worker.process.join(30)
        assert worker.process.exitcode == 0


def test_no_two_workers_measure_the_same_and_all_get_everything(address, study, tmp_path):
    workers = [Worker(address, study, tmp_path) for _ in range(3)]
    end(workers)
    assert measured(tmp_path) == Counter(range(8))
    first = workers[0].given()
    assert sorted(first) == list(range(8))
    assert all(worker.given() == first for worker in workers)


def test_killed_worker_loses_its_step_alone(address, study, tmp_path):
    workers = [Worker(address, study, tmp_path, hang=STEPS[5]) for _ in range(3)]
    victim = wait_for(tmp_path / "hangs")
    os.kill(victim, signal.SIGKILL)
    dead = next(worker for worker in workers if worker.process.pid == victim)
    dead.process.join()
    end(worker for worker in workers if worker is not dead)
    assert measured(tmp_path) == Counter(range(8)) + Counter([5])
    late = Worker(address, study, tmp_path)
    end([late])
    assert sorted(late.given()) == list(range(8))
    assert measured(tmp_path).total() == 9


def test_interrupted_worker_gives_its_claim_back(study, tmp_path):
    """Another host sees the claim gone at its first look, before it could know of any death."""
    address = f"journal:{tmp_path / 'shared'}"
    worker = Worker(address, study, tmp_path, machine="a", hang=STEPS[0])
    wait_for(tmp_path / "hangs")
    ledger = Ledger(open_storage(address), study)
    assert ledger.claimed(KIND) == {"[0, 0]"}
    os.kill(worker.process.pid, signal.SIGINT)
    worker.process.join(30)
    assert ledger.claimed(KIND) == set()


def test_worker_of_another_host_is_dead_when_it_stops_beating(address, study, tmp_path):
    """Hosts cannot see each other's processes: one is killed, the other notices by its silence."""
    victim = Worker(address, study, tmp_path, machine="a", hang=STEPS[0])
    wait_for(tmp_path / "hangs")
    os.kill(victim.process.pid, signal.SIGKILL)
    other = Worker(address, study, tmp_path, machine="b")
    end([other])
    assert set(measured(tmp_path)) == set(range(8))
    assert measured(tmp_path)[0] == 2


def test_worker_that_lost_its_claim_takes_the_other_ones_record(tmp_path, study):
    """A host that was frozen past the grace wakes up and ends its measurement."""
    address = f"journal:{tmp_path / 'shared'}"
    storage = open_storage(address)
    slow, fast = Ledger(storage, study), Ledger(storage, study, grace_s=-1.0)
    slow.worker, fast.worker = "a/1/1", "b/1/1"
    claim = slow.claim(KIND, "[0]")
    assert fast.claimed(KIND) == set()  # silent for longer than the grace
    again = fast.claim(KIND, "[0]")
    assert fast.finish(again, {"loss": 1.0, "by": "fast"})
    assert not slow.finish(claim, {"loss": 2.0, "by": "slow"})
    assert slow.records(KIND) == {"[0]": {"loss": 1.0, "by": "fast"}}


def test_of_two_claims_the_first_wins(address, study):
    storage = open_storage(address)
    first, second = Ledger(storage, study), Ledger(open_storage(address), study)
    second.worker = "elsewhere/1/1"
    claim = first.claim(KIND, "[1]")
    assert claim is not None
    assert second.claim(KIND, "[1]") is None
    assert second.claimed(KIND) == {"[1]"}
    first.give_up(claim)
    assert second.claim(KIND, "[1]") is not None
    assert second.records(KIND) == {}


def test_claim_left_by_an_earlier_attempt_of_this_process_is_abandoned(tmp_path, study):
    """An interrupted notebook goes on in the process that made the claim."""
    storage = open_storage(f"journal:{tmp_path / 'shared'}")
    assert Ledger(storage, study).claim(KIND, "[1]") is not None
    again = Ledger(storage, study)
    assert again.claimed(KIND) == set()
    assert again.claim(KIND, "[1]") is not None
    assert again.claimed(KIND) == {"[1]"}


def test_values_are_where_optuna_looks_for_them(address, study):
    ledger = Ledger(open_storage(address), study)
    ledger.finish(ledger.claim(KIND, "[1]"), {"loss": 0.25, "labels": ["K4V2"]})
    loaded = optuna.load_study(study_name=f"{study}/search", storage=open_storage(address))
    (trial,) = loaded.trials
    assert trial.values == [0.25]
    assert trial.user_attrs["record"]["labels"] == ["K4V2"]


def test_what_was_measured_alone_is_given_to_the_others(study, tmp_path):
    address = f"journal:{tmp_path / 'shared'}"
    known = {step: {"loss": 1.0, "by": "before"} for step in STEPS[:6]}
    calls = []

    def one(step):
        calls.append(step)
        return {"loss": 2.0}

    for given, fresh in ((known, 2), ({}, 0)):
        team = Shared(address, study)
        with team.join(IDENTITY, RunDir(tmp_path / f"run{fresh}"), NO_DATA):
            found = dict(team.measure(KIND, STEPS, one, given))
        assert len(calls) == 2
        assert len(found) == 8 - len(given)
    assert found[STEPS[0]]["by"] == "before"


def test_failed_measurement_is_left_to_others(study, tmp_path):
    address = f"journal:{tmp_path / 'shared'}"

    def fails(step):
        raise ValueError("no")

    for one, expected in ((fails, None), (lambda step: {"loss": 0.0}, 8)):
        team = Shared(address, study)
        with team.join(IDENTITY, RunDir(tmp_path / "run"), NO_DATA):
            if expected is None:
                with pytest.raises(ValueError, match="no"):
                    list(team.measure(KIND, STEPS, one, {}))
            else:
                assert len(list(team.measure(KIND, STEPS, one, {}))) == expected


def test_storage_lost_on_the_way_is_named_without_its_password(study, tmp_path, monkeypatch):
    pytest.importorskip("psycopg", reason="psycopg is not installed")

    def lost(*_):
        error = optuna.exceptions.StorageInternalError("a page of advice")
        raise error from ConnectionError("the server closed the connection")

    monkeypatch.setattr(shared, "open_storage", lambda _: optuna.storages.InMemoryStorage())
    monkeypatch.setattr(Ledger, "records", lost)
    message = r"got postgresql://me:\*\*\*@db/x: the server closed the connection; start the same"
    team = Shared("postgresql://me:secret@db/x", study)
    with (
        pytest.raises(StorageError, match=message),
        team.join(IDENTITY, RunDir(tmp_path), NO_DATA),
    ):
        list(team.measure(KIND, STEPS, lambda step: {"loss": 0.0}, {}))


def test_trials_that_are_not_of_kvbits_are_refused(study, tmp_path):
    storage = open_storage(f"journal:{tmp_path / 'shared'}")
    optuna.create_study(study_name=f"{study}/search", storage=storage).add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(StorageError, match=f"in {study}/search, got one without key and worker"):
        Ledger(storage, study).records(KIND)


def test_workers_that_fitted_other_plans_are_refused(study, tmp_path):
    address = f"journal:{tmp_path / 'shared'}"
    for name, text, is_refused in (("a", "1", False), ("b", "1", False), ("c", "2", True)):
        run = RunDir(tmp_path / name)
        run.file("calibrated").mkdir()
        run.file("calibrated/fitted.json").write_text(text)
        team = Shared(address, study)
        with team.join(IDENTITY, run, NO_DATA):
            if not is_refused:
                check_calibrated(run, team)
            else:
                with pytest.raises(RecordError, match=r"another fitted .*copy calibrated/ from"):
                    check_calibrated(run, team)


def test_storage_of_another_study_is_refused_with_the_difference(address, study, tmp_path):
    with Shared(address, study).join(IDENTITY, RunDir(tmp_path / "a"), NO_DATA):
        pass
    moved = {**IDENTITY, "versions": {"x": 2}}
    moved["settings"] = {**IDENTITY["settings"], "text": "elsewhere.txt"}
    with Shared(address, study).join(moved, RunDir(tmp_path / "b"), NO_DATA):
        pass
    other = {**IDENTITY, "settings": {"bits": 5.0}}
    message = (
        rf"got '{study}' in it made with another settings bits \(4.0 there, 5.0 now\); .*--st"
    )
    with (
        pytest.raises(RecordError, match=message),
        Shared(address, study).join(other, RunDir(tmp_path / "c"), NO_DATA),
    ):
        pass
