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
from kvbits.tuning.rundir import RunDir

FOLDER = "calibrated"


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


def checksums(run: RunDir) -> dict[str, str]:
    """Return the SHA-256 of every plan that was calibrated; each names its arrays by theirs."""
    files = sorted(run.file(FOLDER).glob("*.json"))
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
