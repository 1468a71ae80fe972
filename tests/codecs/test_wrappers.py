"""Codecs that hold another: what each adds, and that it is undone."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kvbits.codecs import (
    Affine,
    EncodeContext,
    Float4,
    Float8,
    Identity,
    NormScaled,
    Outliers,
    PreRope,
    Rotated,
    VarianceNormalised,
)
from kvbits.codecs.levels import lloyd_max, normal_float
from kvbits.codecs.rotation import hadamard
from kvbits.codecs.variance import tile_scales


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(codec, x):
    context = EncodeContext(torch.arange(x.shape[-2])[None])
    decoded = codec.decode(codec.encode(x, context), context)
    return ((decoded - x).square().mean() / x.square().mean()).item()


def test_the_rotation_is_the_hadamard_matrix():
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:  # Sylvester's construction
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = states(3, 16)
    torch.testing.assert_close(hadamard(x), x @ (matrix / 4))
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_a_rotation_spreads_an_outlier_channel():
    x = states(1, 2, 64, 64)
    x[..., 5] *= 60
    plain = relative_error(Affine(bits=4), x)
    assert relative_error(Rotated(inner=Affine(bits=4)), x) < plain / 2
    signed = Rotated(inner=Affine(bits=4), sign_seed=3)
    assert relative_error(signed, x) < plain / 2


def test_a_head_that_is_no_power_of_two_cannot_be_rotated():
    with pytest.raises(ValueError, match=r"must be a power of two to be rotated.*got 96"):
        Rotated(inner=Affine(bits=4)).check_head_dim(96)


def test_scales_of_a_tile_even_its_spreads_out():
    tile = states(128, 64) * states(128, 1, seed=1).exp() * states(1, 64, seed=2).exp()
    tokens, channels = tile_scales(tile, rounds=16)
    even = tile / tokens / channels

    def imbalance(x):
        spreads = torch.cat((x.std(-1), x.std(-2)))
        return (spreads.max() / spreads.min()).item()

    assert imbalance(tile) > 20
    assert imbalance(even) < imbalance(tile) / 10


def test_scales_of_a_tile_do_not_depend_on_the_order_of_sums():
    """In one tile of twenty, two rounds tie, and the last bit of a sum would choose one."""
    tiles = states(100, 16, 32)
    rows, columns = (
        torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (16, 32)
    )
    tokens, channels = tile_scales(tiles, rounds=8)
    others = tile_scales(tiles[:, rows][..., columns], rounds=8)
    torch.testing.assert_close(others[0], tokens[:, rows], rtol=1e-9, atol=0)  # float64 sums
    torch.testing.assert_close(others[1], channels[..., columns], rtol=1e-9, atol=0)


def test_a_tile_that_is_even_is_left_alone():
    sign = 1 - 2 * (torch.arange(64)[:, None] + torch.arange(32)).remainder(2)
    tokens, channels = tile_scales(sign.float(), rounds=8)
    torch.testing.assert_close(tokens, torch.ones_like(tokens), rtol=0.02, atol=0)
    torch.testing.assert_close(channels, torch.ones_like(channels), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_normalised_tiles_are_better_where_norms_of_tokens_differ(bits):
    x = states(1, 2, 256, 128) * (0.8 * states(1, 2, 256, 1, seed=1)).exp()
    x[..., (3, 40, 77)] += torch.tensor([5.0, -7.0, 9.0])
    channel = Affine(bits=bits, granularity="per_channel", group_size=128)
    kvarn = Rotated(inner=VarianceNormalised(inner=channel, scaled="token"))
    errors = [relative_error(codec, x) for codec in (Affine(bits=bits), channel, kvarn)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[1]


def test_a_tile_holds_whole_inner_blocks():
    inner = Affine(bits=2, granularity="per_channel", group_size=48)
    with pytest.raises(ValueError, match="tile_tokens must be a multiple of the inner block, 48"):
        VarianceNormalised(inner=inner, scaled="token").check_head_dim(64)


def test_stored_bits_of_a_tile_are_those_of_the_paper():
    """K2V2 at D = G = 128: 2.375 bits, with three numbers per 128 values on either side."""
    key = VarianceNormalised(
        inner=Affine(bits=2, granularity="per_channel", group_size=128), scaled="token"
    )
    value = VarianceNormalised(inner=Affine(bits=2), scaled="channel")
    assert key.stored_bits(128) == value.stored_bits(128) == 2.375


@pytest.mark.parametrize("by", ["token", "channel"])
def test_outliers_come_back_with_the_precision_of_a_half(by):
    """What the inner codec misses is stored, so that is what rounding is relative to."""
    x = states(2, 3, 64, 32)
    x[..., 7] += 30  # a channel far from zero is no outlier of its own range
    x[0, 0, 5, 9], x[1, 2, 40, 3] = 50.0, -40.0
    inner = Affine(bits=2, granularity="per_channel", group_size=32)
    inner = inner if by == "channel" else Affine(bits=2)
    codec = Outliers(inner=inner, slots=4, by=by)
    encoded = codec.encode(x)
    channel = encoded.parameters["outlier_channel"].squeeze(-2).long()
    assert (channel.diff() > 0).all()  # four of them, in order
    assert (channel[0, 0, 5] == 9).any()
    assert (channel[1, 2, 40] == 3).any()
    kept = x.gather(-1, channel)
    missed = (kept - inner.decode(encoded).gather(-1, channel)).abs()
    error = (codec.decode(encoded).gather(-1, channel) - kept).abs()
    # Half a unit of an fp16 of 11 bits, or of its smallest, and float32 on the way.
    assert (error <= missed * 2**-11 + 2**-25 + kept.abs() * 2**-22).all()
    share = (channel == 7).any(-1).float().mean()
    assert share == (1 if by == "token" else pytest.approx(4 / 32, abs=0.1))


def test_a_token_parts_with_its_extremes():
    x = torch.arange(16.0)[None, None, None].flip(-1)
    codec = Outliers(inner=Affine(bits=8), slots=4)
    encoded = codec.encode(x)
    assert encoded.parameters["outlier_channel"].flatten().tolist() == [0, 1, 14, 15]
    # The others go from 2 to 13; their median, 7, stands in for what is apart.
    inside = codec.inner.decode(encoded).flatten()[[0, 1, 14, 15]]
    torch.testing.assert_close(inside, torch.full((4,), 7.0), rtol=0, atol=11 / 255)
    decoded = codec.decode(encoded).flatten()[[0, 1, 14, 15]]
    torch.testing.assert_close(decoded, torch.tensor([15.0, 14, 1, 0]), rtol=0, atol=8 * 2**-11)


def test_outliers_at_the_limit_are_still_stored_to_the_precision_of_a_half():
    """The widest differences: all that is left lies at one end, the outlier at the other."""
    for bits in (2, 8):
        codec = Outliers(inner=Affine(bits=bits), slots=2)
        limit = codec.largest_magnitude(64)
        for sign in (1, -1):
            x = torch.full((1, 1, 1, 64), sign * limit)
            x[..., 3], x[..., 5] = -sign * limit, sign * limit * 0.37
            error = (codec.decode(codec.encode(x)) - x)[..., 3].abs()
            assert error <= 2 * limit * 2**-10


def test_stored_bits_of_outliers_are_24_a_slot():
    assert Outliers(inner=Affine(bits=3), slots=2).stored_bits(128) == 3 + 32 / 128 + 48 / 128


def test_keys_are_turned_back_by_their_position():
    frequencies = (1.0, 0.1)
    codec = PreRope(inner=Affine(bits=8), frequencies=frequencies)
    # A million needs more than float32: its angles are 0.03 apart there.
    plain, position = states(1, 1, 6, 5), torch.tensor([[0, 1, 5, 100, 1_000_003, 31]])
    angle = position[0, :, None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)  # a pair as a complex number
    pairs = torch.complex(plain[0, 0, :, :2].double(), plain[0, 0, :, 2:4].double()) * turn
    turned = torch.cat((pairs.real, pairs.imag, plain[0, 0, :, 4:].double()), -1).float()
    context = EncodeContext(position)
    torch.testing.assert_close(codec.apply(turned[None, None], context), plain)
    torch.testing.assert_close(codec.undo(plain, context), turned[None, None])


def test_a_message_names_kinds_alone():
    codec = Rotated(inner=Outliers(inner=Affine(bits=4), slots=2))
    assert codec.summary == "rotated(outliers(affine))"


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Rotated(inner=Identity()), "inner must not be exact"),
        (
            lambda: Outliers(inner=Outliers(inner=Affine(bits=2), slots=2), slots=2),
            "inner must not store 'outlier_channel' too",
        ),
        (lambda: Outliers(inner=Affine(bits=2), slots=3), "slots"),
        (lambda: PreRope(inner=Affine(bits=2), frequencies=()), "frequencies"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, rule):
    with pytest.raises(ValidationError, match=rule):
        make()


@pytest.mark.parametrize(
    ("codec", "head_dim", "rule"),
    [
        (Outliers(inner=Affine(bits=2), slots=8), 8, "head_dim must be above slots=8"),
        (Outliers(inner=Affine(bits=2), slots=8), 512, "at most 256, got 512"),
        (
            PreRope(inner=Affine(bits=2), frequencies=(1.0,) * 9),
            16,
            "must be at least 18",
        ),
    ],
)
def test_head_dims_that_do_not_fit_are_refused(codec, head_dim, rule):
    with pytest.raises(ValueError, match=rule):
        codec.check_head_dim(head_dim)


WIDE = [
    Rotated(inner=Affine(bits=4)),
    Rotated(inner=NormScaled(levels=lloyd_max(2)), sign_seed=1),
    Rotated(inner=VarianceNormalised(inner=Affine(bits=2), scaled="channel", tile_tokens=4)),
    Rotated(inner=Float8()),
    NormScaled(levels=lloyd_max(4)),
    NormScaled(levels=normal_float(4)),
    PreRope(inner=Affine(bits=3, parameter_dtype="float8"), frequencies=(1.0, 0.5)),
    Outliers(inner=Affine(bits=4), slots=2),
]


@pytest.mark.parametrize("codec", WIDE, ids=lambda codec: codec.summary[:40])
@pytest.mark.parametrize("head_dim", [16, 512])
def test_the_largest_states_do_not_overflow(codec, head_dim):
    """All of one sign, of alternating signs, and all zero: at the limit, nothing is NaN or inf."""
    if isinstance(codec, Outliers) and head_dim > 256:
        pytest.skip("an index is a byte")
    limit = codec.largest_magnitude(head_dim)
    signs = 1 - 2 * torch.arange(head_dim).remainder(2)
    rows = torch.stack((torch.ones(head_dim), -torch.ones(head_dim), signs, torch.zeros(head_dim)))
    context = EncodeContext(torch.arange(4)[None])
    encoded = codec.encode(rows[None, None] * min(limit, 3e38), context)
    assert all(each.isfinite().all() for each in encoded.parameters.values())
    assert codec.decode(encoded, context).isfinite().all()


def test_turboquant_holds_the_keys_of_real_models():
    codec = Rotated(inner=NormScaled(levels=lloyd_max(4)), sign_seed=0)
    assert codec.largest_magnitude(128) > 2000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValidationError):
        PreRope(inner=Affine(bits=2), frequencies=(bad,))
    with pytest.raises(ValidationError):
        NormScaled(levels=(-1.0, bad, 1.0, 2.0))
    with pytest.raises(ValidationError):
        Float8(tensor_scale=bad)


def test_what_is_stored_does_not_follow_the_default_dtype():
    x = states(1, 1, 4, 32)
    codecs = (NormScaled(levels=lloyd_max(3)), Float4(format="mxfp4"), Float4(format="nvfp4"))
    expected = [codec.decode(codec.encode(x)) for codec in codecs]
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = [codec.decode(codec.encode(x)) for codec in codecs]
        finally:
            torch.set_default_dtype(torch.float32)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)
