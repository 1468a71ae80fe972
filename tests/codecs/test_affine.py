"""Affine and Identity: error bounds, degenerate groups, group borders, stored bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kvbits.codecs import Affine, AnyCodec, Identity

WIDTHS = (2, 3, 4, 8)
GRANULARITIES = {
    "token": {},
    "token-groups": {"group_size": 8},
    "channel": {"granularity": "per_channel", "group_size": 8},
}
CODECS = [
    pytest.param(
        Affine(bits=bits, symmetric=symmetric, parameter_dtype=dtype, **fields),
        id=f"{bits}-{name}-{'symmetric' if symmetric else 'offset'}-{dtype}",
    )
    for bits, (name, fields), symmetric, dtype in itertools.product(
        WIDTHS, GRANULARITIES.items(), (False, True), ("float16", "float32")
    )
]
F32_EPS = torch.finfo(torch.float32).eps


def stored_step(codec, encoded):
    """The stored scale of every value, ``[B, H, T, D]``."""
    scale = encoded.parameters["affine"][..., :1].float()
    head_dim = encoded.codes.shape[-1]
    if codec.granularity == "per_channel":
        return scale[..., 0].repeat_interleave(codec.block_tokens, 2)
    group = codec.group_size or head_dim
    return scale[..., 0].repeat_interleave(group, -1)


def assert_within_half_a_step(codec, states):
    """Rounding to nearest moves a value by at most half a stored step.

    On top come the float32 roundings of encode and decode: a subtraction, a division and a fused
    multiply-add of numbers no larger than the values and the range, 4 ulp of their sum.
    """
    encoded = codec.encode(states)
    assert encoded.codes.dtype == torch.uint8
    assert int(encoded.codes.max()) < 2**codec.bits
    decoded = codec.decode(encoded)
    step = stored_step(codec, encoded)
    size = states.float().abs() + step * 2**codec.bits
    slack = 4 * F32_EPS * size + 2**codec.bits * math.ldexp(1, -149)
    excess = (decoded - states.float()).abs() - (step / 2 + slack)
    assert decoded.isfinite().all()
    assert excess.max() <= 0, f"{codec} exceeds half a stored step by {excess.max()}"
    return decoded


def normal(shape=(2, 3, 16, 16), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", CODECS)
def test_error_is_at_most_half_a_stored_step(codec):
    """Also far from zero with a small spread, and where the scale is a denormal number."""
    spreads = [(0, 1), (1000, 1e-3), (-30000, 0.5), (0, 1e-6), (5, 1e-9), (0, 1e-40), (0, 10000)]
    for center, spread in spreads:
        assert_within_half_a_step(codec, center + spread * normal())


@given(
    bits=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float16", "float32"]),
    where=st.sampled_from(sorted(GRANULARITIES)),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_error_bound_holds_for_any_representable_values(bits, symmetric, dtype, where, data):
    codec = Affine(bits=bits, symmetric=symmetric, parameter_dtype=dtype, **GRANULARITIES[where])
    values = data.draw(
        st.lists(st.floats(-65504, 65504, width=32), min_size=8 * 8, max_size=8 * 8)
    )
    assert_within_half_a_step(codec, torch.tensor(values).view(1, 1, 8, 8))


@pytest.mark.parametrize("codec", CODECS)
def test_a_constant_group_is_restored_to_the_precision_of_the_stored_dtype(codec):
    dtype = torch.float16 if codec.parameter_dtype == "float16" else torch.float32
    for constant in (0.0, 1.0, -3.14159, 1234.567, -6e4, 65504.0, 1e-7, 1e-30):
        states = torch.full((1, 2, 8, 8), constant)
        decoded = assert_within_half_a_step(codec, states)
        ulp = max(abs(constant) * torch.finfo(dtype).eps, 2.0**-24)
        assert (decoded - states).abs().max() <= ulp


@pytest.mark.parametrize("codec", CODECS)
def test_a_constant_group_is_never_divided_by_zero(codec, monkeypatch):
    """Turning NaN into an integer is undefined: x86 gives the right code 0, others may not."""
    real, seen = torch.Tensor.round_, []

    def watched(self):
        seen.append(bool(self.isfinite().all()))
        return real(self)

    monkeypatch.setattr(torch.Tensor, "round_", watched)
    for constant in (0.0, 1.0, -2.5):
        codec.encode(torch.full((1, 1, 8, 8), constant))
    assert seen == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_magnitudes_a_float16_scale_allows_do_not_overflow(bits, dtype):
    limit = min(torch.finfo(dtype).max, 65280.0)
    states = torch.tensor([-limit, limit] * 32, dtype=dtype).view(1, 1, 8, 8)
    for symmetric in (False, True):
        assert_within_half_a_step(Affine(bits=bits, symmetric=symmetric), states)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_at_both_ends_are_used(codec):
    """The stored range is no wider than it must be: rounding outwards costs no whole code."""
    states = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).contiguous()
    if codec.granularity == "per_channel":
        states = states.transpose(-1, -2).contiguous()
    codes = codec.encode(states).codes
    assert int(codes.max()) == 2**codec.bits - 1
    assert int(codes.min()) == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_float32_parameters_are_finer_for_a_small_spread_far_from_zero(bits):
    states = 1000 + 1e-3 * normal()
    errors = [
        (codec.decode(codec.encode(states)) - states).abs().max()
        for codec in (Affine(bits=bits), Affine(bits=bits, parameter_dtype="float32"))
    ]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_codes_store_zero_exactly_and_no_offset(bits):
    states = normal((1, 1, 4, 16))
    states[..., 3] = 0
    codec = Affine(bits=bits, symmetric=True)
    encoded = codec.encode(states)
    assert encoded.parameters["affine"].shape == (1, 1, 4, 1, 1)
    assert (codec.decode(encoded)[..., 3] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_groups_never_straddle_a_channel_a_block_or_a_head(codec):
    """Changing one group changes no code and no parameter of any other."""
    states = normal((2, 3, 16, 16))
    touched = torch.zeros(16, 16, dtype=torch.bool)
    if codec.granularity == "per_channel":
        touched[8:, 5] = True
    elif codec.group_size:
        touched[3, 8:] = True
    else:
        touched[3] = True
    changed = states.clone()
    changed[1, 2][touched] *= -50
    before, after = codec.encode(states), codec.encode(changed)
    differs = (before.codes != after.codes) | (codec.decode(before) != codec.decode(after))
    assert differs[1, 2][touched].any()
    assert not differs[1, 2][~touched].any()
    differs[1, 2] = False
    assert not differs.any()


@pytest.mark.parametrize("codec", CODECS)
def test_stored_bits_count_codes_and_parameters(codec):
    encoded = codec.encode(normal((1, 1, 16, 16)))
    bits = encoded.codes.numel() * codec.bits
    bits += sum(8 * parameter.nbytes for parameter in encoded.parameters.values())
    assert codec.stored_bits(16) * encoded.codes.numel() == bits


def test_stored_bits_of_the_known_settings():
    """Two-bit codes in groups of 32 with a float16 scale and offset cost 3 bits, not 2."""
    assert Affine(bits=2, granularity="per_channel", group_size=32).stored_bits(128) == 3
    assert Affine(bits=4).stored_bits(128) == 4.25
    assert Affine(bits=4, parameter_dtype="float32", symmetric=True).stored_bits(64) == 4.5
    assert Identity().stored_bits(64) == 16
    assert Identity().stored_bits(64, state_bits=32) == 32


@pytest.mark.parametrize(
    ("codec", "head_dim", "message"),
    [
        (Affine(bits=2), 6, "head_dim must be a multiple of 4 for bits=2, got 6"),
        (Affine(bits=3), 20, "head_dim must be a multiple of 8 for bits=3, got 20"),
        (Affine(bits=4), 33, "head_dim must be a multiple of 2 for bits=4, got 33"),
        (Affine(bits=4, group_size=24), 64, "group_size must divide head_dim=64, got 24"),
    ],
)
def test_a_head_dim_that_does_not_fill_bytes_is_refused(codec, head_dim, message):
    with pytest.raises(ValueError, match=message):
        codec.check_head_dim(head_dim)


@pytest.mark.parametrize("codec", [Affine(bits=8), Identity()])
def test_eight_and_sixteen_bits_take_any_head_dim(codec):
    codec.check_head_dim(33)
    states = normal((1, 1, 2, 33))
    assert codec.decode(codec.encode(states)).shape == states.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": 4, "granularity": "per_channel"}, "group_size must be given"),
        ({"bits": 4, "group_size": 0}, "group_size must be at least 1, got 0"),
        ({"bits": 4, "group_sise": 32}, "group_sise"),
        ({"bits": 4, "parameter_dtype": "bfloat16"}, "parameter_dtype"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValidationError, match=message):
        Affine(**fields)


def test_codecs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Affine(bits=4).bits = 2


@pytest.mark.parametrize("codec", [*CODECS[::7], Identity()])
def test_a_codec_survives_json(codec):
    adapter = TypeAdapter(AnyCodec)
    assert adapter.validate_json(adapter.dump_json(codec)) == codec


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValidationError, match="nosuch"):
        TypeAdapter(AnyCodec).validate_json('{"kind": "nosuch", "bits": 4}')


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_identity_returns_the_very_states(dtype):
    states = normal().to(dtype)
    decoded = Identity().decode(Identity().encode(states))
    assert decoded.dtype == dtype
    assert torch.equal(decoded, states)


@pytest.mark.parametrize("codec", CODECS[::3])
def test_bfloat16_states_are_encoded_in_float32(codec):
    states = normal().bfloat16()
    ours, wide = codec.encode(states), codec.encode(states.float())
    assert torch.equal(ours.codes, wide.codes)
    assert torch.equal(ours.parameters["affine"], wide.parameters["affine"])
