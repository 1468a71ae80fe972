"""Claims and results of measurements in a storage of Optuna, whichever that is.

A measurement is a trial: running while a worker has claimed it, complete with its record, failed
when its claim was given up. Each kind of measurement is a study of Optuna beside the one that
holds the study's identity and its workers' signs of life, so that Optuna's tools can read them.

A claim is won by number. Storages number the trials of a study one after the other, so of two
workers that claim the same measurement at the same time both see who was first. A record belongs
to the first complete trial of its key.

Whether a worker lives is told by its process on the same machine, and by a counter that it keeps
writing on others. A counter is compared with itself alone: clocks of hosts do not matter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from kvbits.errors import StorageError
from kvbits.tuning.rundir import check_same
from kvbits.tuning.scale.process import is_gone, process_name
from kvbits.tuning.team import Kind, Record

BEAT_S, GRACE_S = 15.0, 60.0
ALIVE, IDENTITY = "alive", "identity"


class Claim(NamedTuple):
    """A measurement that this worker has to make."""

    kind: Kind
    trial_id: int


class Ledger:
    """One study in a storage.

    Args:
        storage: A storage of Optuna.
        name: The study's name there.
        grace_s: Seconds without a sign of life after which a worker on another host is dead.
    """

    def __init__(self, storage: Any, name: str, *, grace_s: float = GRACE_S) -> None:
        self._storage, self._name, self._grace_s = storage, name, grace_s
        self.worker = process_name()
        self._root = self._study(Kind(""))
        self._studies: dict[Kind, int] = {}
        self._mine: set[int] = set()
        self._beats = 0
        self._seen: dict[str, tuple[int, float]] = {}

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Write the study's identity, or compare with the one that is there.

        Raises:
            RecordError: The storage holds another study of this name.
        """
        if IDENTITY not in self._storage.get_study_user_attrs(self._root):
            self._storage.set_study_user_attr(self._root, IDENTITY, dict(identity))
        stored = self._storage.get_study_user_attrs(self._root)[IDENTITY]
        check_same(
            stored, identity, f"storage must belong to this study, got {self._name!r} in it",
            "choose another name with --study",
        )  # fmt: skip

    def beat(self) -> None:
        """Show that this worker lives."""
        self._beats += 1
        self._storage.set_study_user_attr(self._root, f"{ALIVE} {self.worker}", self._beats)

    def records(self, kind: Kind) -> dict[str, Record]:
        """Return what is measured of a kind, by key."""
        found: dict[str, Record] = {}
        for trial in self._trials(kind):
            if trial.state.name == "COMPLETE":
                found.setdefault(trial.user_attrs["key"], trial.user_attrs["record"])
        return found

    def claimed(self, kind: Kind) -> set[str]:
        """Return the keys that live workers are measuring; dead ones lose theirs."""
        return {trial.user_attrs["key"] for trial in self._running(kind)}

    def claim(self, kind: Kind, key: str) -> Claim | None:
        """Claim a measurement; None where another worker was first."""
        trial_id = self._create(kind, "RUNNING", {"key": key, "worker": self.worker})
        self._mine.add(trial_id)
        for trial in self._trials(kind):
            if trial.user_attrs.get("key") != key or trial.state.name == "FAIL":
                continue
            if trial._trial_id == trial_id:
                return Claim(kind, trial_id)
            if trial.state.name == "COMPLETE" or not self._is_abandoned(trial):
                break
        self.give_up(Claim(kind, trial_id))
        return None

    def finish(self, claim: Claim, record: Record) -> bool:
        """Hand in a record; False where the claim was lost to another worker meanwhile."""
        self._mine.discard(claim.trial_id)
        try:
            self._storage.set_trial_user_attr(claim.trial_id, "record", dict(record))
            self._set_state(claim.trial_id, "COMPLETE", _values(claim.kind, record))
        except RuntimeError:  # Optuna's word for a trial that is over
            return False
        return True

    def give_up(self, claim: Claim) -> None:
        """Leave a measurement to others."""
        self._mine.discard(claim.trial_id)
        self._fail(claim.trial_id)

    def publish(self, kind: Kind, records: Iterable[tuple[str, Record]]) -> None:
        """Add records that were measured before the study was shared."""
        for key, record in records:
            attributes = {"key": key, "record": dict(record), "worker": self.worker}
            self._create(kind, "COMPLETE", attributes, _values(kind, record))

    def _running(self, kind: Kind) -> list[Any]:
        running = [trial for trial in self._trials(kind) if trial.state.name == "RUNNING"]
        abandoned = [trial for trial in running if self._is_abandoned(trial)]
        for trial in abandoned:
            self._fail(trial._trial_id)
        return [trial for trial in running if trial not in abandoned]

    def _is_abandoned(self, trial: Any) -> bool:
        """Whether nobody works on a claim: its worker is dead, or began anew in one process."""
        worker = trial.user_attrs["worker"]
        if worker == self.worker:
            return trial._trial_id not in self._mine
        return self._is_dead(worker)

    def _is_dead(self, worker: str) -> bool:
        gone = is_gone(worker)
        if gone is not None:
            return gone
        attributes = self._storage.get_study_user_attrs(self._root)
        beats, now = attributes.get(f"{ALIVE} {worker}", 0), time.monotonic()
        if self._seen.get(worker, (None, now))[0] != beats:
            self._seen[worker] = (beats, now)
        return now - self._seen[worker][1] > self._grace_s

    def _trials(self, kind: Kind) -> list[Any]:
        trials = self._storage.get_all_trials(self._id(kind), deepcopy=False)
        for trial in trials:
            fields = ("key", "worker", "record")[: 3 if trial.state.name == "COMPLETE" else 2]
            if not all(field in trial.user_attrs for field in fields):
                raise StorageError(
                    f"storage must hold trials of kvbits in {self._name}/{kind.name}, got one "
                    f"without {' and '.join(fields)}; choose another name with --study"
                )
        return sorted(trials, key=lambda trial: trial.number)

    def _create(
        self,
        kind: Kind,
        state: str,
        attributes: Mapping[str, Any],
        values: list[float] | None = None,
    ) -> int:
        from optuna.trial import TrialState, create_trial

        trial = create_trial(state=TrialState[state], values=values, user_attrs=dict(attributes))
        return int(self._storage.create_new_trial(self._id(kind), template_trial=trial))

    def _set_state(self, trial_id: int, state: str, values: list[float] | None = None) -> None:
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState[state], values)

    def _fail(self, trial_id: int) -> None:
        with suppress(RuntimeError):  # over already
            self._set_state(trial_id, "FAIL")

    def _id(self, kind: Kind) -> int:
        if kind not in self._studies:
            self._studies[kind] = self._study(kind)
        return self._studies[kind]

    def _study(self, kind: Kind) -> int:
        import optuna

        name = f"{self._name}/{kind.name}" if kind.name else self._name
        directions = ["minimize"] * max(1, len(kind.objectives))
        study = optuna.create_study(
            study_name=name, storage=self._storage, directions=directions, load_if_exists=True
        )
        return int(self._storage.get_study_id_from_name(study.study_name))


def key_of(step: Any) -> str:
    """Return the text by which all workers call a step."""
    return json.dumps(step)


def _values(kind: Kind, record: Record) -> list[float]:
    """What Optuna's tools plot; a trial of Optuna has one value at least."""
    return [float(record[name]) for name in kind.objectives] or [0.0]
