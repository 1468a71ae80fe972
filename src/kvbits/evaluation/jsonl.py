"""Files of one JSON object a line that survive a kill at any moment.

A line is written in one system call and forced to disk. If the machine stops in between, the file
ends in a torn line: reading drops it with a warning, and the next append cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvbits.errors import RecordError

Parsed = TypeVar("Parsed", bound=BaseModel)


def append_json_line(path: str | Path, value: Mapping[str, Any]) -> None:
    """Append one object as a line, whole or not at all.

    Args:
        path: the file; made with its folders if it does not exist.
        value: a JSON object; nan and infinity are refused, for JSON has neither.
    """
    path = Path(path)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        with _locked(descriptor):
            _cut_torn_line(descriptor, path)
            data = line.encode()
            if os.write(descriptor, data) < len(data):
                raise OSError(f"{path} must have room for a line of {len(data)} bytes, got less")
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the objects of a file; none if it does not exist.

    Raises:
        RecordError: a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty after a line that was written whole
    if torn:
        _warn_torn(path, torn)
    return json_objects(lines, path)


def json_objects(lines: Iterable[bytes], path: Path) -> list[dict[str, Any]]:
    """Parse lines of JSON objects; empty ones are passed over.

    Raises:
        RecordError: a line is none.
    """
    numbered = enumerate(lines, start=1)
    return [_parse(line, path, number) for number, line in numbered if line.strip()]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RecordError(
            f"{path}:{number} must be a JSON object, got {line[:60]!r}; the file is damaged"
        ) from error
    if not isinstance(value, dict):
        raise RecordError(f"{path}:{number} must be a JSON object, got {line[:60]!r}")
    return value


def _cut_torn_line(descriptor: int, path: Path) -> None:
    """Shorten the file to its last line end."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    if os.read(descriptor, 1) == b"\n":
        return
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read()
    keep = data.rfind(b"\n") + 1
    _warn_torn(path, data[keep:])
    os.ftruncate(descriptor, keep)


def _warn_torn(path: Path, torn: bytes) -> None:
    warnings.warn(
        f"{path} ends in a torn line of {len(torn)} bytes, which is dropped: a run was killed "
        "while it wrote",
        stacklevel=3,
    )


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Keep other processes that append to the same file out, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows: one process per file is safe without
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def parse(kind: type[Parsed], value: Mapping[str, Any], place: str) -> Parsed:
    """Make a strict model of one line.

    Args:
        kind: the model.
        value: the line as read.
        place: where it stands, for the message.

    Raises:
        RecordError: the line is none.
    """
    try:
        # of JSON text, strict validation knows that it has no tuples; of lists it does not
        return kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise RecordError(f"{place} {where} must be valid, got {first['msg'].lower()}") from error
