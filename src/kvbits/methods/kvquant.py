"""KVQuant: keys before the rotary embedding, levels that are not even, outliers apart."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.codecs import AnyCodec, Codebook, Outliers, PreRope
from kvbits.codecs.levels import normal_float
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method
from kvbits.methods.rotary import frequencies


class KVQuant(Method):
    """Per-channel keys before the rotary embedding and per-token values, in normal-float levels.

    This is the variant without data: levels of a normal in place of levels fitted to activations.
    """

    name: ClassVar = "kvquant"
    source: ClassVar = "arXiv 2401.18079"
    differs: ClassVar = (
        "normal-float levels, its fall-back without data; fitted levels are to come",
        "the range of a key channel is that of its block of tokens, not a calibrated one",
        "as many outliers for every token and head, an even number, in 24 bits each",
    )

    key_bits: Literal[2, 3, 4] = 3
    value_bits: Literal[2, 3, 4] = 3
    block_tokens: int = Field(default=128, ge=1)
    outlier_share: float = Field(default=0.01, ge=0, lt=0.5)
    sink_tokens: int = Field(default=1, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        key = Codebook(
            levels=normal_float(self.key_bits),
            granularity="per_channel",
            group_size=self.block_tokens,
        )
        value = Codebook(levels=normal_float(self.value_bits))
        return LayerPlan.uniform(
            PreRope(
                inner=self._with_outliers(key, layer.key_head_dim, "channel"),
                frequencies=frequencies(layer, config),
            ),
            self._with_outliers(value, layer.value_head_dim, "token"),
            sink_tokens=self.sink_tokens,
        )

    def _with_outliers(
        self, codec: Codebook, head_dim: int, by: Literal["token", "channel"]
    ) -> AnyCodec:
        if not self.outlier_share:
            return codec
        slots = 2 * max(1, round(self.outlier_share * head_dim / 2))
        return Outliers(inner=codec, slots=slots, by=by)
