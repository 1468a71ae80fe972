"""Channels of keys that get two bits more."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kvbits.codecs import Affine, Promoted

CODEC = Promoted(group_size=32, num_promoted=4)


def keys(seed=0):
    """Two blocks; in the first, channels 3, 5, 8 and 13 are the largest, in the second others."""
    x = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(seed))
    x[:, :, :32, [3, 5, 8, 13]] *= 20
    x[:, :, 32:, [0, 1, 2, 15]] *= 20
    return x


def test_the_largest_channels_of_every_block_are_promoted():
    channel = CODEC.encode(keys()).parameters["channel"]
    assert channel[0, 0, :, :, 0].tolist() == [[3, 5, 8, 13], [0, 1, 2, 15]]


def test_promoted_channels_decode_as_four_bits_and_the_others_as_two():
    x = keys()
    decoded = CODEC.decode(CODEC.encode(x))
    for block, wide in ((slice(0, 32), [3, 5, 8, 13]), (slice(32, 64), [0, 1, 2, 15])):
        for bits, channels in ((4, wide), (2, [c for c in range(16) if c not in wide])):
            codec = Affine(bits=bits, granularity="per_channel", group_size=32)
            alone = codec.decode(codec.encode(x))
            assert torch.allclose(
                decoded[:, :, block][..., channels], alone[:, :, block][..., channels], atol=1e-5
            )


def test_stored_bits_count_the_second_plane_and_the_indices():
    """Kitty's 12.5 %: 2.25 bits of codes, 0.25 of scales and offsets, a byte an index."""
    codec = Promoted(group_size=128, num_promoted=16)
    expected = Fraction(9, 4) + Fraction(32, 128) + Fraction(16 * 8, 128 * 128)
    assert codec.stored_bits(128) == expected


@pytest.mark.parametrize(("head_dim", "rule"), [(4, "above num_promoted=4"), (512, "at most 256")])
def test_head_dims_that_do_not_fit_are_refused(head_dim, rule):
    with pytest.raises(ValueError, match=rule):
        CODEC.check_head_dim(head_dim)
