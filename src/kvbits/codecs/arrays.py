"""Arrays that codecs are fitted with: permutations, rotations, ranges of channels.

A codec holds an ``Array`` as it holds a number: a frozen value, equal to another of the same name
and content. In JSON it is its name alone; the tensors lie in a safetensors file beside the plan,
or inside a saved cache, and come back through ``Arrays`` in the context of validation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import PlainSerializer, PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError
from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
DTYPES = (torch.int32, torch.float32)
CONTEXT = "arrays"  # the key of ``Arrays`` in the context of validation


class Array:
    """A named constant of a codec; immutable, and its copy on a device is made once.

    Args:
        name: Letters, digits and underscores, with dots between, such as ``layers.0.key.order``.
        tensor: int32, or float32 without NaN or infinity.

    Raises:
        ValueError: If name, dtype or values are not as said.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"name of an array must be words of letters, digits and underscores with dots "
                f"between, got {name!r}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be int32 or float32, got {_word(tensor.dtype)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        own = tensor.detach().to("cpu", copy=True).contiguous()
        self.name = name
        self.shape = tuple(own.shape)
        self.dtype = own.dtype
        self.nbytes = own.nbytes
        content = own.flatten().view(torch.uint8).numpy().tobytes()
        self._checksum = hashlib.sha256(content).hexdigest()
        self._copies = {own.device: own}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device; not to be written to."""
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        return self._copies[device]

    @property
    def tensor(self) -> Tensor:
        """The tensor in CPU memory; not to be written to."""
        return self._copies[torch.device("cpu")]

    def check_shape(self, *shape: int | None) -> None:
        """Raise ``ValueError`` unless the shape is this one; None stands for any length."""
        same = len(shape) == len(self.shape)
        if not same or any(a not in (None, b) for a, b in zip(shape, self.shape, strict=True)):
            wanted = ["any" if length is None else length for length in shape]
            raise ValueError(
                f"{self.name} must have shape [{', '.join(map(str, wanted))}], "
                f"got {list(self.shape)}"
            )

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` unless the values are of this dtype."""
        if self.dtype != dtype:
            raise ValueError(f"{self.name} must be {_word(dtype)}, got {_word(self.dtype)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return f"{self.name}: {_word(self.dtype)} {list(self.shape)}"

    @property
    def _identity(self) -> tuple[str, torch.dtype, tuple[int, ...], str]:
        return self.name, self.dtype, self.shape, self._checksum


class Arrays:
    """Tensors by name, for validation to take; knows which were taken.

    Raises:
        ValueError: If a tensor makes no ``Array``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._arrays = {name: Array(name, tensor) for name, tensor in tensors.items()}
        self._taken: set[str] = set()

    def take(self, name: str) -> Array | None:
        """The array of a name, or None."""
        self._taken.add(name)
        return self._arrays.get(name)

    @property
    def unused(self) -> list[str]:
        """Names that nothing has taken, sorted."""
        return sorted(set(self._arrays) - self._taken)


def by_name(arrays: Iterable[Array]) -> dict[str, Tensor]:
    """Tensors of arrays by name, each once.

    Raises:
        ValueError: If two of one name differ.
    """
    found: dict[str, Array] = {}
    for array in arrays:
        if found.setdefault(array.name, array) != array:
            raise ValueError(f"arrays must have names of their own, got two of {array.name!r}")
    return {name: array.tensor for name, array in found.items()}


def _taken(value: object, info: ValidationInfo) -> Array:
    if isinstance(value, Array):
        return value
    arrays = (info.context or {}).get(CONTEXT)
    found = arrays.take(value) if isinstance(value, str) and arrays is not None else None
    if found is None:
        raise PydanticCustomError(
            "array", "Input should be an Array, or the name of one in the file beside the plan"
        )
    return found


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ArrayField = Annotated[
    Array, PlainValidator(_taken), PlainSerializer(lambda array: array.name, return_type=str)
]
"""A field of a codec that holds an array."""
