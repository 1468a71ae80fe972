"""Candidates whose codecs are fitted to the calibration documents, kept in the run directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from kvbits.evaluation.token_set import TokenSet
from kvbits.methods import Method
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import MakePlan
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir, check_same
from kvbits.tuning.team import Kind, Team

FOLDER = "calibrated"
FITTED = Kind("calibrated")


def calibrating(
    model: Any, token_sets: Sequence[TokenSet], *, run: RunDir, progress: Progress
) -> MakePlan:
    """Return a maker of plans that calibrates a method once and then reads what it found."""
    documents = [document for each in token_sets for document in each.documents]

    def make(name: str, method: Method) -> CachePlan:
        if not method.needs_data:
            return method.plan(model.config)
        path = run.file(f"{FOLDER}/{re.sub('[^A-Za-z0-9.=-]', '_', name)}.json")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            progress.start(f"calibrating {name}", len(documents))
            method.calibrate(model, documents, progress.advance).save(path)
            progress.finish()
        plan = CachePlan.load(path)
        plan.check(model.config)
        return plan

    return make


def check_calibrated(run: RunDir, team: Team) -> None:
    """Check that all of a team fitted the same plans: they measure under one name.

    Raises:
        RecordError: This process fitted others than the first, on other hardware for example.
    """
    files = sorted(run.file(FOLDER).glob("*.json"))
    own = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    if not own:
        return
    for _, first in team.measure(FITTED, ["plans"], lambda _: own, {}):
        check_same(
            first,
            own,
            f"calibrated plans must be those of the first worker, got {run.file(FOLDER)}",
            f"copy {FOLDER}/ from the run directory where the study began",
        )
