"""Read a run directory into plain tuples.

A stage that has not run yet is an empty field; a file that is damaged, or that another version
wrote in another form, is refused with its name and line, because a page drawn from half a file
looks like a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvbits.errors import RecordError
from kvbits.report import stages
from kvbits.report.stages import (
    Measurement,
    Memory,
    PairError,
    Pruned,
    Sensitivity,
    Trial,
    Verified,
)

SCHEMA_VERSION = 2
SEARCHED_ORIGINS = (
    *("exact", "exact+", "moead", "nsga2", "tpe"),
    *("best uniform", "best ladder", "best random"),
)
GIVEN_ORIGIN = "given"
ROUNDING = 1e-4  # records have six significant digits
Row = TypeVar("Row")


class Profile(NamedTuple):
    """The file of what a study went by, and whether it holds nats by domain."""

    file: str
    is_in_nats: bool


PROFILES = {
    "kl": Profile("sensitivity.jsonl", True),
    "fisher": Profile("fisher.jsonl", True),
    "e_o": Profile("errors.jsonl", False),
    "accuracy": Profile("accuracy.jsonl", False),
}


class TaskResult(NamedTuple):
    """Exact-match accuracy, and its paired difference from the full-precision cache."""

    accuracy: float
    standard_error: float
    n: int
    difference: float | None
    low: float | None
    high: float | None


class Point(NamedTuple):
    """One plan of the front or of the baselines."""

    name: str
    origin: str
    labels: tuple[str, ...]
    summary: str
    pairs: tuple[tuple[float, float], ...]
    effective_bits: float
    effective_bits_at_context: float | None
    loss: float | None
    predicted_kl: Mapping[str, float]
    measured_kl: Mapping[str, Measurement]
    tasks: Mapping[str, TaskResult]
    is_chosen: bool

    @property
    def is_searched(self) -> bool:
        """Whether a search found it, rather than a rule."""
        return self.origin in SEARCHED_ORIGINS


class PairedComparison(NamedTuple):
    """KL of the chosen plan minus another's over the same documents, with a 95 % interval."""

    baseline: str
    origin: str
    effective_bits: float
    domain: str
    difference: float | None
    low: float | None
    high: float | None


class Run(NamedTuple):
    """Everything the page shows, as it was recorded."""

    path: Path
    study: Mapping[str, Any]
    plan: Mapping[str, Any]
    mode: str
    context: int | None
    budget_bits: float | None
    budget_counted_at: int | None
    bought: Mapping[str, int]
    drop: Mapping[str, Any]
    normalised_by: Mapping[str, float]
    memory: tuple[Memory, ...]
    points: tuple[Point, ...]
    comparisons: tuple[PairedComparison, ...]
    sensitivity: tuple[Sensitivity, ...]
    errors: tuple[PairError, ...]
    pruned: Pruned | None
    trials: tuple[Trial, ...]
    records: tuple[Mapping[str, Any], ...]
    verified: Mapping[tuple[tuple[str, ...], str], Verified]
    plan_checksum: str | None
    missing: tuple[str, ...]

    @property
    def chosen(self) -> Point | None:
        """The point whose plan was written, if the search got that far."""
        return next((point for point in self.points if point.is_chosen), None)

    @property
    def long_context_budget(self) -> float | None:
        """The budget where it is in the points' ``effective_bits``, not those of a context."""
        return None if self.budget_counted_at else self.budget_bits

    def fits(self, point: Point) -> bool:
        """Whether a plan is within the budget, in the accounting of the budget."""
        at_context = self.budget_counted_at and point.effective_bits_at_context is not None
        bits = point.effective_bits_at_context if at_context else point.effective_bits
        return self.budget_bits is not None and (bits or 0.0) <= self.budget_bits + ROUNDING

    @property
    def domains(self) -> tuple[str, ...]:
        """Calibration and verification domains in the order they were first recorded."""
        names = [row.domain for row in self.sensitivity]
        for point in self.points:
            names += [*point.predicted_kl, *point.measured_kl]
        return tuple(dict.fromkeys(names))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks any point was measured on."""
        return tuple(dict.fromkeys(task for point in self.points for task in point.tasks))


def collect(run_dir: Path | str) -> Run:
    """Read a run directory.

    Args:
        run_dir: the folder ``kvbits tune`` wrote; stages that have not run may be missing.

    Returns:
        The run; ``missing`` names the files that are not there yet.

    Raises:
        RecordError: the folder is no run, or a file in it is damaged.
    """
    path = Path(run_dir)
    if not (path / "study.json").is_file():
        raise RecordError(
            f"run directory must hold study.json, got {path} without it; "
            "give the folder that `kvbits tune -o` wrote"
        )
    front = _read_json(path / "front.json")
    if front and front.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(
            f"{path / 'front.json'} must have schema_version {SCHEMA_VERSION}, "
            f"got {front.get('schema_version')!r}; use the kvbits version that wrote it"
        )
    study = _read_json(path / "study.json")
    profile = PROFILES[study.get("settings", {}).get("sensitivity", "kl")]
    names = (profile.file, "verify.jsonl", "front.json", "plan.json")
    verified = (row for row in _read_lines(path / "verify.jsonl", stages.parse_verified) if row)
    return Run(
        path=path,
        study=study,
        plan=_read_json(path / "plan.json"),
        mode=str(front.get("mode") or ", ".join(front.get("candidates", ()))),
        context=front.get("context"),
        budget_bits=front.get("budget_bits"),
        budget_counted_at=front.get("budget_counted_at"),
        bought=front.get("bought") or {},
        drop=front.get("drop") or {},
        normalised_by=front.get("normalised_by") or {},
        memory=_parse_items(front, "memory", stages.parse_memory, path / "front.json"),
        points=_parse_points(front, path / "front.json"),
        comparisons=_parse_items(front, "comparisons", _parse_comparison, path / "front.json"),
        sensitivity=stages.of_layers(_read_lines(path / profile.file, stages.parse_sensitivity))
        if profile.is_in_nats
        else (),
        errors=_read_lines(path / "errors.jsonl", stages.parse_error),
        pruned=_read_pruned(path / "pruned.json"),
        trials=_read_lines(path / "search.jsonl", stages.parse_trial),
        records=_read_lines(path / "verify.jsonl", dict),
        verified={(row.labels, row.domain): row for row in verified},
        plan_checksum=_checksum(path / "plan.json"),
        missing=tuple(name for name in names if not (path / name).exists()),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read an object; a missing file is an empty one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} must be JSON, got damage: {error}; {_REMEDY}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} must hold one JSON object, got {type(value).__name__}")
    return value


_REMEDY = "run `kvbits tune` with the same settings again, or restore the file"


def _read_lines(path: Path, parse: Callable[[Any], Row]) -> tuple[Row, ...]:
    """Read one parsed row per line; a missing file is no rows."""
    if not path.exists():
        return ()
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(
                f"{path} line {number} must be a complete record, got {_reason(error)}; {_REMEDY}"
            ) from error
    return tuple(rows)


def _read_pruned(path: Path) -> Pruned | None:
    try:
        return stages.parse_pruned(_read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path} must be complete, got {_reason(error)}; {_REMEDY}") from error


def _checksum(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _parse_points(front: Mapping[str, Any], path: Path) -> tuple[Point, ...]:
    points = _parse_items(front, "points", _parse_point, path)
    return tuple(sorted(points, key=lambda point: point.effective_bits))


def _parse_items(
    front: Mapping[str, Any], key: str, parse: Callable[[Any], Row], path: Path
) -> tuple[Row, ...]:
    """Parse a list inside the front; a missing one is empty."""
    rows = []
    for number, item in enumerate(front.get(key, [])):
        try:
            rows.append(parse(item))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordError(
                f"{path} {key} {number} must be complete, got {_reason(error)}; {_REMEDY}"
            ) from error
    return tuple(rows)


def _parse_point(item: Mapping[str, Any]) -> Point:
    at_context = item.get("effective_bits_at_context")
    return Point(
        name=str(item["name"]),
        origin=str(item["origin"]),
        labels=tuple(str(label) for label in item["labels"]),
        summary=str(item.get("summary", "")),
        pairs=tuple((stages.width(key), stages.width(value)) for key, value in item["pairs"]),
        effective_bits=float(item["effective_bits"]),
        effective_bits_at_context=None if at_context is None else float(at_context),
        loss=None if item.get("loss") is None else float(item["loss"]),
        predicted_kl={k: float(v) for k, v in (item.get("predicted_kl") or {}).items()},
        measured_kl={
            domain: stages.measurement(m["value"], m["se"])
            for domain, m in (item.get("measured_kl") or {}).items()
        },
        tasks={name: _parse_task(task) for name, task in (item.get("tasks") or {}).items()},
        is_chosen=bool(item.get("chosen", False)),
    )


def _parse_task(item: Mapping[str, Any]) -> TaskResult:
    return TaskResult(
        accuracy=float(item["accuracy"]),
        standard_error=float(item["se"]),
        n=int(item["n"]),
        difference=item.get("difference"),
        low=item.get("low"),
        high=item.get("high"),
    )


def _parse_comparison(item: Mapping[str, Any]) -> PairedComparison:
    return PairedComparison(
        baseline=str(item["baseline"]),
        origin=str(item["origin"]),
        effective_bits=float(item["baseline_effective_bits"]),
        domain=str(item["domain"]),
        difference=item["difference"],
        low=item["low"],
        high=item["high"],
    )
