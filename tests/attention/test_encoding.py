"""Which codecs kernels encode, and as what steps."""

from __future__ import annotations

import pytest

from kvbits.attention.triton.encoding import Encoding, encoding
from kvbits.attention.triton.support import is_writable
from kvbits.codecs import (
    Affine,
    Codebook,
    Float8,
    Identity,
    NormScaled,
    Outliers,
    PreRope,
    Rotated,
    VarianceNormalised,
)
from kvbits.codecs.levels import lloyd_max, normal_float
from kvbits.layer_plan import LayerPlan

LEVELS = Codebook(levels=normal_float(4))
BYTE_LEVELS = Codebook(levels=tuple(2 * level / 255 - 1 for level in range(256)))
TURBO = NormScaled(levels=lloyd_max(3))


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        (Identity(), Encoding()),
        (Affine(bits=3, group_size=32), Encoding()),
        (Rotated(inner=Affine(bits=4)), Encoding(is_rotated=True)),
        (
            Rotated(inner=TURBO),
            Encoding(is_rotated=True, has_levels=True, is_norm=True, is_corrected=True),
        ),
        (
            PreRope(inner=Outliers(inner=LEVELS, slots=4), frequencies=(1.0, 0.5)),
            Encoding(rotary_pairs=2, slots=4, has_levels=True),
        ),
    ],
)
def test_a_codec_becomes_its_steps(codec, how):
    assert encoding(codec) == how
    assert how.is_plain == (codec.kind in ("affine", "identity"))


@pytest.mark.parametrize(
    "codec",
    [
        Affine(bits=4, symmetric=True),
        Float8(),
        BYTE_LEVELS,
        Outliers(inner=TURBO, slots=2),
        Outliers(inner=LEVELS, slots=2, by="channel"),
        Outliers(inner=LEVELS, slots=10),
        Outliers(inner=Rotated(inner=LEVELS), slots=2),
        Rotated(inner=VarianceNormalised(inner=Affine(bits=2), scaled="channel")),
    ],
    ids=lambda codec: codec.summary[:40],
)
def test_a_layer_with_one_side_that_kernels_do_not_encode_is_not_writable(codec):
    assert encoding(codec) is None
    assert not is_writable(LayerPlan.uniform(Affine(bits=4), codec))
    assert is_writable(LayerPlan.uniform(Affine(bits=4), LEVELS))
