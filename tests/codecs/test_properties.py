"""Laws of every codec on random states: errors within a bound that follows from the states alone,
codes and parameters as declared, and nothing stored that depends on who shares the call."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from codec_bounds import CASES, DIM, DIRECTIONS, TILE, TINY, ULP, to_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbits.codecs import AnyCodec, EncodeContext, Hqq, Identity, Quanto
from kvbits.codecs.wrappers import Wrapper

# Encoding and decoding take a few float32 roundings of numbers no larger than this share allows.
FLOAT32 = 64 * 2.0**-24

with_bounds = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
CODECS = {name: case.codec for name, case in CASES.items()} | DIRECTIONS
every_codec = pytest.mark.parametrize("name", CODECS)


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


def test_no_codec_is_left_out():
    """But for what returns its states, and what others encode: test_external.py."""

    def kinds(codec):
        yield type(codec)
        if isinstance(codec, Wrapper):
            yield from kinds(codec.inner)

    union, _ = get_args(AnyCodec)
    found = {kind for codec in CODECS.values() for kind in kinds(codec)}
    assert found == set(get_args(union)) - {Identity, Hqq, Quanto}


@with_bounds
@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=states())
def test_states_move_by_no_more_than_the_codec_promises(case, x):
    limit = case.codec.largest_magnitude(DIM)
    x, context = x.clamp(-limit, limit), context_of(x)
    decoded = case.codec.decode(case.codec.encode(x, context), context)
    assert decoded.shape == x.shape
    seen = case.frame(x.double(), context.positions)
    exact, found = seen(x.double()), seen(decoded.double())
    slack = FLOAT32 * (exact.abs().amax((-2, -1), True) + x.abs().amax((-2, -1), True))
    excess = (found - exact).abs() - case.bound(exact) - slack
    assert excess.max() <= 0, f"{excess.max()} too much"


@pytest.mark.parametrize("codec", DIRECTIONS.values(), ids=DIRECTIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=states())
def test_directions_take_the_nearest_levels_and_tokens_keep_their_length(codec, x):
    encoded = codec.encode(x)
    norm = x.double().norm(dim=-1, keepdim=True)
    direction = x.double() * (math.sqrt(DIM) / torch.where(norm == 0, 1.0, norm))
    table = torch.tensor(codec.levels, dtype=torch.float64)
    taken = table[encoded.codes.int()]
    assert ((taken - direction).abs() <= to_levels(direction, table) + FLOAT32).all()
    length = taken.norm(dim=-1, keepdim=True) if codec.is_corrected else math.sqrt(DIM)
    expected = taken * norm / length
    room = taken.abs() / math.sqrt(DIM) * TINY  # of a norm that fp16 rounds to a small number
    error = (codec.decode(encoded) - expected).abs()
    assert (error <= expected.abs() * (ULP / 2 + FLOAT32) + room).all()


@every_codec
@settings(max_examples=10, deadline=None, derandomize=True)
@given(x=states())
def test_codes_and_parameters_are_as_declared(name, x):
    codec = CODECS[name]
    encoded = codec.encode(x, context_of(x))
    assert encoded.codes.dtype == torch.uint8
    assert encoded.codes.shape == x.shape
    assert int(encoded.codes.max()) < (3 if codec.code_bits() == 1.5 else 2 ** codec.code_bits())
    specs = {spec.name: spec for spec in codec.parameter_specs(DIM)}
    assert specs.keys() == encoded.parameters.keys()
    for parameter, spec in specs.items():
        found, count = encoded.parameters[parameter], 2 * TILE // spec.block_tokens
        assert found.dtype == spec.dtype
        assert found.shape == (2, 2, count, spec.rows, spec.components)
        if found.is_floating_point():
            assert found.isfinite().all()


@every_codec
@settings(max_examples=10, deadline=None, derandomize=True)
@given(x=states())
def test_a_row_a_head_and_a_block_store_what_they_would_alone(name, x):
    codec = CODECS[name]
    heads = slice(0 if name in CASES and CASES[name].has_heads else 1, None)
    together = codec.encode(x, context_of(x))
    part = x[1:, heads, TILE:]
    alone = codec.encode(part, context_of(part, TILE))
    assert torch.equal(together.codes[1:, heads, TILE:], alone.codes)
    for parameter, values in alone.parameters.items():
        whole = together.parameters[parameter]
        assert torch.equal(whole[1:, heads, whole.shape[2] // 2 :], values)
