"""SKVQ: reordered channels in clipped groups with small scales, behind sinks and a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from kvbits.calibration.capture import observe
from kvbits.calibration.reorder import ChannelRanges
from kvbits.codecs import Affine, AnyCodec, Array, Permuted, PreRope
from kvbits.codecs.affine import AffineWidth
from kvbits.errors import CalibrationError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.memory import head_dim
from kvbits.methods.base import Method, Progress
from kvbits.methods.rotary import before_rotary, frequencies
from kvbits.plan import CachePlan


class Skvq(Method):
    """Clipped groups of channels per token, float8 scales; keys before the rotary embedding.

    ``reorder="layer"`` gathers channels of like range over all heads of a layer, as published;
    ``"head"`` keeps every channel in its head, which needs a ``group_size`` below the head's
    channels; ``"none"`` leaves channels where they are and needs no data.
    """

    name: ClassVar = "skvq"
    source: ClassVar = "arXiv 2405.06219"
    calibration: ClassVar = "text, forwards"
    widths: ClassVar = "1.5, 2, 3, 4, 8"
    differs: ClassVar = (
        "groups have one size: clusters of channels are laid end to end and cut",
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
    reorder: Literal["layer", "head", "none"] = "layer"

    @model_validator(mode="after")
    def _check_group(self) -> Skvq:
        if self.reorder == "head" and self.group_size is None:
            raise ValueError(
                "group_size must be given when reorder='head', got None; a group of a whole head "
                "is the same in any order"
            )
        return self

    @property
    def needs_data(self) -> bool:
        return self.reorder != "none"

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return self._layer_plan(layer, config, self._affine(self.key_bits), self._value)

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        start = self.plan(model.config)
        if not self.needs_data:
            return start
        ranges: dict[tuple[int, Side], ChannelRanges] = {}
        for seen in observe(model, documents, with_gradients=False):
            for (index, side), observation in seen.items():
                plan = start.layers[index]
                states = observation.states[:, :, self.sink_tokens :]
                if plan.is_exact or not states.shape[-2]:
                    continue
                if side == "key":
                    states = before_rotary(plan.groups[0].key, states, self.sink_tokens)
                ranges.setdefault((index, side), ChannelRanges()).add(states)
            if progress:
                progress()
        layers = [
            plan if plan.is_exact else self._reordered(index, start, model.config, ranges)
            for index, plan in enumerate(start.layers)
        ]
        return CachePlan.from_layers(model.config, layers, start.provenance)

    def _reordered(
        self,
        index: int,
        start: CachePlan,
        config: Any,
        ranges: dict[tuple[int, Side], ChannelRanges],
    ) -> LayerPlan:
        layer = start.model.layers[index]
        inner = dict(zip(SIDES, (self._affine(self.key_bits), self._value), strict=True))
        codecs = []
        for side in SIDES:
            if (index, side) not in ranges:
                raise CalibrationError(
                    f"calibration text must have a document of more than {self.sink_tokens} "
                    "tokens, the sinks; give longer text or fewer sink_tokens"
                )
            group = self.group_size or head_dim(layer, side)
            order = ranges[index, side].order(group, within_heads=self.reorder == "head")
            array = Array(f"layers.{index}.{side}.order", order)
            codecs.append(Permuted(inner=inner[side], order=array))
        return self._layer_plan(layer, config, *codecs)

    def _layer_plan(
        self, layer: LayerGeometry, config: Any, key: AnyCodec, value: AnyCodec
    ) -> LayerPlan:
        return LayerPlan.uniform(
            PreRope(inner=key, frequencies=frequencies(layer, config)),
            value,
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )

    @property
    def _value(self) -> Affine:
        return self._affine(self.value_bits)

    def _affine(self, bits: Any) -> Affine:
        return Affine(
            bits=bits,
            group_size=self.group_size,
            clip_ratio=self.clip_ratio,
            parameter_dtype="float8",
        )
