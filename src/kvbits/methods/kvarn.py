"""KVarN: rotated tiles whose tokens and channels are brought to one spread."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.codecs import Affine, AnyCodec, Rotated, VarianceNormalised
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method


class KVarN(Method):
    """Tiles of 128 tokens, rotated and normalised; keys then per channel, values per token."""

    name: ClassVar = "kvarn"
    source: ClassVar = "arXiv 2606.03458"
    differs: ClassVar = ("written from descriptions of the method; its code was not at hand",)

    key_bits: Literal[2, 3, 4, 8] = 2
    value_bits: Literal[2, 3, 4, 8] = 2
    tile_tokens: int = Field(default=128, ge=2)
    rounds: int = Field(default=8, ge=1)
    sink_tokens: int = Field(default=128, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        key = Affine(bits=self.key_bits, granularity="per_channel", group_size=self.tile_tokens)
        return LayerPlan.uniform(
            self._tiles(key, "token"),
            self._tiles(Affine(bits=self.value_bits), "channel"),
            sink_tokens=self.sink_tokens,
        )

    def _tiles(self, inner: AnyCodec, scaled: Literal["token", "channel"]) -> AnyCodec:
        return Rotated(
            inner=VarianceNormalised(
                inner=inner, scaled=scaled, tile_tokens=self.tile_tokens, rounds=self.rounds
            )
        )
