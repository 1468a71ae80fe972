"""Codecs: how a block of key or value states is stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvbits.codecs.affine import Affine
from kvbits.codecs.arrays import Array
from kvbits.codecs.base import Codec, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.codebook import Codebook, NormScaled
from kvbits.codecs.external import Hqq, Quanto
from kvbits.codecs.floating import Float4, Float8
from kvbits.codecs.identity import Identity
from kvbits.codecs.matrix import MatrixRotated
from kvbits.codecs.outliers import Outliers
from kvbits.codecs.permutation import Permuted
from kvbits.codecs.promoted import Promoted
from kvbits.codecs.ranges import NearestLevel, RangeNormalised
from kvbits.codecs.rope import PreRope
from kvbits.codecs.rotation import Rotated
from kvbits.codecs.tiered import Tiered
from kvbits.codecs.variance import VarianceNormalised

AnyCodec = Annotated[
    Affine
    | Codebook
    | Float4
    | Float8
    | Hqq
    | Identity
    | MatrixRotated
    | NearestLevel
    | NormScaled
    | Outliers
    | Permuted
    | PreRope
    | Promoted
    | Quanto
    | RangeNormalised
    | Rotated
    | Tiered
    | VarianceNormalised,
    Field(discriminator="kind"),
]
"""Every codec a plan file may name, told apart by ``kind``."""

for _wrapper in (  # they name AnyCodec themselves
    MatrixRotated,
    Outliers,
    Permuted,
    PreRope,
    RangeNormalised,
    Rotated,
    VarianceNormalised,
):
    _wrapper.model_rebuild(_types_namespace={"AnyCodec": AnyCodec})

__all__ = [
    "Affine",
    "AnyCodec",
    "Array",
    "Codebook",
    "Codec",
    "EncodeContext",
    "Encoded",
    "Float4",
    "Float8",
    "Hqq",
    "Identity",
    "MatrixRotated",
    "NearestLevel",
    "NormScaled",
    "Outliers",
    "ParameterSpec",
    "Permuted",
    "PreRope",
    "Promoted",
    "Quanto",
    "RangeNormalised",
    "Rotated",
    "Tiered",
    "VarianceNormalised",
]
