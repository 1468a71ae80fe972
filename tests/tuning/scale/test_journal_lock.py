from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from kvbits.tuning.scale import lock as lock_module
from kvbits.tuning.scale.ledger import Ledger
from kvbits.tuning.scale.lock import OwnedLock
from kvbits.tuning.scale.storage import open_storage
from kvbits.tuning.team import Kind

KIND = Kind("search", ("loss",))
FORK = multiprocessing.get_context("fork")


def die_holding(path, text: str = "") -> None:
    """A process takes the lock, writes a piece of a line and is killed."""

    def die():
        OwnedLock(path).acquire()
        with path.open("a") as handle:
            handle.write(text)
        os.kill(os.getpid(), signal.SIGKILL)

    owner = FORK.Process(target=die)
    owner.start()
    owner.join()


def test_lock_of_a_killed_process_is_broken_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "GRACE_S", 1e9)
    path = tmp_path / "journal"
    die_holding(path)
    assert (tmp_path / "journal.lock").is_symlink()
    lock = OwnedLock(path)
    assert lock.acquire()
    lock.release()
    assert not (tmp_path / "journal.lock").is_symlink()


def test_line_torn_by_a_kill_is_cut(tmp_path):
    """A line that goes on with the next one would make the whole journal unreadable."""
    path = tmp_path / "journal"
    ledger = Ledger(open_storage(f"journal:{path}"), "study")
    ledger.finish(ledger.claim(KIND, "[1]"), {"loss": 1.0})
    die_holding(path, '{"op_code":4,"worker_id":"0a1b')
    ledger.finish(ledger.claim(KIND, "[2]"), {"loss": 2.0})
    again = Ledger(open_storage(f"journal:{path}"), "study")
    assert again.records(KIND) == {"[1]": {"loss": 1.0}, "[2]": {"loss": 2.0}}


def test_lock_of_another_machine_is_broken_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "GRACE_S", 0.05)
    os.symlink("elsewhere/1/1", tmp_path / "journal.lock")
    assert OwnedLock(tmp_path / "journal").acquire()


def test_lock_is_exclusive(tmp_path):
    """Four processes count to 50 in one file; every lost update would leave a smaller number."""
    path, counter = tmp_path / "journal", tmp_path / "counter"
    counter.write_text("0")

    def count():
        lock = OwnedLock(path)
        for _ in range(50):
            lock.acquire()
            counter.write_text(str(int(counter.read_text()) + 1))
            lock.release()

    workers = [FORK.Process(target=count) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.read_text() == "200"


def test_broken_lock_is_not_released_for_its_new_owner(tmp_path):
    lock = OwnedLock(tmp_path / "journal")
    lock.acquire()
    (tmp_path / "journal.lock").unlink()
    os.symlink("elsewhere/1/1", tmp_path / "journal.lock")
    with pytest.raises(RuntimeError, match="must be this process's"):
        lock.release()
    assert (tmp_path / "journal.lock").is_symlink()
