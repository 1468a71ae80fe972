"""Kernels say that they do not know codecs fitted with arrays, rather than read them wrongly."""

from __future__ import annotations

import pytest
import torch

from kvbits.attention.triton.schedule import unsupported
from kvbits.codecs import (
    Affine,
    Array,
    MatrixRotated,
    NearestLevel,
    Outliers,
    Permuted,
    PreRope,
    RangeNormalised,
)
from kvbits.codecs.levels import normal_float
from kvbits.layer_plan import LayerPlan

CODECS = [
    Permuted(
        inner=Affine(bits=4),
        order=Array("order", torch.arange(128, dtype=torch.int32).view(2, 64)),
    ),
    MatrixRotated(inner=Affine(bits=4), matrix=Array("matrix", torch.eye(64)[None])),
    RangeNormalised(
        inner=Outliers(inner=NearestLevel(levels=normal_float(4)), slots=2),
        middle=Array("middle", torch.zeros(2, 64)),
        half_range=Array("half", torch.ones(2, 64)),
    ),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_a_fitted_codec_is_left_to_the_reference(codec):
    for key in (codec, PreRope(inner=codec, frequencies=(1.0,))):
        assert "key codec" in unsupported(LayerPlan.uniform(key, Affine(bits=4)), 64, 64)
    assert "value codec" in unsupported(LayerPlan.uniform(Affine(bits=4), codec), 64, 64)
