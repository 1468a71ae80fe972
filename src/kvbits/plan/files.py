"""Files of a plan: read with limits, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvbits.errors import PlanError

MAX_FILE_BYTES = 16 * 2**20  # a plan of 1000 layers with 16 head groups each is about 10 MB


def read_text(path: Path) -> str:
    """Read a small UTF-8 file.

    Raises:
        PlanError: If it is missing, is not a file, is larger than 16 MiB or is not UTF-8.
    """
    try:
        return read_bytes(path, "plan file", MAX_FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(
            f"path must name a UTF-8 text file, got {str(path)!r} with byte "
            f"{error.object[error.start]:#04x} at {error.start}"
        ) from None


def read_bytes(path: Path, what: str, most: int) -> bytes:
    """Read a file of at most ``most`` bytes; ``what`` it should be is said in messages.

    Raises:
        PlanError: If it is missing, is not a file or is larger.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise PlanError(f"path must name a {what}, got {str(path)!r}, which is not a file")
        if size > most:
            raise PlanError(
                f"path must name a {what} of at most {most} bytes, got {str(path)!r} with {size}"
            )
        return path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"path must name a readable {what}, got {str(path)!r} ({error.strerror})"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
