"""What the kernels read beside pages and states: levels of codes, phases of the rotary embedding.

They follow from a codec alone, so layers of one codec share them. Made at a first call, which is
never captured in a graph.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kvbits.codecs import Affine, Codebook, Codec, NormScaled, PreRope
from kvbits.codecs.levels import grid_of
from kvbits.codecs.wrappers import Wrapper

GRID_BYTES = 16
MOST_COUNT = 256  # channels of a head or tokens of a tile
MANY = 1024  # codecs of all layers of a few models


@functools.lru_cache(maxsize=MANY)
def level_bytes(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    """Levels of a codec's codes as fp16: int8, the high bytes of all and then the low ones."""
    levels = torch.tensor(_levels(codec, head_dim), dtype=torch.float64).to(torch.float16)
    pairs = levels.view(torch.int8).unflatten(0, (-1, 2))  # low byte first
    return pairs.flip(1).T.contiguous().to(device)


def _levels(codec: Codec, head_dim: int) -> tuple[float, ...]:
    """What scales multiply, by code."""
    if isinstance(codec, Wrapper):
        return _levels(codec.inner, head_dim)
    if isinstance(codec, NormScaled):
        return tuple(level / math.sqrt(head_dim) for level in codec.levels)
    if isinstance(codec, Codebook):
        return codec.decoded_levels or codec.levels
    assert isinstance(codec, Affine)
    return tuple(range(2 ** int(codec.bits)))


@functools.lru_cache(maxsize=MANY)
def has_grid(codec: Codec) -> bool:
    """Whether what scales multiply lies on a grid of bytes, for codes of up to 4 bits."""
    return codec.code_bits() <= 4 and grid_of(_levels(codec, 1)) is not None


@functools.lru_cache(maxsize=MANY)
def grid_bytes(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    """Places of a codec's levels on their grid: int8 ``[16]``; float32 ``low`` and ``step``."""
    grid = grid_of(_levels(codec, head_dim))
    assert grid is not None
    places = torch.zeros(GRID_BYTES, dtype=torch.int8)
    places[: len(grid.places)] = torch.tensor(grid.places, dtype=torch.int8)
    ends = torch.tensor([grid.low, grid.step], dtype=torch.float32)
    return torch.cat([places, ends.view(torch.int8)]).to(device)


@functools.lru_cache(maxsize=MANY)
def phases(codec: Codec, device: torch.device) -> Tensor | None:
    """The rotary embedding that keys are stored before: int64 ``[pairs]``, 2**-64 turns a token.

    None for keys that are stored behind it.
    """
    if isinstance(codec, PreRope):
        return codec.phases.to(device)
    return phases(codec.inner, device) if isinstance(codec, Wrapper) else None


@functools.lru_cache(maxsize=MANY)
def encoding_constants(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    """``Codec.constants`` in a row on the device, as float32 whatever they are."""
    words = [each.view(torch.int32) for each in codec.constants(head_dim)]
    joined = torch.cat([torch.empty(0, dtype=torch.int32), *words])
    return joined.view(torch.float32).to(device)


@functools.lru_cache(maxsize=MANY)
def rotation(codec: Codec, head_dim: int, device: torch.device) -> Tensor | None:
    """The matrix that states are rotated by before they are stored: see ``Codec.rotation``."""
    return codec.rotation(head_dim, device)


@functools.lru_cache
def count(device: torch.device) -> Tensor:
    """The numbers from 0, int16."""
    return torch.arange(MOST_COUNT, dtype=torch.int16, device=device)
