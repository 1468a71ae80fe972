"""Tokens of different widths in one tile."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError

from kvbits.codecs import Affine, Codebook, Tiered
from kvbits.codecs.levels import normal_float, normal_quantiles

UNIFORM = tuple(Affine(bits=bits) for bits in (2, 4, 8))
NORMAL = tuple(Codebook(levels=normal_quantiles(bits)) for bits in (2, 3, 4))


def states(seed=0):
    """Two tiles of 32 tokens; token 5 of the first and 40 of all have by far the largest range."""
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(seed))
    x[:, :, [5, 40]] *= 50
    x[:, :, [7, 8, 33]] *= 10
    return x


def naive_widths(x, widths, num_wide, tile):
    """Width of every token ``[B, H, T]``, one tile after the other."""
    found = torch.full(x.shape[:-1], widths[0])
    for row, head, start in ((r, h, s) for r in range(x.shape[0]) for h in range(x.shape[1])
                             for s in range(0, x.shape[2], tile)):  # fmt: skip
        ranges = [float(t.max() - t.min()) for t in x[row, head, start : start + tile]]
        ranked = sorted(range(tile), key=lambda t: (-ranges[t], t))
        for width, count in zip(widths[1:], num_wide, strict=True):
            for token in ranked[:count]:
                found[row, head, start + token] = width
    return found


@pytest.mark.parametrize("codecs", [UNIFORM, NORMAL], ids=["uniform", "normal"])
def test_every_token_decodes_as_by_the_codec_of_its_width_alone(codecs):
    x, widths = states(), [codec.bits for codec in codecs]
    codec = Tiered(codecs=codecs, num_wide=(9, 2), tile_tokens=32)
    encoded = codec.encode(x)
    assert encoded.codes.max() < 2 ** widths[0]  # what is wider lies in the planes
    decoded, expected = codec.decode(encoded), naive_widths(x, widths, (9, 2), 32)
    assert (expected == widths[-1])[0, 0, [5, 40]].all()
    for width, alone in zip(widths, codecs, strict=True):
        own = expected == width
        assert torch.equal(decoded[own], alone.decode(alone.encode(x))[own])


def test_stored_bits_count_planes_and_the_names_of_wide_tokens():
    """2 bits for all, 2 more for 16 of 64 tokens, 4 more for 4; a byte for each of the 16."""
    codec = Tiered(codecs=UNIFORM, num_wide=(16, 4))
    expected = 2 + Fraction(32, 128) + Fraction(2 * 16 + 4 * 4, 64) + Fraction(8 * 16, 64 * 128)
    assert codec.stored_bits(128) == expected


def test_a_tile_may_be_wide_as_a_whole():
    codec = Tiered(codecs=UNIFORM[:2], num_wide=(32,), tile_tokens=32)
    x = states()
    assert torch.equal(codec.decode(codec.encode(x)), UNIFORM[1].decode(UNIFORM[1].encode(x)))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"codecs": (UNIFORM[0], UNIFORM[2])}, r"ascend by 1, 2 or 4 bits, got \[2, 8\]"),
        ({"codecs": UNIFORM[1::-1]}, r"ascend by 1, 2 or 4 bits, got \[4, 2\]"),
        ({"codecs": UNIFORM}, "num_wide must have 2 entries, .* got 1"),
        ({"num_wide": (65,)}, r"nor exceed tile_tokens=64, got \(65,\)"),
        ({"codecs": UNIFORM, "num_wide": (3, 5)}, r"must not ascend .* got \(3, 5\)"),
        (
            {"codecs": (UNIFORM[0], Affine(bits=4, parameter_dtype="float32"))},
            "must store the same parameters",
        ),
        (
            {
                "codecs": tuple(
                    Codebook(levels=normal_float(b), granularity="per_channel", group_size=4)
                    for b in (2, 3)
                )
            },
            "must be per token, got per channel",
        ),
    ],
)
def test_tiers_that_do_not_fit_are_refused(settings, rule):
    with pytest.raises(ValidationError, match=rule):
        Tiered(**{"codecs": UNIFORM[:2], "num_wide": (4,)} | settings)


def test_planes_fill_whole_bytes():
    codec = Tiered(codecs=NORMAL[1:], num_wide=(4,))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        codec.check_head_dim(20)
