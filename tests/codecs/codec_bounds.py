"""How far every codec may move a state, worked out in float64 from the states alone.

A bound is the distance to the nearest level that the definition of the codec allows, plus what
rounding its stored numbers moves those levels by. So a code that is not the nearest one, a range
that is wider than it must be and a value that is left to the wrong tier all show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from naive_layer import order, rotation
from torch import Tensor

from kvbits.codecs import (
    Affine,
    Array,
    Codebook,
    Codec,
    Float4,
    Float8,
    MatrixRotated,
    NearestLevel,
    NormScaled,
    Outliers,
    Permuted,
    PreRope,
    Promoted,
    RangeNormalised,
    Rotated,
    Tiered,
    VarianceNormalised,
)
from kvbits.codecs.levels import lloyd_max, normal_float, normal_quantiles

HEADS, DIM, TILE = 2, 32, 16
# Stored in fp16 a number moves by less than 2^-10 of itself, or 2^-24; rounded to nearest, half.
ULP, TINY = 2.0**-10, 2.0**-24

Bound = Callable[[Tensor], Tensor]
Frame = Callable[[Tensor], Tensor]  # what an inner codec sees of states


# ----- distances to levels


def to_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Distance of every value to the nearest of some levels ``[n]``."""
    return (x[..., None] - levels).abs().amin(-1)


def to_steps(x: Tensor, low: Tensor, high: Tensor, top: int) -> Tensor:
    """Distance to the nearest of ``top + 1`` even steps from low to high, rounding included.

    The offset moves down by a rounding, the scale up by that of the range that is left.
    """
    step = (high - low) / top
    code = ((x - low) / torch.where(step == 0, 1.0, step)).round().clamp(0, top)
    offset = low.abs() * ULP + TINY
    return (x - low - code * step).abs() + offset + (high - low + offset) * ULP + top * TINY


def token(bits: int, group: int = DIM, ratio: float = 1.0) -> Bound:
    """Even steps over a group of channels, whose range may be clipped."""

    def bound(x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, group))
        low, high = ratio * groups.amin(-1, True), ratio * groups.amax(-1, True)
        return to_steps(groups, low, high, 2**bits - 1).flatten(-2)

    return bound


def channel(bits: int) -> Bound:
    """Even steps over a channel of a tile."""

    def bound(x: Tensor) -> Tensor:
        tiles = x.unflatten(-2, (-1, TILE))
        low, high = tiles.amin(-2, True), tiles.amax(-2, True)
        return to_steps(tiles, low, high, 2**bits - 1).flatten(-3, -2)

    return bound


def symmetric(bits: int) -> Bound:
    """Even steps around zero, one more of them below."""
    below = 2 ** (bits - 1)

    def bound(x: Tensor) -> Tensor:
        step = torch.maximum(x.amax(-1, True) / (below - 1), -x.amin(-1, True) / below)
        code = (x / torch.where(step == 0, 1.0, step)).round().clamp(-below, below - 1)
        return (x - code * step).abs() + below * (step * ULP + TINY)

    return bound


def e4m3() -> Tensor:
    """Magnitudes of fp8 by definition: ``1.mmm * 2**(e - 7)``, or ``0.mmm * 2**-6``."""
    found = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
             for e in range(16) for m in range(8)]  # fmt: skip
    return torch.tensor(found[:-1], dtype=torch.float64)  # the last would be NaN


E4M3 = e4m3()
E4M3_LINE = torch.cat((-E4M3.flip(0)[:-1], E4M3))


def ternary(x: Tensor) -> Tensor:
    """Three steps over 0.9 of a range; its ends in fp8, rounded outwards."""
    low, high = 0.9 * x.amin(-1, True), 0.9 * x.amax(-1, True)
    low = E4M3_LINE[torch.bucketize(low, E4M3_LINE, right=True) - 1]
    step = E4M3[torch.bucketize((high - low) / 2, E4M3)]
    return to_steps(x, low, low + 2 * step, 2) - low.abs() * ULP  # which fp8 holds exactly


def codebook(levels: Sequence[float]) -> Bound:
    """Levels over half a range from its middle, both rounded."""

    def bound(x: Tensor) -> Tensor:
        low, high = x.amin(-1, True), x.amax(-1, True)
        middle, half = (low + high) / 2, (high - low) / 2
        table = torch.tensor(levels, dtype=torch.float64)
        scaled = (x - middle) / torch.where(half == 0, 1.0, half)
        moved = middle.abs() * ULP / 2 + TINY  # by which the scale grows too, to cover both ends
        return half * to_levels(scaled, table) + 2 * moved + (half + moved) * ULP + TINY

    return bound


def nearest(levels: Sequence[float]) -> Bound:
    """Levels as they are."""
    return lambda x: to_levels(x, torch.tensor(levels, dtype=torch.float64))


# ----- values and tokens apart


def outliers(inner: Bound, slots: int) -> Bound:
    """fp16 of what the inner codec misses; the median stands in for what is apart."""

    def bound(x: Tensor) -> Tensor:
        ranked = x.argsort(dim=-1, stable=True).argsort(-1)
        is_apart = (ranked < slots // 2) | (ranked >= DIM - slots // 2)
        middle = x.median(-1, keepdim=True).values
        left = inner(torch.where(is_apart, middle, x))
        missing = (x - middle).abs() + left
        return torch.where(is_apart, missing * ULP / 2 + TINY, left)

    return bound


def channel_outliers(x: Tensor) -> Tensor:
    """The two of a token that are furthest out of their channel, whose middle stands in.

    A token is often the first or last of several channels: such ties are those of float32.
    """
    tiles = x.float().unflatten(-2, (-1, TILE))
    low, high = tiles.amin(-2, True), tiles.amax(-2, True)
    middle, half = (low + high) / 2, (high - low) / 2
    place = (tiles - middle) / torch.where(half == 0, 1.0, half)
    ranked = place.argsort(dim=-1, stable=True).argsort(-1).flatten(-3, -2)
    is_apart = (ranked == 0) | (ranked == DIM - 1)
    middle = middle.double().expand_as(tiles).flatten(-3, -2)
    left = channel(3)(torch.where(is_apart, middle, x))
    return torch.where(is_apart, ((x - middle).abs() + left) * ULP / 2 + TINY, left)


def largest(size: Tensor, count: int) -> Tensor:
    """Whether a number is among the ``count`` largest of its row."""
    chosen = size.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(size, dtype=torch.bool).scatter(-1, chosen, True)


def promoted(x: Tensor) -> Tensor:
    """4 bits for the 8 channels of a tile whose mean magnitude is largest, else 2."""
    wide = largest(x.unflatten(-2, (-1, TILE)).abs().mean(-2), 8).repeat_interleave(TILE, -2)
    return torch.where(wide, channel(4)(x), channel(2)(x))


def tiered(x: Tensor) -> Tensor:
    """Of a tile's tokens by range, 8 bits for the first two, 4 for the next three, else 2."""
    ranges = (x.amax(-1) - x.amin(-1)).unflatten(-1, (-1, TILE))
    widest, wide = (largest(ranges, count).flatten(-2)[..., None] for count in (2, 5))
    return torch.where(widest, token(8)(x), torch.where(wide, token(4)(x), token(2)(x)))


# ----- floating formats


def float8(x: Tensor) -> Tensor:
    """The nearest of its own numbers times 2, of which 448 is the last."""
    return 2 * to_levels(x.abs() / 2, E4M3)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nvfp4(x: Tensor) -> Tensor:
    """The scale of 16 channels is the fp8 number nearest to a sixth of the largest."""
    blocks = x.abs().unflatten(-1, (-1, 16))
    wanted = blocks.amax(-1, True) / 6
    scale = E4M3[(wanted[..., None] - E4M3).abs().argmin(-1)]
    return (scale * to_levels(blocks / torch.where(scale == 0, torch.inf, scale), E2M1)
            + torch.where(scale == 0, blocks, 0)).flatten(-2)  # fmt: skip


def mxfp4(x: Tensor) -> Tensor:
    """The scale of 32 channels is two binary orders below the largest."""
    exponent = x.abs().amax(-1, True).log2().floor() - 2
    scale = torch.where(exponent.isinf(), 1.0, 2.0**exponent)
    return scale * to_levels(x.abs() / scale, E2M1)


# ----- frames: what an inner codec sees


def sylvester(width: int) -> Tensor:
    """The orthonormal Hadamard matrix, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / width**0.5


# Signs are stored nowhere but in their seed: these are those of seed 5, for ever.
SIGNS = torch.tensor(
    [1.0 if sign == "+" else -1.0 for sign in "+-++---+--+-+---+-++++-+-++++---"]
).double()
SIGNED_HADAMARD = SIGNS[:, None] * sylvester(DIM)
FREQUENCIES = tuple(0.7**pair for pair in range(DIM // 2 - 2))  # four channels do not turn


def turned_back(x: Tensor, positions: Tensor) -> Frame:
    """Pairs of channels as complex numbers, turned back by their position."""
    pairs = len(FREQUENCIES)
    angle = positions[0, :, None] * torch.tensor(FREQUENCIES, dtype=torch.float64)

    def seen(states: Tensor) -> Tensor:
        turned = torch.complex(states[..., :pairs], states[..., pairs : 2 * pairs])
        turned = turned * torch.exp(-1j * angle)
        return torch.cat((turned.real, turned.imag, states[..., 2 * pairs :]), -1)

    return seen


def normalised_tile(x: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """SINQ's iteration on one tile ``[t, D]``: scales of its rows and of its columns.

    Logarithms a and c start at 0. Every round adds to them ``ln(clip(std / target, 0.7, 2))`` of
    the rows and columns of x / e^a / e^c, target being the least of all of x's own; the round of
    the least ratio of spreads counts, and the first that is worse is the last.
    """

    def spreads(tile: np.ndarray) -> list[np.ndarray]:
        return [tile.std(axis, ddof=1).clip(1e-3, 1e3) for axis in (1, 0)]

    a, c = np.zeros(x.shape[0]), np.zeros(x.shape[1])
    target = min(each.min() for each in spreads(x))
    best, least = (a, c), np.inf
    for _ in range(rounds + 1):
        rows, columns = spreads(x / np.exp(a)[:, None] / np.exp(c))
        ratio = max(rows.max(), columns.max()) / min(rows.min(), columns.min())
        if ratio > least * (1 + 1e-9):
            break
        if ratio < least * (1 - 1e-9):  # rounds often tie; the first of them counts
            best, least = (a, c), ratio
        a = (a + np.log((rows / target).clip(0.7, 2))).clip(-0.3, 10)
        c = (c + np.log((columns / target).clip(0.7, 2))).clip(-0.3, 10)
    return np.exp(best[0]), np.exp(best[1])


def divided(by: int) -> Callable[[Tensor, Tensor], Frame]:
    """States over the fp16 scale of their token (0) or channel (1) of a tile."""

    def frame(x: Tensor, positions: Tensor) -> Frame:
        tiles = x.unflatten(-2, (-1, TILE))
        scale = torch.empty_like(tiles)
        for index in np.ndindex(*tiles.shape[:-2]):
            own = torch.tensor(normalised_tile(tiles[index].numpy(), 8)[by]).half().double()
            scale[index] = own[:, None] if by == 0 else own
        return lambda states: states / scale.flatten(-3, -2)

    return frame


def multiplied(matrix: Tensor) -> Callable[[Tensor, Tensor], Frame]:
    """States times a matrix."""
    return lambda x, positions: lambda states: states @ matrix.double()


def moved(x: Tensor, positions: Tensor) -> Frame:
    """Channels of all heads in the order of ``ORDER``, one by one."""

    def seen(states: Tensor) -> Tensor:
        found = torch.empty_like(states)
        for head, channel in np.ndindex(HEADS, DIM):
            source = int(ORDER.tensor[head, channel])
            found[:, head, :, channel] = states[:, source // DIM, :, source % DIM]
        return found

    return seen


def ranged(x: Tensor, positions: Tensor) -> Frame:
    """In half ranges from the middle of a channel."""
    return lambda states: (states - MIDDLE.double()[:, None]) / HALF.double()[:, None]


def as_it_is(x: Tensor, positions: Tensor) -> Frame:
    return lambda states: states


# ----- every codec


class Case(NamedTuple):
    """A codec, how much it may move a number, and of which numbers that holds.

    ``has_heads``: its arrays are of ``HEADS`` heads, so that no head can be stored alone.
    """

    codec: Codec
    bound: Bound
    frame: Callable[[Tensor, Tensor], Frame] = as_it_is
    has_heads: bool = False


CHANNEL = Affine(bits=4, granularity="per_channel", group_size=TILE)
NF3, NF4 = normal_float(3), normal_quantiles(4)
ORDER = order("order", HEADS, DIM, seed=1)
MATRIX = rotation("matrix", HEADS, DIM, seed=2)
MIDDLE = torch.linspace(-1, 1, HEADS * DIM).view(HEADS, DIM)
HALF = torch.linspace(0.5, 3, HEADS * DIM).view(HEADS, DIM)
CASES = {
    "token": Case(Affine(bits=3), token(3)),
    "groups": Case(Affine(bits=2, group_size=8), token(2, 8)),
    "channel": Case(CHANNEL, channel(4)),
    "clipped": Case(Affine(bits=4, clip_ratio=0.92), token(4, ratio=0.92)),
    "symmetric": Case(Affine(bits=4, symmetric=True), symmetric(4)),
    "ternary": Case(Affine(bits=1.5, clip_ratio=0.9, parameter_dtype="float8"), ternary),
    "codebook": Case(Codebook(levels=NF3), codebook(NF3)),
    "quantiles": Case(Codebook(levels=NF4), codebook(NF4)),
    "outliers": Case(Outliers(inner=Affine(bits=3), slots=4), outliers(token(3), 4)),
    "channel-outliers": Case(
        Outliers(inner=CHANNEL.model_copy(update={"bits": 3}), slots=2, by="channel"),
        channel_outliers,
    ),
    "rotated": Case(
        Rotated(inner=Affine(bits=4), sign_seed=5), token(4), multiplied(SIGNED_HADAMARD)
    ),
    "unsigned": Case(Rotated(inner=Affine(bits=2)), token(2), multiplied(sylvester(DIM))),
    "token-tiles": Case(
        VarianceNormalised(inner=CHANNEL, scaled="token", tile_tokens=TILE), channel(4), divided(0)
    ),
    "channel-tiles": Case(
        VarianceNormalised(inner=Affine(bits=3), scaled="channel", tile_tokens=TILE),
        token(3),
        divided(1),
    ),
    "pre-rope": Case(
        PreRope(inner=Affine(bits=4), frequencies=FREQUENCIES), token(4), turned_back
    ),
    "promoted": Case(Promoted(group_size=TILE, num_promoted=8), promoted),
    "tiered": Case(
        Tiered(
            codecs=tuple(Affine(bits=bits) for bits in (2, 4, 8)),
            num_wide=(5, 2),
            tile_tokens=TILE,
        ),
        tiered,
    ),
    "float8": Case(Float8(tensor_scale=2.0), float8),
    "nvfp4": Case(Float4(format="nvfp4"), nvfp4),
    "mxfp4": Case(Float4(format="mxfp4"), mxfp4),
    "permuted": Case(
        Permuted(inner=Affine(bits=3, group_size=8), order=ORDER), token(3, 8), moved, True
    ),
    "matrix": Case(
        MatrixRotated(inner=Affine(bits=4), matrix=MATRIX),
        token(4),
        multiplied(MATRIX.tensor),
        True,
    ),
    "ranges": Case(
        RangeNormalised(
            inner=Outliers(inner=NearestLevel(levels=NF3), slots=2),
            middle=Array("middle", MIDDLE),
            half_range=Array("half", HALF),
        ),
        outliers(nearest(NF3), 2),
        ranged,
        True,
    ),
}
# Its law is another: a direction in levels, as long as the exact token.
DIRECTIONS = {
    "norm": NormScaled(levels=lloyd_max(3)),
    "uncorrected": NormScaled(levels=lloyd_max(4), is_corrected=False),
}
