"""The run directory: every stage appends to its own file, so that a killed run goes on.

Records are JSON lines, flushed to disk one by one; a line torn by a kill is dropped on the next
start. Documents are written whole, under another name first. Timestamps and seconds stay out of
``front.json`` and ``plan.json``: a resumed run writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvbits.errors import RecordError


class RunDir:
    """One study on disk.

    Args:
        path: The directory; created where missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        """Return the path of one file of the run."""
        return self.path / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process dies.

        Raises:
            RecordError: Another process is tuning in this directory.
        """
        with self.file(".lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(
                    f"run directory must not be in use, got {self.path}, which another process "
                    "is tuning in; wait for it or choose another with -o"
                ) from None
            yield

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Write ``study.json``, or compare with the one that is there.

        ``versions``, ``created`` and ``command`` may differ: the first two are kept as they were,
        and of commands the last is.

        Raises:
            RecordError: The directory was made with other settings or another model.
        """
        stored = self.read_json("study.json")
        if stored is None:
            self.write_json("study.json", identity)
            return
        check_same(
            stored,
            identity,
            f"run directory must belong to this study, got {self.path}",
            "choose another with -o",
        )
        command = identity.get("command")
        if command and command != stored.get("command"):
            self.write_json("study.json", stored | {"command": command})

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line and wait until it is on disk."""
        with self.file(name).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, allow_nan=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file after cutting a torn last one; no file holds none.

        Raises:
            RecordError: A line before the last is not JSON.
        """
        path = self.file(name)
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        return [self._parse(name, number, line) for number, line in enumerate(whole.splitlines())]

    def _parse(self, name: str, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RecordError(
                f"{self.file(name)} must hold one JSON object a line, got {line[:40]!r} in line "
                f"{number + 1}; delete the file to measure again"
            )
        return record

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a document whole or not at all."""
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        partial = self.file(f".{name}.partial")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.file(name))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a document, or None where it has not been written."""
        path = self.file(name)
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise RecordError(f"{path} must hold one JSON object, got something else")
        return document


_LOOSE = frozenset({"versions", "created", "command"})


def check_same(
    stored: Mapping[str, Any], asked: Mapping[str, Any], what: str, remedy: str
) -> None:
    """Compare the identity of a study with a stored one, but for versions and the time.

    Raises:
        RecordError: They differ; it begins with ``what`` and ends with ``remedy``.
    """
    fixed = json.loads(json.dumps({k: v for k, v in asked.items() if k not in _LOOSE}))
    for key, value in fixed.items():
        if stored.get(key) != value:
            difference = _difference(key, stored.get(key), value)
            raise RecordError(f"{what} made with another {difference}; {remedy}")


def _difference(key: str, stored: Any, asked: Any) -> str:
    """Name the first leaf that differs, with both values."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            if stored.get(name) != asked.get(name):
                return _difference(f"{key} {name}", stored.get(name), asked.get(name))
    return f"{key} ({_short(stored)} there, {_short(asked)} now)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
