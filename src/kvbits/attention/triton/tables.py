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
from kvbits.codecs.wrappers import Wrapper

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
def phases(codec: Codec, device: torch.device) -> Tensor | None:
    """The rotary embedding that keys are stored before: int64 ``[pairs]``, 2**-64 turns a token.

    None for keys that are stored behind it.
    """
    if not isinstance(codec, Wrapper):
        return None
    if not isinstance(codec, PreRope):
        return phases(codec.inner, device)
    whole = [round(frequency / (2 * math.pi) * 2**64) for frequency in codec.frequencies]
    return torch.tensor([_signed(phase) for phase in whole], device=device)


@functools.lru_cache(maxsize=MANY)
def rotation(codec: Codec, head_dim: int, device: torch.device) -> Tensor | None:
    """The matrix that states are rotated by before they are stored: see ``Codec.rotation``."""
    return codec.rotation(head_dim, device)


@functools.lru_cache
def count(device: torch.device) -> Tensor:
    """The numbers from 0, int16."""
    return torch.arange(MOST_COUNT, dtype=torch.int16, device=device)


def _signed(phase: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return phase - 2**64 if phase >= 2**63 else phase
