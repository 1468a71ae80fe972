"""Whole studies on a random model, by processes that are killed while they work."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.evaluation.corpora import TokenSet
from kvbits.tuning import Data, Silent, TuneSettings, scale, tune
from kvbits.tuning.scale import Helpers, Job, Shared
from kvbits.tuning.scale.storage import open_storage
from kvbits.tuning.scale.workers import Place

SETTINGS = TuneSettings(
    bits=4.5, strategy="moead", trials=14, population=6, parallel=5, widths=(4, 2), task_n=0,
    random_plans=1,
)  # fmt: skip
FILES = ("plan.json", "front.json", "pruned.json", "errors.jsonl")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def data():
    def token_set(domain: str, split: str, seed: int) -> TokenSet:
        ids = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(seed))
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, 0] = False
        return TokenSet(f"{domain}_{split}", domain, split, ids, counted)

    splits = ("calibration", "heldout")
    return Data(*([token_set(d, split, ord(d[0]) + n) for d in ("text", "recall")]
                  for n, split in enumerate(splits)))  # fmt: skip


@pytest.fixture(scope="module")
def alone(loaded, data, tmp_path_factory):
    """What one worker finds."""
    path = tmp_path_factory.mktemp("alone")
    tune(*loaded, SETTINGS, path, data=data)
    return path


def same_as(alone, path) -> bool:
    return all((path / name).read_bytes() == (alone / name).read_bytes() for name in FILES)


class Kills(Silent):
    """Progress that kills a helper, or with none of them left itself, at some steps of a stage."""

    def __init__(self, helpers: Helpers | None, note, stage: str, steps) -> None:
        self.helpers, self.note, self.stage, self.steps = helpers, note, stage, set(steps)
        self.now, self.done = "", 0

    def start(self, stage, total):
        self.now, self.done = stage, 0

    def advance(self, steps=1):
        self.done += steps
        if self.now != self.stage or self.done not in self.steps:
            return
        running = {i: p for i, p in self.helpers._processes.items() if p.is_alive()}
        with self.note.open("a") as handle:
            handle.write("".join(f"{process.pid}\n" for process in running.values()))
        if self.done == max(self.steps):
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(next(iter(running.values())).pid, signal.SIGKILL)


def helpers_of(loaded) -> Helpers:
    """A helper that is forked, so that it need not load."""
    return Helpers(Job(lambda device: loaded, ["cpu"], SETTINGS), start_method="fork")


def work(loaded, data, path, address, note="", stage="", steps=(), *, is_alone=False) -> None:
    helpers = None if is_alone else helpers_of(loaded)
    progress = Kills(helpers, note, stage, steps) if steps else Silent()
    team = Shared(address, helpers=helpers)
    tune(*loaded, SETTINGS, path, progress, data=data, team=team)


def run(*arguments) -> int:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def wait_until_gone(pids) -> None:
    """Processes whose parent is gone are reaped by the system's first."""
    for _ in range(500):
        left = [pid for pid in pids if _is_running(pid)]
        if not left:
            return
        time.sleep(0.02)
    raise AssertionError(f"helpers outlived their parent: {left}")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def completed(address: str, kind: str) -> Counter[str]:
    storage = open_storage(address)
    trials = storage.get_all_trials(storage.get_study_id_from_name(f"kvbits/{kind}"))
    return Counter(t.user_attrs["key"] for t in trials if t.state.name == "COMPLETE")


def test_study_whose_workers_and_host_are_killed_ends_as_that_of_one_worker(
    loaded, data, alone, tmp_path
):
    """A helper dies and is started again; then the first worker dies, and its helpers with it."""
    path, note = tmp_path / "run", tmp_path / "pids"
    address = f"journal:{tmp_path / 'shared'}"
    killed = (loaded, data, path, address, note, "search", (4, 9))
    assert run(*killed) == -signal.SIGKILL
    assert not (path / "plan.json").exists()
    before = completed(address, "search")
    assert before.total() >= 9
    wait_until_gone(map(int, note.read_text().split()))
    assert run(loaded, data, path, address) == 0
    assert same_as(alone, path)
    assert not (path / "workers").exists()
    for kind in ("errors", "sensitivity", "search", "verification"):
        assert set(completed(address, kind).values()) == {1}, kind
    lines = [json.loads(line) for line in (path / "search.jsonl").read_text().splitlines()]
    assert sorted(line["trial"] for line in lines) == list(range(14))


def test_hosts_that_share_a_database_find_the_same(loaded, data, alone, tmp_path):
    """Each has a run directory of its own; together they measure what one would."""
    address = f"sqlite:{tmp_path / 'shared'}"
    hosts = [
        FORK.Process(
            target=work, args=(loaded, data, tmp_path / name, address), kwargs={"is_alone": True}
        )
        for name in "ab"
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(120)
        assert host.exitcode == 0
    assert same_as(alone, tmp_path / "a")
    assert same_as(alone, tmp_path / "b")
    for kind in ("errors", "sensitivity", "search", "verification"):
        assert set(completed(address, kind).values()) == {1}, kind


def test_study_begun_alone_goes_on_with_workers_and_back(loaded, data, alone, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for name in ("study.json", "errors.jsonl", "sensitivity.jsonl"):
        (path / name).write_bytes((alone / name).read_bytes())
    lines = (alone / "search.jsonl").read_bytes().splitlines(keepends=True)
    (path / "search.jsonl").write_bytes(b"".join(lines[:7]))
    tune(*loaded, SETTINGS, path, data=data, team=Shared(helpers=helpers_of(loaded)))
    assert same_as(alone, path)
    assert completed(f"journal:{path / 'journal.log'}", "sensitivity").total() == 24
    for name in ("plan.json", "front.json"):
        (path / name).unlink()
    tune(*loaded, SETTINGS, path, data=data)
    assert same_as(alone, path)


def test_helper_that_cannot_live_is_done_without(loaded, data, alone, tmp_path, capfd):
    def load(device):
        raise ValueError("there is no room for the model")

    helpers = Helpers(Job(load, ["cpu"], SETTINGS), start_method="fork")
    tune(*loaded, SETTINGS, tmp_path / "run", data=data, team=Shared(helpers=helpers))
    assert same_as(alone, tmp_path / "run")
    said = capfd.readouterr().err
    assert "kvbits: worker 2 on cpu: there is no room for the model" in said
    assert said.count("worker 2") <= 3
    assert "Traceback" not in said


def test_helpers_take_over_what_was_calibrated(loaded, data, tmp_path):
    (tmp_path / "calibrated").mkdir()
    (tmp_path / "calibrated/fitted.json").write_text("a plan")
    helpers = helpers_of(loaded)
    helpers.prepare(Place(tmp_path, f"journal:{tmp_path / 'shared'}", "kvbits", data))
    helpers.tend()
    assert (tmp_path / "workers/1/calibrated/fitted.json").read_text() == "a plan"
    helpers.stop()
    assert not (tmp_path / "workers").exists()


def test_team_of_one_without_a_storage_is_this_process(loaded):
    assert isinstance(scale.team(lambda device: loaded, SETTINGS, ["cpu"]), scale.Alone)
    assert isinstance(scale.team(lambda device: loaded, SETTINGS, ["cpu"] * 2), Shared)
    with pytest.raises(ValueError, match="devices must name one per worker"):
        scale.team(lambda device: loaded, SETTINGS, [])
