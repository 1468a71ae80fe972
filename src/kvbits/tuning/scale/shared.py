"""A team of processes: each works through the whole study, and each measurement is made by one.

All of them propose the same trials, since proposals depend on the seed and on what was measured
alone. What takes time is measuring; so a step is claimed in a ledger, measured by whoever claimed
it, and read there by the others. A worker that ends in the middle of a step leaves a claim that
another takes over.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvbits.errors import StorageError
from kvbits.tuning.identity import Data
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.scale.ledger import BEAT_S, GRACE_S, Claim, Ledger, key_of
from kvbits.tuning.scale.storage import check_address, open_storage, shown
from kvbits.tuning.scale.workers import Helpers, Place
from kvbits.tuning.team import Kind, Record, Step

STUDY = "kvbits"
JOURNAL = "journal.log"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class Shared:
    """This process and all others that measure for the same study in a storage.

    Args:
        address: ``journal:PATH``, ``sqlite:PATH`` or ``postgresql://...``; by default a journal in
            the run directory, for workers of one host.
        study: Name of the study in the storage.
        helpers: Further workers on this host, started when there is something to measure.
        grace_s: Seconds without a sign of life after which a worker on another host is dead.

    Raises:
        ValueError: ``address`` has another form.
        StorageError: It cannot be opened.
        ImportError: Optuna or a database driver is missing.
    """

    def __init__(
        self,
        address: str | None = None,
        study: str = STUDY,
        *,
        helpers: Helpers | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        check_address(address or f"journal:{JOURNAL}")
        self._storage = open_storage(address) if address else None
        self._address, self._name, self._grace_s = address, study, grace_s
        self._helpers = helpers
        self._ledger: Ledger

    @contextmanager
    def join(self, identity: Mapping[str, Any], run: RunDir, data: Data) -> Iterator[None]:
        """Work on a study; the others of this host leave it together with this process.

        Raises:
            StorageError: The storage is lost on the way.
            RecordError: It holds another study under this name.
        """
        address = self._address or f"journal:{run.file(JOURNAL)}"
        stopped = threading.Event()
        with _named(address):
            storage = self._storage or open_storage(address)
            self._ledger = Ledger(storage, self._name, grace_s=self._grace_s)
            self._ledger.check_identity(_portable(identity))
            self._ledger.beat()
            pulse = threading.Thread(target=self._keep_beating, args=(stopped,), daemon=True)
            pulse.start()
            try:
                if self._helpers:
                    self._helpers.prepare(Place(run.path, address, self._name, data))
                yield
            finally:
                stopped.set()
                pulse.join()  # or it might end with the lock of a journal in its hand
                if self._helpers:
                    self._helpers.stop()

    def measure(
        self,
        kind: Kind,
        steps: Iterable[Step],
        one: Callable[[Step], Record],
        known: Mapping[Step, Record],
    ) -> Iterator[tuple[Step, Record]]:
        steps = list(steps)
        left = {key_of(step): step for step in steps if step not in known}
        self._publish(kind, {key_of(s): known[s] for s in steps if s in known})
        pause = FIRST_PAUSE_S
        while left:
            records = self._ledger.records(kind)
            for key in [key for key in left if key in records]:
                yield left.pop(key), records[key]
                pause = FIRST_PAUSE_S
            if not left:
                break
            if self._helpers:
                self._helpers.tend()
            claim = self._claim(kind, list(left))
            if claim is not None:
                pause = FIRST_PAUSE_S
                self._run(*claim, lambda key: one(left[key]))
            else:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _publish(self, kind: Kind, known: Mapping[str, Record]) -> None:
        """Give the others what this process measured before it shared the study."""
        if known:
            there = self._ledger.records(kind)
            self._ledger.publish(kind, ((k, r) for k, r in known.items() if k not in there))

    def _claim(self, kind: Kind, keys: list[str]) -> tuple[str, Claim] | None:
        """Claim one of some steps; workers begin at different ones, to meet seldom."""
        taken = self._ledger.claimed(kind)
        free = [key for key in keys if key not in taken]
        start = zlib.crc32(self._ledger.worker.encode()) % max(1, len(free))
        for key in free[start:] + free[:start]:
            claim = self._ledger.claim(kind, key)
            if claim is not None:
                return key, claim
        return None

    def _run(self, key: str, claim: Claim, one: Callable[[str], Record]) -> None:
        """Measure a claimed step; the record counts once the ledger has taken it."""
        try:
            self._ledger.finish(claim, one(key))
        except BaseException:
            self._ledger.give_up(claim)
            raise

    def _keep_beating(self, stopped: threading.Event) -> None:
        while not stopped.wait(BEAT_S):
            try:
                self._ledger.beat()
            except Exception:
                continue  # the process itself meets the same trouble, and reports it


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Name the storage where Optuna loses it."""
    from optuna.exceptions import OptunaError

    try:
        yield
    except OptunaError as error:
        cause = error.__cause__ or error
        reason = " ".join(str(getattr(cause, "orig", cause)).split())[:200]
        raise StorageError(
            f"storage must stay reachable, got {shown(address)}: {reason}; start the same "
            "command again to continue"
        ) from error


def _portable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where a host has its texts: checksums of the data say what is in them."""
    settings = {
        name: value
        for name, value in identity["settings"].items()
        if name not in ("text", "heldout_text", "calibration")
    }
    return {**identity, "settings": settings}
