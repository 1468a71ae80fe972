"""KIVI: keys per channel, values per token, the newest tokens exact."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvbits.codecs import Affine, AnyCodec, Promoted
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method


class Kivi(Method):
    """Keys share a scale per channel and group of tokens, values per token and group of channels.

    Keys leave the residual in blocks of R tokens, values one by one; ``flush="joint"`` lets both
    leave together, which kernels need. ``promoted_share`` gives this share of the key channels,
    the largest of every group, two bits more: Kitty (arXiv 2511.18643).
    """

    name: ClassVar = "kivi"
    source: ClassVar = "arXiv 2402.02750"
    differs: ClassVar = (
        "scale and offset are rounded outwards to fp16 before codes are computed",
        "values whose head has no multiple of the group share one scale a token",
    )

    key_bits: Literal[2, 3, 4, 8] = 2
    value_bits: Literal[2, 3, 4, 8] = 2
    group_size: int = Field(default=32, ge=1)
    residual_length: int = Field(default=128, ge=0)
    sink_tokens: int = Field(default=0, ge=0)
    flush: Literal["independent", "joint"] = "independent"
    promoted_share: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_promotion(self) -> Kivi:
        if self.promoted_share and self.key_bits != 2:
            raise ValueError(
                f"key_bits must be 2 where channels are promoted, got {self.key_bits}"
            )
        return self

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        group: int | None = self.group_size
        if layer.value_head_dim % self.group_size:
            group = None
        return LayerPlan.uniform(
            self._key(layer.key_head_dim),
            Affine(bits=self.value_bits, group_size=group),
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
            flush=self.flush,
        )

    def _key(self, head_dim: int) -> AnyCodec:
        if not self.promoted_share:
            return Affine(
                bits=self.key_bits, granularity="per_channel", group_size=self.group_size
            )
        num_promoted = 4 * max(1, round(self.promoted_share * head_dim / 4))
        return Promoted(group_size=self.group_size, num_promoted=num_promoted)
