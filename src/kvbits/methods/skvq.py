"""SKVQ without its reordering: clipped groups with small scales behind sinks and a window."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from kvbits.codecs import Affine, PreRope
from kvbits.codecs.affine import AffineWidth
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method
from kvbits.methods.rotary import frequencies


class Skvq(Method):
    """Clipped groups of channels per token, float8 scales; keys before the rotary embedding."""

    name: ClassVar = "skvq"
    source: ClassVar = "arXiv 2405.06219"
    widths: ClassVar = "1.5, 2, 3, 4, 8"
    differs: ClassVar = (
        "channels are not reordered, which takes calibration",
        "one clip ratio for all groups",
        "1.5 bits are really stored, five codes to a byte",
        "scales are rounded to float8 before codes are computed",
    )

    key_bits: AffineWidth = 2
    value_bits: AffineWidth = 1.5
    group_size: int | None = None
    clip_ratio: float = Field(default=0.92, gt=0, le=1)
    residual_length: int = Field(default=128, ge=0)
    sink_tokens: int = Field(default=5, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        key, value = (
            Affine(
                bits=bits,
                group_size=self.group_size,
                clip_ratio=self.clip_ratio,
                parameter_dtype="float8",
            )
            for bits in (self.key_bits, self.value_bits)
        )
        return LayerPlan.uniform(
            PreRope(inner=key, frequencies=frequencies(layer, config)),
            value,
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )
