"""Codecs that hold arrays: permutations, rotations and ranges, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvbits.codecs import (
    Affine,
    Array,
    EncodeContext,
    MatrixRotated,
    NearestLevel,
    Outliers,
    Permuted,
    RangeNormalised,
)
from kvbits.codecs.levels import normal_float
from kvbits.codecs.matrix import tolerance

CONTEXT = EncodeContext()
LEVELS = normal_float(3)


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permuted(order, inner=None):
    return Permuted(inner=inner or Affine(bits=4), order=Array("order", order))


def rotated(matrix, inner=None):
    return MatrixRotated(inner=inner or Affine(bits=4), matrix=Array("matrix", matrix))


def normalised(inner, middle, half_range):
    return RangeNormalised(
        inner=inner,
        middle=Array("middle", middle),
        half_range=Array("half_range", half_range),
    )


def orthogonal(heads, width, seed=0):
    normal = states(heads, width, width, seed=seed).double()
    return torch.linalg.qr(normal).Q.float()


# ----- permutations


def test_channels_are_gathered_over_heads():
    order = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    x = torch.tensor([[[[10.0, 11.0]], [[20.0, 21.0]]]])  # channels 0 to 3, two a head
    moved = permuted(order).apply(x, CONTEXT)
    assert moved.tolist() == [[[[21.0, 10.0]], [[20.0, 11.0]]]]


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_moving_channels_is_undone_and_only_moves_errors(heads, groups, tokens, seed):
    """What a permuted codec decodes is what its inner one decodes, at the permuted places."""
    width = 8 * groups
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(heads * width, generator=generator).int().view(heads, width)
    inner = Affine(bits=2, group_size=8)
    codec = permuted(order, inner)
    x = states(2, heads, tokens, width, seed=seed)
    assert torch.equal(codec.undo(codec.apply(x, CONTEXT), CONTEXT), x)
    decoded = codec.decode(codec.encode(x))
    flat_x, flat = (each.transpose(1, 2).flatten(-2) for each in (x, decoded))
    moved = flat_x[..., order.flatten().long()].unflatten(-1, order.shape).transpose(1, 2)
    expected = inner.decode(inner.encode(moved)).transpose(1, 2).flatten(-2)
    assert torch.equal(flat[..., order.flatten().long()], expected)


def test_channels_of_one_range_together_need_a_smaller_one():
    """Every second channel is 50 times as large: apart, small ones keep a scale of their own."""
    x = states(1, 1, 64, 16)
    x[..., ::2] *= 50
    order = torch.tensor([[*range(0, 16, 2), *range(1, 16, 2)]], dtype=torch.int32)
    inner = Affine(bits=3, group_size=8)
    small = slice(1, None, 2)

    def error(codec):
        return (codec.decode(codec.encode(x)) - x)[..., small].square().mean()

    assert error(permuted(order, inner)) < error(inner) / 1000  # steps differ by 50


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([[0, 0]], dtype=torch.int32), "every number from 0 to 1 once"),
        (torch.tensor([[1, 2]], dtype=torch.int32), "every number from 0 to 1 once"),
        (torch.tensor([[0, -1]], dtype=torch.int32), "every number from 0 to 1 once"),
        (torch.tensor([0, 1], dtype=torch.int32), r"shape \[any, any\], got \[2\]"),
        (torch.tensor([[0.0, 1.0]]), "order must be int32, got float32"),
    ],
)
def test_what_is_no_permutation_is_refused(order, message):
    with pytest.raises(ValidationError, match=message):
        permuted(order)


# ----- rotations


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(1, 3),
    width=st.sampled_from([4, 12, 32]),
    is_shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotations_are_products_and_are_undone(heads, width, is_shared, seed):
    matrix = orthogonal(1 if is_shared else heads, width, seed)
    codec = rotated(matrix)
    x = states(2, heads, 5, width, seed=seed)
    turned = codec.apply(x, CONTEXT)
    for head in range(heads):
        exact = x[:, head].double() @ matrix[0 if is_shared else head].double()
        torch.testing.assert_close(turned[:, head].double(), exact, rtol=2**-23, atol=1e-30)
    back = codec.undo(turned, CONTEXT)
    # A token comes back within its norm times the deviation of the matrix and float32 rounding.
    room = x.norm(dim=-1, keepdim=True) * (tolerance(width) * math.sqrt(width) + 2**-22)
    assert ((back - x).abs() <= room).all()


def test_the_error_of_a_rotated_token_is_that_of_its_inner_codec():
    """A rotation keeps lengths: the error in the rotated space is the error of the token."""
    x = states(1, 2, 30, 32)
    codec = rotated(orthogonal(2, 32))
    inner = codec.inner
    turned = codec.apply(x, CONTEXT)
    within = (inner.decode(inner.encode(turned)) - turned).norm(dim=-1)
    found = (codec.decode(codec.encode(x)) - x).norm(dim=-1)
    torch.testing.assert_close(found, within, rtol=1e-4, atol=0)  # float32, 32 terms


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (2 * torch.eye(4)[None], "matrix must be orthogonal, within .* got 3"),
        (torch.ones(1, 4, 4) / 4, "matrix must be orthogonal"),
        (torch.eye(4)[None] + 1e-5, "matrix must be orthogonal, within 1.9e-06 .* got 2e-05"),
        (torch.ones(1, 4, 3), r"shape \[any, 3, 3\], got \[1, 4, 3\]"),
        (torch.tensor(1.0), r"must have shape"),
        (torch.eye(4, dtype=torch.int32)[None], "matrix must be float32, got int32"),
    ],
)
def test_what_is_no_rotation_is_refused(matrix, message):
    with pytest.raises(ValidationError, match=message):
        rotated(matrix)


@pytest.mark.parametrize("width", [2, 64, 256])
def test_orthogonal_matrices_from_float32_are_within_the_tolerance(width):
    """As eigenvectors, and as products of two such, found in float32 throughout."""
    found = torch.linalg.eigh((lambda x: x @ x.mT)(states(width, 2 * width))).eigenvectors
    rotated(found[None])
    rotated((found @ orthogonal(1, width, seed=1)[0])[None])


# ----- ranges


def reference(x, middle, half_range, levels):
    """Value by value, the nearest level of the channel's range."""
    table = torch.tensor(levels, dtype=torch.float64)
    scaled = (x.double() - middle[:, None].double()) / half_range[:, None].double()
    nearest = (scaled[..., None] - table).abs().argmin(-1)
    return table[nearest] * half_range[:, None].double() + middle[:, None].double()


@settings(deadline=None, max_examples=25)
@given(heads=st.integers(1, 3), tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_states_take_the_nearest_level_of_their_channels_range(heads, tokens, seed):
    middle = 10 * states(heads, 8, seed=seed)
    half_range = states(heads, 8, seed=seed + 1).abs() + 0.1
    x = middle[:, None] + 2 * states(2, heads, tokens, 8, seed=seed + 2)
    codec = normalised(NearestLevel(levels=LEVELS), middle, half_range)
    decoded = codec.decode(codec.encode(x)).double()
    expected = reference(x, middle, half_range, LEVELS)
    # Where a state lies halfway between levels, float32 may take the other one.
    is_halfway = ((decoded - x).abs() - (expected - x).abs()).abs() < 1e-4
    torch.testing.assert_close(
        torch.where(is_halfway, expected, decoded), expected, rtol=1e-5, atol=1e-5
    )


def test_outliers_are_those_furthest_beyond_their_own_range():
    middle, half_range = torch.zeros(1, 8), torch.full((1, 8), 10.0)
    middle[0, 2], half_range[0, 5] = 100.0, 0.1
    x = middle.expand(1, 1, 4, 8).clone()
    x[0, 0, 1, 5], x[0, 0, 1, 0] = 1.0, -15.0  # ten half ranges out, and one and a half
    inner = Outliers(inner=NearestLevel(levels=LEVELS), slots=2)
    codec = normalised(inner, middle, half_range)
    encoded = codec.encode(x)
    channels = encoded.parameters["outlier_channel"].squeeze(-2)[0, 0, 1]
    assert channels.tolist() == [0, 5]  # and not channel 2, whose values are the largest
    decoded = codec.decode(encoded)[0, 0, 1]
    assert decoded[0].item() == -15
    assert decoded[5].item() == pytest.approx(1.0, rel=2**-11)  # a half holds ten half ranges


def test_nothing_is_stored_for_ranges():
    codec = normalised(NearestLevel(levels=LEVELS), torch.zeros(2, 64), torch.ones(2, 64))
    assert codec.stored_bits(64) == 3
    assert codec.block_tokens == 1


def test_states_beyond_everything_stay_finite():
    inner = Outliers(inner=NearestLevel(levels=LEVELS), slots=2)
    codec = normalised(inner, torch.zeros(1, 8), torch.full((1, 8), 1e-6))
    x = torch.full((1, 1, 3, 8), codec.largest_magnitude(8))
    x[..., ::2] *= -1
    encoded = codec.encode(x)
    assert all(each.isfinite().all() for each in encoded.parameters.values())
    assert codec.decode(encoded).isfinite().all()


@pytest.mark.parametrize(
    ("middle", "half_range", "message"),
    [
        (torch.zeros(1, 8), torch.zeros(1, 8), "half_range must be above zero, got 0.0"),
        (torch.zeros(1, 8), -torch.ones(1, 8), "half_range must be above zero, got -1.0"),
        (torch.zeros(2, 8), torch.ones(1, 8), r"half_range must have shape \[2, 8\]"),
        (torch.zeros(8), torch.ones(8), r"middle must have shape \[any, any\]"),
        (torch.zeros(1, 8, dtype=torch.int32), torch.ones(1, 8), "middle must be float32"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(middle, half_range, message):
    with pytest.raises(ValidationError, match=message):
        normalised(NearestLevel(levels=LEVELS), middle, half_range)


# ----- what all of them share


FITTED = [
    permuted(torch.arange(32, dtype=torch.int32).view(2, 16)),
    rotated(orthogonal(2, 16)),
    normalised(NearestLevel(levels=LEVELS), torch.zeros(2, 16), torch.ones(2, 16)),
]


@pytest.mark.parametrize("codec", FITTED, ids=lambda codec: codec.kind)
def test_arrays_for_other_heads_are_refused(codec):
    codec.check_arrays(2, 16)
    outer = Outliers(inner=codec, slots=2)
    for wrong in ((3, 16), (2, 32)):
        with pytest.raises(ValueError, match=r"must have shape .*, got \[2, 16"):
            outer.check_arrays(*wrong)


@pytest.mark.parametrize("codec", FITTED, ids=lambda codec: codec.kind)
def test_a_codec_is_a_value(codec):
    again = type(codec).model_validate(
        {name: getattr(codec, name) for name in codec.model_fields_set}
    )
    assert again == codec
    assert hash(again) == hash(codec)
    assert codec.arrays


@pytest.mark.parametrize("codec", FITTED, ids=lambda codec: codec.kind)
def test_a_token_is_stored_alone_as_in_company(codec):
    x = states(3, 2, 40, 16)
    together = codec.encode(x)
    alone = codec.encode(x[1:2, :, 7:8])
    assert torch.equal(alone.codes, together.codes[1:2, :, 7:8])
    for name, parameter in alone.parameters.items():
        assert torch.equal(parameter, together.parameters[name][1:2, :, 7:8])


def test_the_name_of_an_array_without_arrays_is_refused():
    with pytest.raises(
        ValidationError, match="an Array, or the name of one in the file beside the plan"
    ):
        Permuted.model_validate({"inner": Affine(bits=4), "order": "layers.0.order"})
