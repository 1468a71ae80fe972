"""The file of arrays beside a plan: which one, what must be in it, and that it is unchanged.

Its name holds the start of its checksum, so a new plan never overwrites the arrays of another: the
plan, written last, is what decides which arrays count, and a reader sees the old pair or the new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvbits.codecs.arrays import Arrays
from kvbits.errors import PlanError
from kvbits.plan import files
from kvbits.plan.loading import one_sentence

FIELD: Literal["arrays"] = "arrays"  # of a plan file
MAX_FILE_BYTES = 4 * 2**30  # rotations of 128 layers with 64 heads of 128 channels on both sides
_NAMED_BYTES = 12  # hex digits of the checksum in the name: chance alone does not repeat them


class ArraysFile(BaseModel):
    """What a plan file says of its arrays.

    Args:
        file: Name of a safetensors file in the folder of the plan.
        sha256: Hex checksum of that file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # No separators and no leading dot: the file cannot be in another folder.
    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$", max_length=128)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


_RECORD = TypeAdapter(dict[Literal["arrays"], ArraysFile])


def write(folder: Path, tensors: Mapping[str, Tensor]) -> ArraysFile:
    """Write arrays into a folder whole or not at all, and return what a plan must say of them."""
    content = save(dict(tensors))
    checksum = hashlib.sha256(content).hexdigest()
    record = ArraysFile(file=f"arrays-{checksum[:_NAMED_BYTES]}.safetensors", sha256=checksum)
    files.write_bytes(folder / record.file, content)
    return record


def read(record: Any, folder: Path | None) -> Arrays:
    """Read the arrays that the ``arrays`` field of a plan names; none if there is no such field.

    Args:
        record: The field as parsed.
        folder: The folder of the plan; None if the plan came without one.

    Raises:
        PlanError: If the field is malformed, or the file is missing, a link, damaged or another,
            or holds what no codec can.
    """
    named = parse(record)
    if named is None:
        return Arrays({})
    if folder is None:
        raise PlanError(
            f"{FIELD}.file must lie beside the plan, got {named.file!r} and the text of a plan "
            "alone; load the plan from its file"
        )
    path = folder / named.file
    if path.is_symlink():
        raise PlanError(f"{FIELD}.file must not be a link, got {str(path)!r}; copy the file there")
    content = files.read_bytes(path, "file of arrays", MAX_FILE_BYTES)
    checksum = hashlib.sha256(content).hexdigest()
    if checksum != named.sha256:
        raise PlanError(
            f"{FIELD}.sha256 must be the checksum of {named.file}, {checksum[:12]}..., got "
            f"{named.sha256[:12]}...; the file is damaged or of another plan"
        )
    try:
        return Arrays(load(content))
    except (SafetensorError, KeyError, ValueError) as error:
        raise PlanError(f"{FIELD}.file must hold arrays, got {named.file}: {error}") from None


def parse(record: Any) -> ArraysFile | None:
    """Parse the ``arrays`` field of a plan strictly; None where there is none.

    Raises:
        PlanError: If it is malformed.
    """
    if record is None:
        return None
    try:
        return _RECORD.validate_python({FIELD: record})[FIELD]
    except ValidationError as error:
        raise PlanError(one_sentence(error)) from None


def check_all_used(arrays: Arrays) -> None:
    """Refuse arrays that no codec of a plan names.

    Raises:
        PlanError: With the first of them.
    """
    if arrays.unused:
        raise PlanError(
            f"{FIELD}.file must hold only arrays that codecs name, got {arrays.unused[0]!r} too"
        )
