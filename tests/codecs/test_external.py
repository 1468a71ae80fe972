"""What other libraries quantize: their own codes, and no library to read them back."""

from __future__ import annotations

import sys

import pytest
import torch

from kvbits.codecs import Hqq, Quanto
from kvbits.errors import MissingLibraryError

pytestmark = pytest.mark.usefixtures("quanto_in_python")

TOKENS, WIDTH, GROUP = 64, 32, 16
# per token in two groups, per token whole, per channel
LAYOUTS = [
    {"group_size": GROUP},
    {},
    {"granularity": "per_channel", "group_size": TOKENS},
]


def states(rows=1, seed=0):
    x = torch.randn(rows, 2, 2 * TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[..., 3] += 20
    x[:, 0, 5, :GROUP] = 7.0  # a group of one value
    return x


def tolerance(codec, encoded, dtype):
    """Rounding of scale and offset, times the code; and a few roundings of float32."""
    affine = encoded.parameters["affine"].float().abs()
    top = (2**codec.bits - 1) * affine[..., 0].amax() + affine[..., 1].amax()
    return float(top) * (2**-11 if dtype == "float16" else 0) + 8 * float(top) * 2**-24


def quanto_decoded(block, bits, layout):
    """By the calls of transformers' cache, on the tokens of one head ``[T, D]``."""
    quanto = pytest.importorskip("optimum.quanto", reason="needs kvbits[quanto]")
    qtype = {2: quanto.qint2, 4: quanto.qint4}[bits]
    axis = -1 if "granularity" in layout else 0
    group = layout.get("group_size")
    scale, shift = quanto.MaxOptimizer()(block, qtype, axis, group)
    return quanto.quantize_weight(block, qtype, axis, scale, shift, group).dequantize()


def hqq_decoded(block, bits, layout):
    """By the library's own packing; per channel in its other direction of groups."""
    module = pytest.importorskip("hqq.core.quantize", reason="needs kvbits[hqq]")
    by_channel = "granularity" in layout
    parts = []
    for part in block.split(TOKENS):
        codes, meta = module.Quantizer.quantize(
            part,
            nbits=bits,
            group_size=layout.get("group_size", WIDTH),
            axis=0 if by_channel else 1,
            device="cpu",
        )
        meta["compute_dtype"] = torch.float32
        parts.append(module.Quantizer.dequantize(codes, meta).clone())
    return torch.cat(parts)


CASES = [(Quanto, quanto_decoded, bits) for bits in (2, 4)]
CASES += [(Hqq, hqq_decoded, bits) for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize(("kind", "library", "bits"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["groups", "whole", "channel"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_decoded_states_are_the_librarys_own(kind, library, bits, layout, dtype):
    x = states()
    if kind is Quanto and "granularity" not in layout:
        x[:, 0, 5] = states()[:, 0, 6]  # its dequantized NaN is another matter
    expected = torch.stack([library(head, bits, layout) for head in x[0]])
    codec = kind(bits=bits, parameter_dtype=dtype, **layout)
    encoded = codec.encode(x)
    assert encoded.codes.max() == 2**bits - 1
    found = codec.decode(encoded)[0]
    assert (found - expected).abs().max() <= tolerance(codec, encoded, dtype)


@pytest.mark.parametrize(
    ("kind", "module"), [(Quanto, "optimum.quanto"), (Hqq, "hqq.core.quantize")]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["groups", "whole", "channel"])
def test_a_row_and_a_block_store_what_they_would_alone(kind, module, layout):
    pytest.importorskip(module, reason="needs an extra of kvbits")
    x, codec = states(rows=2), kind(bits=2, **layout)
    together = codec.encode(x)
    for row in range(2):
        for head in range(2):
            for start in (0, TOKENS):
                part = (slice(row, row + 1), slice(head, head + 1))
                alone = codec.encode(x[part][:, :, start : start + TOKENS])
                assert torch.equal(together.codes[part][:, :, start : start + TOKENS], alone.codes)


@pytest.mark.parametrize(
    ("kind", "module"), [(Quanto, "optimum.quanto"), (Hqq, "hqq.core.quantize")]
)
def test_a_group_of_one_value_comes_back(kind, module):
    pytest.importorskip(module, reason="needs an extra of kvbits")
    codec = kind(bits=4, group_size=GROUP)
    encoded = codec.encode(states())
    assert encoded.codes.max() < 16
    assert torch.equal(codec.decode(encoded)[0, 0, 5, :GROUP], torch.full((GROUP,), 7.0))


@pytest.mark.parametrize(
    ("codec", "module", "extra"),
    [(Quanto(bits=4), "optimum.quanto", "quanto"), (Hqq(bits=4), "hqq.core.quantize", "hqq")],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    codec, module, extra, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibraryError, match=rf"{module} must be .*kvbits\[{extra}\]'"):
        codec.encode(states())


def test_stored_bits_are_those_of_affine_codes():
    assert Quanto(bits=4, group_size=64).stored_bits(128) == 4.5
    assert Hqq(bits=2, granularity="per_channel", group_size=64).stored_bits(128) == 2.5
