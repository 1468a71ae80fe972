"""Laws of every codec on random states: errors within a bound that follows from the states alone,
codes and parameters as declared, and nothing stored that depends on who shares the call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbits.codecs import (
    Affine,
    Codebook,
    Codec,
    EncodeContext,
    Float4,
    Float8,
    NormScaled,
    Outliers,
    PreRope,
    Promoted,
    Rotated,
    Tiered,
    VarianceNormalised,
)
from kvbits.codecs.levels import lloyd_max, normal_float, normal_quantiles

DIM, TILE = 32, 16
# Scale and offset are rounded outwards to fp16: by less than 2^-10 of themselves, or 2^-24.
ULP, TINY = 2.0**-10, 2.0**-24
# Encoding and decoding take a few float32 roundings of numbers no larger than this share allows.
FLOAT32 = 64 * 2.0**-24


def step_of(low: Tensor, high: Tensor, top: int) -> Tensor:
    """Largest stored step over a range, fp16 rounding of scale and offset included."""
    offset = low.abs() * ULP + TINY
    return (high - low + offset) / top * (1 + ULP) + TINY


def token_error(x: Tensor, bits: int) -> Tensor:
    """Half a step of the token's range."""
    return step_of(x.amin(-1, True), x.amax(-1, True), 2**bits - 1).expand_as(x) / 2


def channel_error(x: Tensor, bits: int) -> Tensor:
    """Half a step of the range of a channel in its tile."""
    tiles = x.unflatten(-2, (-1, TILE))
    step = step_of(tiles.amin(-2, True), tiles.amax(-2, True), 2**bits - 1)
    return (step.expand_as(tiles) / 2).flatten(-3, -2)


def codebook_error(levels: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """Half the widest gap between levels of half the range."""
    gap = max(high - low for low, high in pairwise(levels))

    def error(x: Tensor) -> Tensor:
        low, high = x.amin(-1, True), x.amax(-1, True)
        middle = (low + high).abs() / 2 * ULP + TINY
        return (((high - low) / 2 + middle) * (1 + ULP) + TINY).expand_as(x) * gap / 2

    return error


def kept(x: Tensor, slots: int) -> Tensor:
    """Whether a value is among the extremes of its token."""
    ranked = x.argsort(dim=-1, stable=True).argsort(-1)
    return (ranked < slots // 2) | (ranked >= DIM - slots // 2)


def outlier_error(x: Tensor) -> Tensor:
    """fp16 for what is apart; half a step of the range of the others, the median among them."""
    is_kept = kept(x, 4)
    rest = torch.where(is_kept, x.median(-1, keepdim=True).values, x)
    return torch.where(is_kept, x.abs() * ULP + TINY, token_error(rest, 3))


def rotated_error(x: Tensor) -> Tensor:
    """A rotation keeps lengths: channels err by no more than all of them together."""
    largest = x.square().sum(-1, keepdim=True).sqrt()  # what one rotated channel can hold
    return (token_error(torch.cat((-largest, largest), -1), 4)[..., :1] * DIM**0.5).expand_as(x)


def turned_error(x: Tensor) -> Tensor:
    """A pair errs by no more than both of its channels; each may hold its length."""
    largest = (x[..., : DIM // 2].square() + x[..., DIM // 2 :].square()).sqrt().amax(-1, True)
    return token_error(torch.cat((-largest, largest), -1), 4)[..., :1].expand_as(x) * 2**0.5


def tile_error(x: Tensor) -> Tensor:
    """Half a step of what is left of a channel, times the scale that a token was divided by."""
    scale = CASES["tiles"].codec.encode(x).parameters["tile_scale"].float()[..., 0]
    return channel_error(x / scale, 4) * scale


def promoted_error(x: Tensor) -> Tensor:
    """Half a 4-bit step for the 8 channels of a tile whose mean magnitude is largest."""
    size = x.unflatten(-2, (-1, TILE)).abs().double().sum(-2)
    order = size.sort(dim=-1, descending=True, stable=True).indices[..., :8]
    wide = torch.zeros_like(size, dtype=torch.bool).scatter(-1, order, True)
    wide = wide.repeat_interleave(TILE, -2)
    return torch.where(wide, channel_error(x, 4), channel_error(x, 2))


def tiered_error(x: Tensor) -> Tensor:
    """Half a step of 4 bits for the 5 tokens of a tile whose range is largest, else of 2."""
    ranges = (x.amax(-1) - x.amin(-1)).unflatten(-1, (-1, TILE))
    order = ranges.sort(dim=-1, descending=True, stable=True).indices[..., :5]
    wide = torch.zeros_like(ranges, dtype=torch.bool).scatter(-1, order, True)
    return torch.where(wide.flatten(-2)[..., None], token_error(x, 4), token_error(x, 2))


def float8_error(x: Tensor) -> Tensor:
    """Half of 2^-3 of a value, or of 2^-9 among subnormals; beyond 448 all that is beyond."""
    scaled = x / 2
    near = torch.maximum(scaled.abs() * 2.0**-4, torch.tensor(2.0**-10))
    return 2 * (near + (scaled.abs() - 448).clamp(min=0))


def nvfp4_error(x: Tensor) -> Tensor:
    """Half the widest gap, which is one scale; and six times what the scale was rounded by."""
    scale = (x.abs().unflatten(-1, (-1, 16)).amax(-1, True) / 6).expand(*x.shape[:-1], 2, 16)
    rounding = torch.maximum(scale * 2.0**-4, torch.tensor(2.0**-10))
    return (scale + rounding + 6 * rounding).flatten(-2)


def mxfp4_error(x: Tensor) -> Tensor:
    """A scale is at most a quarter of the largest magnitude; beyond 6 of them lie 2 more."""
    return x.abs().amax(-1, True).expand_as(x) / 4 * 2 + 2.0**-126


class Case(NamedTuple):
    """A codec, and how much it may move each state; None where its law is another."""

    codec: Codec
    error: Callable[[Tensor], Tensor] | None


CHANNEL = Affine(bits=4, granularity="per_channel", group_size=TILE)
CASES = {
    "codebook": Case(Codebook(levels=normal_float(3)), codebook_error(normal_float(3))),
    "quantiles": Case(Codebook(levels=normal_quantiles(4)), codebook_error(normal_quantiles(4))),
    "outliers": Case(Outliers(inner=Affine(bits=3), slots=4), outlier_error),
    "rotated": Case(Rotated(inner=Affine(bits=4), sign_seed=5), rotated_error),
    "tiles": Case(VarianceNormalised(inner=CHANNEL, scaled="token", tile_tokens=TILE), tile_error),
    "norm": Case(NormScaled(levels=lloyd_max(3)), None),
    "pre-rope": Case(
        PreRope(inner=Affine(bits=4), frequencies=tuple(0.7**pair for pair in range(DIM // 2))),
        turned_error,
    ),
    "promoted": Case(Promoted(group_size=TILE, num_promoted=8), promoted_error),
    "tiered": Case(
        Tiered(codecs=(Affine(bits=2), Affine(bits=4)), num_wide=(5,), tile_tokens=TILE),
        tiered_error,
    ),
    "float8": Case(Float8(tensor_scale=2.0), float8_error),
    "nvfp4": Case(Float4(format="nvfp4"), nvfp4_error),
    "mxfp4": Case(Float4(format="mxfp4"), mxfp4_error),
}
every_codec = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@st.composite
def states(draw) -> Tensor:
    """``[2, 2, 2 tiles, D]`` of many sizes, with channels or values far from zero, or flat."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(2, 2, 2 * TILE, DIM, generator=generator)
    kind = draw(st.sampled_from(["plain", "channel", "token", "spikes", "flat", "zero"]))
    if kind == "channel":
        x[..., draw(st.integers(0, DIM - 1))] += 15
    elif kind == "token":
        x[:, :, draw(st.integers(0, 2 * TILE - 1))] *= 15
    elif kind == "spikes":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, 15 * x, x)
    elif kind == "flat":
        x[:, :, 3:] = x[:, :, :1, :1]
    elif kind == "zero":
        x[:, 0] = 0
    return x * 2.0 ** draw(st.integers(-12, 5))


def context_of(x: Tensor, start: int = 0) -> EncodeContext:
    return EncodeContext(torch.arange(start, start + x.shape[-2])[None])


@every_codec
@settings(max_examples=20, deadline=None)
@given(x=states())
def test_states_move_by_no_more_than_the_codec_promises(case, x):
    context = context_of(x)
    decoded = case.codec.decode(case.codec.encode(x, context), context)
    assert decoded.shape == x.shape
    if case.error is None:  # the decoded vector is as long as the exact one
        exact, found = x.double().norm(dim=-1), decoded.double().norm(dim=-1)
        assert ((found - exact).abs() <= exact * (ULP + FLOAT32) + TINY * DIM**0.5 * 4).all()
        return
    slack = FLOAT32 * x.abs().amax((-2, -1), True)
    excess = (decoded - x).abs() - case.error(x) - slack
    assert excess.max() <= 0, f"{excess.max()} too much"


@every_codec
@settings(max_examples=10, deadline=None)
@given(x=states())
def test_codes_and_parameters_are_as_declared(case, x):
    encoded = case.codec.encode(x, context_of(x))
    assert encoded.codes.dtype == torch.uint8
    assert encoded.codes.shape == x.shape
    assert int(encoded.codes.max()) < 2 ** case.codec.code_bits()
    specs = {spec.name: spec for spec in case.codec.parameter_specs(DIM)}
    assert specs.keys() == encoded.parameters.keys()
    for name, spec in specs.items():
        found, count = encoded.parameters[name], 2 * TILE // spec.block_tokens
        assert found.dtype == spec.dtype
        assert found.shape == (2, 2, count, spec.rows, spec.components)
        if found.is_floating_point():
            assert found.isfinite().all()


@every_codec
@settings(max_examples=10, deadline=None)
@given(x=states())
def test_a_row_a_head_and_a_block_store_what_they_would_alone(case, x):
    together = case.codec.encode(x, context_of(x))
    part = x[1:, 1:, TILE:]
    alone = case.codec.encode(part, context_of(part, TILE))
    assert torch.equal(together.codes[1:, 1:, TILE:], alone.codes)
    for name, values in alone.parameters.items():
        whole = together.parameters[name]
        assert torch.equal(whole[1:, 1:, whole.shape[2] // 2 :], values)
