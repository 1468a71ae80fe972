"""The visible workloads: six examples each, of our own text, checked against their digests."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from typing import Any, NamedTuple

from kvbits.errors import RecordError


class Example(NamedTuple):
    """One prompt and what answers it."""

    example_id: str
    source_family: str
    licence: str
    prompt: str
    question: str
    answers: tuple[str, ...]


class Slice(NamedTuple):
    """A workload.

    Attributes:
        name: Its name.
        sha256: Digest of its file.
        num_steps: Decode steps that are replayed of every example.
        examples: In the order of the file.
    """

    name: str
    sha256: str
    num_steps: int
    examples: tuple[Example, ...]


class _Known(NamedTuple):
    num_steps: int
    sha256: str


SLICES = {
    "longbench_slice": _Known(
        16, "eacbfd9d3098e7220ae87af0c7e663fef974644cfaf78b7779df266f9dba6ed7"
    ),
    "needle_slice": _Known(12, "00d2f09f29510b59c5781e035f0422c543b48bca661db4791f899d856eaaaca8"),
    "reasoning_slice": _Known(
        24, "a5d32e2146ec660f5fd4054bba8405ca99917a368407bd31a006cbd22b43cb16"
    ),
}
"""Every slice by name; its file must have this digest."""


def load_slice(name: str) -> Slice:
    """Read a slice of the package.

    Raises:
        ValueError: If there is no such slice.
        RecordError: If its file is not the one that was published.
    """
    if name not in SLICES:
        raise ValueError(f"--slice must be one of {', '.join(SLICES)} or all, got {name!r}")
    data = (files("kvbits.replay") / "slices_data" / f"{name}.json").read_bytes()
    return parse_slice(name, data)


def parse_slice(name: str, data: bytes) -> Slice:
    """Check the bytes of a slice against its digest and read them.

    Raises:
        RecordError: If they are not the published ones.
    """
    digest = hashlib.sha256(data).hexdigest()
    known = SLICES[name]
    if digest != known.sha256:
        raise RecordError(
            f"{name} must have the SHA-256 {known.sha256[:12]}..., got {digest[:12]}...; "
            "reinstall kvbits: results on other text cannot be compared"
        )
    rows: list[dict[str, Any]] = json.loads(data)
    examples = tuple(Example(**{**row, "answers": tuple(row["answers"])}) for row in rows)
    return Slice(name, digest, known.num_steps, examples)
