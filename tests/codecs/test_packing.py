"""The byte layout, against an oracle that places every bit by the documented picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.codecs import packing
from kvbits.codecs.packing import pack_bits, page_capacity, unpack_bits
from kvbits.testing import pack_naively, unpack_naively, value_position

WIDTHS = (2, 3, 4, 8)


def random_codes(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


@given(bits=st.sampled_from(WIDTHS), eighths=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packed_bytes_are_those_of_the_documented_picture(bits, eighths, seed):
    codes = random_codes((2, 8 * eighths), bits, seed)
    packed = pack_bits(codes, bits)
    for row in range(2):
        expected = pack_naively(codes[row].numpy(), bits)
        np.testing.assert_array_equal(packed[row].numpy(), expected)
        np.testing.assert_array_equal(unpack_naively(expected, bits), codes[row].numpy())


@given(bits=st.sampled_from(WIDTHS), eighths=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_unpacking_undoes_packing_over_any_leading_axes(bits, eighths, seed):
    codes = random_codes((2, 1, 3, 8 * eighths), bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, 1, 3, eighths * bits)
    assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_is_some_row_of_codes(bits):
    """Packing is onto: no byte value is wasted, so the width is exactly ``bits`` per code."""
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, bits).contiguous()
    assert torch.equal(pack_bits(unpack_bits(every, bits), bits), every)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_its_input_alone(bits):
    codes = random_codes((4, 16), bits)
    before = codes.clone()
    unpack_bits(pack_bits(codes, bits), bits)
    assert torch.equal(codes, before)


def test_four_bit_bytes_worked_by_hand():
    """Channels 0..3 hold 1, 2, 3, 4: byte 0 is c2 above c0, byte 1 c3 above c1, bit 7 flipped."""
    packed = pack_bits(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4)
    assert packed.tolist() == [0x31 ^ 0x80, 0x42 ^ 0x80]


def test_page_capacity_covers_the_need_and_never_shrinks():
    capacities = [page_capacity(need) for need in range(400)]
    assert capacities[:17] == list(range(17))
    for need, capacity in enumerate(capacities):
        assert need <= capacity <= need + max(1, need // 16)
    assert capacities == sorted(capacities)


def test_page_capacity_does_not_depend_on_the_way_there():
    """Growing to n from any capacity on the way gives the capacity of n alone."""
    for need in range(1, 300):
        assert page_capacity(page_capacity(need)) == page_capacity(need)


@pytest.mark.parametrize("tokens", [32, 64, 192])
def test_value_positions_and_tokens_undo_each_other(tokens):
    positions = packing.value_positions(tokens)
    assert positions.tolist() == [value_position(token) for token in range(tokens)]
    assert torch.equal(packing.value_tokens(tokens)[positions], torch.arange(tokens))
