"""KVQuant: keys before the rotary embedding, levels that are not even, outliers apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kvbits.calibration.capture import Observation, observe
from kvbits.calibration.fitting import Histogram
from kvbits.calibration.quantiles import ChannelQuantiles
from kvbits.codecs import (
    AnyCodec,
    Array,
    Codebook,
    Codec,
    NearestLevel,
    Outliers,
    PreRope,
    RangeNormalised,
)
from kvbits.codecs.base import NO_CONTEXT
from kvbits.codecs.levels import normal_float, on_grid
from kvbits.codecs.outliers import slots_for
from kvbits.errors import CalibrationError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.methods.base import Method, Progress
from kvbits.methods.rotary import before_rotary, frequencies
from kvbits.plan import CachePlan


def _uniform(bits: int) -> tuple[float, ...]:
    return tuple(2 * level / (2**bits - 1) - 1 for level in range(2**bits))


TABLES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "normal_float": normal_float,
    "uniform": _uniform,
}


class Fit(NamedTuple):
    """What calibration found out about a layer.

    Attributes:
        levels: Of keys and values.
        decoded_levels: What they are decoded to, if that differs.
        ranges: Of the key channels, as fields of ``RangeNormalised``; None for those of a block.
    """

    levels: dict[Side, tuple[float, ...]]
    decoded_levels: dict[Side, tuple[float, ...]]
    ranges: dict[str, Any] | None = None

    def table(self, side: Side) -> dict[str, Any]:
        """The fields of a table."""
        return {"levels": self.levels[side], "decoded_levels": self.decoded_levels.get(side)}


class KVQuant(Method):
    """Per-channel keys before the rotary embedding and per-token values, in fitted levels.

    ``levels``: ``fisher`` fits them to normalised states, weighted by squared gradient and squared
    scale, so that what is made small is the loss; ``fisher_unscaled`` leaves the scale out, as the
    released code does; ``activations`` counts all states alike and needs no gradients;
    ``normal_float`` and ``uniform`` need no data at all.

    ``key_ranges``: ``calibrated`` gives every key channel the range that holds all of its states
    but the outliers, ``block`` that of ``block_tokens`` tokens as they come, which the paper calls
    online and which needs no data.

    ``q_norm`` moves the decoded levels so that their mean and spread are those of the states.
    """

    name: ClassVar = "kvquant"
    source: ClassVar = "arXiv 2401.18079"
    calibration: ClassVar = "text, forwards and backwards"
    differs: ClassVar = (
        "as many outliers for every token and head, an even number, in 24 bits each; other keys "
        "beyond their range take its end",
        "values have a scale for every token and head, not one for a token",
        "sinks are in no range",
        "levels are the best ones for a histogram of 1024 bins, not k-means from one start, "
        "moved to a grid of bytes",
    )

    key_bits: Literal[2, 3, 4] = 3
    value_bits: Literal[2, 3, 4] = 3
    levels: Literal["fisher", "fisher_unscaled", "activations", "normal_float", "uniform"] = (
        "fisher"
    )
    key_ranges: Literal["calibrated", "block"] = "calibrated"
    block_tokens: int = Field(default=128, ge=1)
    outlier_share: float = Field(default=0.01, ge=0, lt=0.5)
    sink_tokens: int = Field(default=1, ge=0)
    residual_length: int = Field(default=0, ge=0)
    is_pre_rope: bool = True
    q_norm: bool = False

    @property
    def passes(self) -> int:
        return (self.key_ranges == "calibrated") + (self.levels not in TABLES)

    @property
    def needs_data(self) -> bool:
        return self.passes > 0

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return self._layer_plan(layer, config, self._without_data())

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        plan = self.plan(model.config)
        fits = {
            index: self._without_data()
            for index, layer in enumerate(plan.layers)
            if not layer.is_exact
        }
        if self.key_ranges == "calibrated":
            fits = self._with_ranges(fits, plan, model, documents, progress)
            plan = self._fitted(fits, plan, model.config)
        if self.levels not in TABLES:
            fits = self._with_levels(fits, plan, model, documents, progress)
            plan = self._fitted(fits, plan, model.config)
        return plan

    def _without_data(self) -> Fit:
        table = TABLES.get(self.levels, normal_float)  # until others are fitted
        bits = zip(SIDES, (self.key_bits, self.value_bits), strict=True)
        return Fit({side: on_grid(table(width)) for side, width in bits}, {})

    def _fitted(self, fits: Mapping[int, Fit], plan: CachePlan, config: Any) -> CachePlan:
        layers = [
            self._layer_plan(plan.model.layers[index], config, fits[index])
            if index in fits
            else layer
            for index, layer in enumerate(plan.layers)
        ]
        return CachePlan.from_layers(config, layers, plan.provenance)

    def _with_ranges(
        self,
        fits: Mapping[int, Fit],
        plan: CachePlan,
        model: Any,
        documents: Sequence[Tensor],
        progress: Progress | None,
    ) -> dict[int, Fit]:
        """Find the range of every key channel: all of its states but the share of outliers."""
        lengths = [len(document) for document in documents if len(document) > 1]
        num_tokens = sum(max(0, length - self.sink_tokens) for length in lengths)
        if not num_tokens and fits:
            raise self._too_short(1)
        found = {index: ChannelQuantiles(num_tokens, self.outlier_share / 2) for index in fits}
        for seen in observe(model, documents, with_gradients=False):
            for index in fits:
                keys = seen[index, "key"].states[:, :, self.sink_tokens :]
                if keys.shape[-2] and self.is_pre_rope:
                    keys = before_rotary(plan.layers[index].groups[0].key, keys, self.sink_tokens)
                if keys.shape[-2]:
                    found[index].add(keys)
            if progress:
                progress()
        return {
            index: fit._replace(ranges=_ranges(index, *found[index].bounds()))
            for index, fit in fits.items()
        }

    def _with_levels(
        self,
        fits: Mapping[int, Fit],
        plan: CachePlan,
        model: Any,
        documents: Sequence[Tensor],
        progress: Progress | None,
    ) -> dict[int, Fit]:
        """Fit the levels of every layer and side to the states as the codecs normalise them."""
        histograms = {(index, side): Histogram() for index in fits for side in SIDES}
        for seen in observe(model, documents, with_gradients=self.levels != "activations"):
            for (index, side), histogram in histograms.items():
                codec = plan.layers[index].groups[0].codec(side)
                self._count(histogram, codec, seen[index, side])
            if progress:
                progress()
        return {
            index: fit._replace(**self._tables({side: histograms[index, side] for side in SIDES}))
            for index, fit in fits.items()
        }

    def _tables(self, histograms: Mapping[Side, Histogram]) -> dict[str, Any]:
        """Levels and decoded levels of both sides."""
        levels: dict[Side, tuple[float, ...]] = {}
        decoded: dict[Side, tuple[float, ...]] = {}
        for side, bits in zip(SIDES, (self.key_bits, self.value_bits), strict=True):
            histogram = histograms[side]
            if not histogram.total:
                raise self._too_short(self.block_tokens)
            levels[side] = on_grid(histogram.levels(bits))
            if self.q_norm:
                decoded[side] = _moved(levels[side], histogram)
        return {"levels": levels, "decoded_levels": decoded}

    def _too_short(self, block_tokens: int) -> CalibrationError:
        least = self.sink_tokens + block_tokens
        what, remedy = "sinks", "fewer sink_tokens"
        if block_tokens > 1:
            what, remedy = "sinks and a block of keys", "a smaller block_tokens"
        return CalibrationError(
            f"calibration text must have a document of at least {least} tokens, more than "
            f"{what}; give longer text or {remedy}"
        )

    def _layer_plan(self, layer: LayerGeometry, config: Any, fit: Fit) -> LayerPlan:
        keys, width = fit.table("key"), layer.key_head_dim
        key: AnyCodec
        if fit.ranges is None:
            block: dict[str, Any] = {
                "granularity": "per_channel",
                "group_size": self.block_tokens,
            }
            key = self._with_outliers(Codebook(**keys, **block), width, "channel")
        else:
            inner = self._with_outliers(NearestLevel(**keys), width, "token")
            key = RangeNormalised(inner=inner, **fit.ranges)
        if self.is_pre_rope:
            key = PreRope(inner=key, frequencies=frequencies(layer, config))
        values = Codebook(**fit.table("value"))
        value = self._with_outliers(values, layer.value_head_dim, "token")
        return LayerPlan.uniform(
            key, value, sink_tokens=self.sink_tokens, residual_length=self.residual_length
        )

    def _with_outliers(
        self, codec: AnyCodec, head_dim: int, by: Literal["token", "channel"]
    ) -> AnyCodec:
        if not self.outlier_share:
            return codec
        return Outliers(inner=codec, slots=slots_for(self.outlier_share, head_dim), by=by)

    def _count(self, histogram: Histogram, codec: Codec, observation: Observation) -> None:
        """Add the normalised states that a layer packs of one document, with their weights."""
        states, gradients = observation.states.float(), observation.gradients
        count = states.shape[-2] - self.sink_tokens
        packed = slice(self.sink_tokens, self.sink_tokens + count - count % codec.block_tokens)
        states = states[:, :, packed]
        if not states.numel():
            return
        is_scaled = self.levels == "fisher"
        weights = torch.ones_like(states) if gradients is None else gradients[:, :, packed].float()
        if isinstance(codec, PreRope):
            states = before_rotary(codec, states, packed.start)
            if gradients is not None:  # a gradient turns as the keys do
                weights = before_rotary(codec, weights, packed.start)
            codec = codec.inner
        weights = weights.square()
        if isinstance(codec, RangeNormalised):
            states = codec.apply(states, NO_CONTEXT)
            weights = codec.weighted(weights) if is_scaled else weights
            codec = codec.inner
        if isinstance(codec, Outliers):
            states, channel, _ = codec.parted(states)
            weights = weights.scatter(-1, channel, 0.0)
            codec = codec.inner
        if isinstance(codec, Codebook):
            states, scale, _ = codec.normalised(states)
            weights = codec.grouped(weights)
            weights = weights * scale.square() if is_scaled else weights
        histogram.add(states.clamp(-1, 1), weights)


def _ranges(index: int, low: Tensor, high: Tensor) -> dict[str, Any]:
    """Middle and half range of the key channels of a layer."""
    middle = (low + high) / 2
    # A channel that hardly moves gets the range that its fp16 neighbours would be apart.
    least = torch.finfo(torch.float16).eps * middle.abs()
    half = torch.maximum((high - low) / 2, least).clamp(min=1e-6)
    name = f"layers.{index}.key"
    return {
        "middle": Array(f"{name}.middle", middle),
        "half_range": Array(f"{name}.half_range", half),
    }


def _moved(levels: tuple[float, ...], histogram: Histogram) -> tuple[float, ...]:
    """Levels whose decoded values have the mean and spread of the exact ones."""
    mean, spread = histogram.moments
    rounded_mean, rounded_spread = histogram.rounded_moments(levels)
    factor = spread / rounded_spread if rounded_spread else 1.0
    return tuple(mean + (level - rounded_mean) * factor for level in levels)
