"""The lock of a journal file, which does not outlive its owner.

Optuna's own lock is a link that stays when its owner is killed: everybody then waits half a minute
before they break it. This one is a link too, which network file systems make atomically, but it
says whose it is, so on the owner's machine it is broken at once. A line that the owner had not
written to its end is cut: the system may end a write of more than a page in the middle.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from kvbits.tuning.scale.process import is_gone, process_name

GRACE_S = 30.0  # Optuna's, for owners on other machines
LONGEST_PAUSE_S = 0.1


class OwnedLock:
    """A lock as ``JournalFileBackend`` takes one.

    Args:
        path: Of the journal; the lock lies beside it, where Optuna's would.
    """

    def __init__(self, path: Path) -> None:
        self._journal, self._link = path, path.with_name(f"{path.name}.lock")

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        seen, since, pause = "", time.monotonic(), 0.001
        while True:
            try:
                os.symlink(process_name(), self._link)
                return True
            except FileExistsError:
                state = self._state()
            if state != seen:
                seen, since = state, time.monotonic()
            owner = state.partition(" ")[0]
            if owner and (is_gone(owner) or time.monotonic() - since > GRACE_S):
                self._break(state)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def release(self) -> None:
        """Let go of the lock, unless it was broken meanwhile.

        Raises:
            RuntimeError: It was.
        """
        if self._state().partition(" ")[0] != process_name():
            raise RuntimeError(f"the lock of {self._journal} must be this process's to release it")
        self._link.unlink()

    def _state(self) -> str:
        """The owner and when it took the lock; nothing if nobody has it."""
        try:
            return f"{os.readlink(self._link)} {self._link.lstat().st_mtime_ns}"
        except OSError:
            return ""

    def _break(self, state: str) -> None:
        """Remove the lock if it is still the one that was looked at, and what its owner tore.

        One process at a time, so that none removes the lock of the next owner. A line that was
        not written to its end would otherwise be joined to the next one.
        """
        with self._journal.open("ab+") as journal:
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(journal, fcntl.LOCK_EX)
            if self._state() != state:
                return
            journal.seek(0)
            journal.truncate(journal.read().rfind(b"\n") + 1)
            self._link.unlink(missing_ok=True)
