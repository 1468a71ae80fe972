"""The folder of a run of benchmarks: resumable, and never of two runs.

``run.json`` says what was run; ``TASK.samples.jsonl`` holds every example of a task, and
``TASK.results.json`` the harness's own results, written last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbits.errors import RecordError
from kvbits.evaluation.samples import Sample, from_harness, read_samples, write_samples
from kvbits.plan import CachePlan
from kvbits.plan.files import write_text

RUN, RESULTS, SAMPLES = "run.json", ".results.json", ".samples.jsonl"
_TASK_NAME = re.compile(r"[\w.+-]+")
_NOT_PLAIN = re.compile(r"\.*")


def identity(
    plan: CachePlan | None, settings: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """What makes a run the one it is: plan, settings and versions, as JSON."""
    content = "" if plan is None else plan.model_dump_json(exclude={"metrics", "provenance"})
    return {
        "plan": "full precision" if plan is None else plan.describe(),
        "plan_checksum": hashlib.sha256(content.encode()).hexdigest(),
        "effective_bits": 16.0 if plan is None else plan.effective_bits,
        "settings": settings,
        "versions": versions,
    }


def open_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Begin a run in a folder, or go on with the same one.

    Raises:
        RecordError: If another run lies there.
    """
    path = folder / RUN
    text = json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    if not path.exists():
        write_text(path, text)
        return
    found = read_object(path)
    for name, value in json.loads(text).items():
        if found.get(name) != value:
            raise RecordError(
                f"--output must be a new folder or that of the same run, got {folder} with "
                f"another {name}"
            )


def run_task(
    folder: Path | None,
    name: str,
    evaluate: Callable[[str], dict[str, Any]],
    count_tokens: Callable[[str], int] | None = None,
) -> dict[str, Any]:
    """Run one task, or read what an earlier run of the folder found.

    Args:
        folder: Where to keep it; None keeps nothing.
        name: The task.
        evaluate: Runs a task by the harness.
        count_tokens: Counts the tokens of answers, for their records.

    Returns:
        The harness's results, without the samples.
    """
    done = None if folder is None else folder / f"{_file_name(name)}{RESULTS}"
    if done is not None and done.exists():
        return read_object(done)
    found = evaluate(name)
    samples = found.pop("samples", {})
    text = json.dumps(found, indent=2, default=str) + "\n"
    if folder is not None and done is not None:
        write_samples(folder / f"{_file_name(name)}{SAMPLES}", from_harness(samples, count_tokens))
        write_text(done, text)
    kept: dict[str, Any] = json.loads(text)
    return kept


def run_samples(folder: Path) -> list[Sample]:
    """Read the samples of all finished tasks of a run.

    Raises:
        RecordError: If there is no run, or it has no finished task.
    """
    if not (folder / RUN).is_file():
        raise RecordError(
            f"the folder must be an --output of kvbits eval or score, got {str(folder)!r}"
        )
    done = sorted(folder.glob(f"*{RESULTS}"))
    if not done:
        raise RecordError(f"the run must have a finished task, got none in {str(folder)!r}")
    files = [path.with_name(path.name.removesuffix(RESULTS) + SAMPLES) for path in done]
    return [sample for path in files for sample in read_samples(path)]


def describe_run(folder: Path) -> str:
    """The plan of a run in one line."""
    return str(read_object(folder / RUN).get("plan"))


def check_names(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a task whose name cannot be that of a file."""
    for name in names:
        _file_name(name)


def _file_name(task: str) -> str:
    if not _TASK_NAME.fullmatch(task) or _NOT_PLAIN.fullmatch(task):
        raise ValueError(
            f"tasks must have names of letters, digits and _.+- to be kept in files, got {task!r}"
        )
    return task


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        RecordError: If it does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} must be readable JSON, got {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found
