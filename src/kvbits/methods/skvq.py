"""SKVQ: reordered channels in clipped groups with small scales, behind sinks and a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from kvbits.calibration.attention import Observed, observed_attention
from kvbits.calibration.capture import observe
from kvbits.calibration.clipping import NUM_QUERIES, ClipSearch
from kvbits.calibration.placement import input_device
from kvbits.calibration.reorder import ChannelRanges
from kvbits.codecs import Affine, AnyCodec, Array, Codec, Permuted, PreRope
from kvbits.codecs.affine import AffineWidth
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.memory import head_dim
from kvbits.methods.base import Method, Progress
from kvbits.methods.rotary import before_rotary, frequencies
from kvbits.plan import CachePlan

Place = tuple[int, Side]
UNSEARCHED = 0.92  # of the released code, until others are found
CLIP_DOCUMENTS = 8


def _known_ratio(ratio: object) -> object:
    if ratio == "search":
        return ratio
    if isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= 1:
        return float(ratio)
    raise PydanticCustomError("ratio", "Input should be above 0 and at most 1, or 'search'")


ClipRatio = Annotated[float | Literal["search"], PlainValidator(_known_ratio)]


class Skvq(Method):
    """Clipped groups of channels per token, float8 scales; keys before the rotary embedding.

    ``reorder="layer"`` gathers channels of like range over all heads of a layer, as published;
    ``"head"`` keeps every channel in its head, which needs a ``group_size`` below the head's
    channels; ``"none"`` leaves channels where they are and needs no data.

    ``clip_ratio`` shrinks the range of every group. ``"search"`` finds the ratio of every layer
    and side with which attention errs least, over ``CLIP_DOCUMENTS`` of the documents.
    """

    name: ClassVar = "skvq"
    source: ClassVar = "arXiv 2405.06219"
    calibration: ClassVar = "text, forwards"
    widths: ClassVar = "1.5, 2, 3, 4, 8"
    differs: ClassVar = (
        "groups have one size: clusters of channels are laid end to end and cut",
        "one clip ratio for all groups, or with clip_ratio=search for those of a layer and side",
        "1.5 bits are really stored, five codes to a byte",
        "scales are rounded to float8 before codes are computed",
    )

    key_bits: AffineWidth = 2
    value_bits: AffineWidth = 1.5
    group_size: int | None = None
    clip_ratio: ClipRatio = UNSEARCHED
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
    def passes(self) -> int:
        return (self.reorder != "none") + (self.clip_ratio == "search")

    @property
    def needs_data(self) -> bool:
        return self.passes > 0

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return self._layer_plan(layer, config, 0, {}, {})

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        start = self.plan(model.config)
        packed = [index for index, plan in enumerate(start.layers) if not plan.is_exact]
        orders: dict[Place, Array] = {}
        ratios: dict[Place, float] = {}
        if self.reorder != "none":
            orders = self._orders(model, documents, start, progress)
        if self.clip_ratio == "search":
            ratios = self._ratios(model, documents, start, orders, progress)
        layers = list(start.layers)
        for index in packed:
            layer = start.model.layers[index]
            layers[index] = self._layer_plan(layer, model.config, index, orders, ratios)
        return CachePlan.from_layers(model.config, layers, start.provenance)

    def _orders(
        self, model: Any, documents: Sequence[Tensor], start: CachePlan, progress: Progress | None
    ) -> dict[Place, Array]:
        """The order of channels of every packed layer and side."""
        ranges: dict[Place, ChannelRanges] = {}
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
        orders = {}
        for index, plan in enumerate(start.layers):
            for side in () if plan.is_exact else SIDES:
                if (index, side) not in ranges:
                    raise self._too_short()
                group = self.group_size or head_dim(start.model.layers[index], side)
                order = ranges[index, side].order(group, within_heads=self.reorder == "head")
                orders[index, side] = Array(f"layers.{index}.{side}.order", order)
        return orders

    def _ratios(
        self,
        model: Any,
        documents: Sequence[Tensor],
        start: CachePlan,
        orders: Mapping[Place, Array],
        progress: Progress | None,
    ) -> dict[Place, float]:
        """The clip ratio of every packed layer and side."""

        def codec_of(index: int, side: Side, ratio: float) -> Codec:
            layer = start.model.layers[index]
            plan = self._layer_plan(layer, model.config, index, orders, {(index, side): ratio})
            return plan.groups[0].codec(side)

        search = ClipSearch(codec_of, self.sink_tokens)
        packed = {index for index, plan in enumerate(start.layers) if not plan.is_exact}
        usable = [i for i, document in enumerate(documents) if len(document) > self.sink_tokens]
        if not usable:
            raise self._too_short()
        chosen = set(usable[:: -(-len(usable) // CLIP_DOCUMENTS)])

        def observer(seen: Observed) -> None:
            if seen.layer_idx in packed:
                search.add(seen)

        for i, document in enumerate(documents):
            if i in chosen:
                watched = observed_attention(model, observer, num_queries=NUM_QUERIES)
                with watched, torch.no_grad():
                    model(document.to(input_device(model))[None], use_cache=False)
            if progress:
                progress()
        found = search.best()
        if packed - {index for index, _ in found}:
            raise UnsupportedModelError(
                "model must compute attention through transformers' interface for clip ratios to "
                "be searched, got none; give a clip_ratio"
            )
        return found

    def _too_short(self) -> CalibrationError:
        return CalibrationError(
            f"calibration text must have a document of more than {self.sink_tokens} tokens, the "
            "sinks; give longer text or fewer sink_tokens"
        )

    def _layer_plan(
        self,
        layer: LayerGeometry,
        config: Any,
        index: int,
        orders: Mapping[Place, Array],
        ratios: Mapping[Place, float],
    ) -> LayerPlan:
        fixed = UNSEARCHED if self.clip_ratio == "search" else self.clip_ratio
        codecs: list[AnyCodec] = []
        for side, bits in zip(SIDES, (self.key_bits, self.value_bits), strict=True):
            affine = Affine(
                bits=bits,
                group_size=self.group_size,
                clip_ratio=ratios.get((index, side), fixed),
                parameter_dtype="float8",
            )
            order = orders.get((index, side))
            codecs.append(affine if order is None else Permuted(inner=affine, order=order))
        key, value = codecs
        return LayerPlan.uniform(
            PreRope(inner=key, frequencies=frequencies(layer, config)),
            value,
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )
