"""KVQuant: keys before the rotary embedding, levels that are not even, outliers apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.calibration.capture import Observation, observe
from kvbits.calibration.fitting import Histogram
from kvbits.codecs import AnyCodec, Codebook, Codec, EncodeContext, Outliers, PreRope
from kvbits.codecs.levels import normal_float
from kvbits.codecs.outliers import slots_for
from kvbits.errors import CalibrationError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.methods.base import Method, Progress
from kvbits.methods.rotary import frequencies
from kvbits.plan import CachePlan


def _uniform(bits: int) -> tuple[float, ...]:
    return tuple(2 * level / (2**bits - 1) - 1 for level in range(2**bits))


TABLES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "normal_float": normal_float,
    "uniform": _uniform,
}


class KVQuant(Method):
    """Per-channel keys before the rotary embedding and per-token values, in fitted levels.

    ``levels``: ``fisher`` fits them to normalised states, weighted by squared gradient and squared
    scale, so that what is made small is the loss; ``fisher_unscaled`` leaves the scale out, as the
    released code does; ``activations`` counts all states alike and needs no gradients;
    ``normal_float`` and ``uniform`` need no data at all.

    ``q_norm`` moves the decoded levels so that their mean and spread are those of the states.
    """

    name: ClassVar = "kvquant"
    source: ClassVar = "arXiv 2401.18079"
    calibration: ClassVar = "text, forwards and backwards"
    differs: ClassVar = (
        "the range of a key channel is that of its block of tokens, not a calibrated one",
        "as many outliers for every token and head, an even number, in 24 bits each",
        "levels are the best ones for a histogram of 1024 bins, not k-means from one start",
    )

    key_bits: Literal[2, 3, 4] = 3
    value_bits: Literal[2, 3, 4] = 3
    levels: Literal["fisher", "fisher_unscaled", "activations", "normal_float", "uniform"] = (
        "fisher"
    )
    block_tokens: int = Field(default=128, ge=1)
    outlier_share: float = Field(default=0.01, ge=0, lt=0.5)
    sink_tokens: int = Field(default=1, ge=0)
    is_pre_rope: bool = True
    q_norm: bool = False

    @property
    def needs_data(self) -> bool:
        return self.levels not in TABLES

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        table = TABLES.get(self.levels, normal_float)  # until others are fitted
        tables = [Codebook(levels=table(bits)) for bits in (self.key_bits, self.value_bits)]
        return self._layer_plan(layer, config, *tables)

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        start = self.plan(model.config)
        if not self.needs_data:
            return start
        histograms: dict[tuple[int, Side], Histogram] = {}
        for seen in observe(model, documents, with_gradients=self.levels != "activations"):
            for (index, side), observation in seen.items():
                layer = start.layers[index]
                if not layer.is_exact:
                    histogram = histograms.setdefault((index, side), Histogram())
                    self._count(histogram, layer.groups[0].codec(side), observation)
            if progress:
                progress()
        layers = [
            plan if plan.is_exact else self._fitted(index, start, model.config, histograms)
            for index, plan in enumerate(start.layers)
        ]
        return CachePlan.from_layers(model.config, layers, start.provenance)

    def _fitted(
        self,
        index: int,
        start: CachePlan,
        config: Any,
        histograms: dict[tuple[int, Side], Histogram],
    ) -> LayerPlan:
        tables = []
        for side, bits in zip(SIDES, (self.key_bits, self.value_bits), strict=True):
            histogram = histograms[index, side]
            if not histogram.total:
                raise CalibrationError(
                    "calibration text must have a document of more than "
                    f"{self.sink_tokens + self.block_tokens} tokens, sinks and a block of keys; "
                    "give longer text or a smaller block_tokens"
                )
            levels = histogram.levels(bits)
            moved = _moved(levels, histogram) if self.q_norm else None
            tables.append(Codebook(levels=levels, decoded_levels=moved))
        return self._layer_plan(start.model.layers[index], config, *tables)

    def _layer_plan(
        self, layer: LayerGeometry, config: Any, key: Codebook, value: Codebook
    ) -> LayerPlan:
        block = {"granularity": "per_channel", "group_size": self.block_tokens}
        keys = self._with_outliers(key.model_copy(update=block), layer.key_head_dim, "channel")
        if self.is_pre_rope:
            keys = PreRope(inner=keys, frequencies=frequencies(layer, config))
        values = self._with_outliers(value, layer.value_head_dim, "token")
        return LayerPlan.uniform(keys, values, sink_tokens=self.sink_tokens)

    def _with_outliers(
        self, codec: Codebook, head_dim: int, by: Literal["token", "channel"]
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
        weights = torch.ones_like(states) if gradients is None else gradients[:, :, packed].float()
        if isinstance(codec, PreRope):
            positions = torch.arange(packed.start, packed.stop, device=states.device)[None]
            context = EncodeContext(positions)
            states = codec.apply(states, context)
            if gradients is not None:  # a gradient turns as the keys do
                weights = codec.apply(weights, context)
            codec = codec.inner
        weights = weights.square()
        if isinstance(codec, Outliers):
            states, channel, _ = codec.parted(states)
            weights = weights.scatter(-1, channel, 0.0)
            codec = codec.inner
        assert isinstance(codec, Codebook)
        values, scale, _ = codec.normalised(states)
        grouped = codec.grouped(weights)
        histogram.add(values, grouped * scale.square() if self.levels == "fisher" else grouped)


def _moved(levels: tuple[float, ...], histogram: Histogram) -> tuple[float, ...]:
    """Levels whose decoded values have the mean and spread of the exact ones."""
    mean, spread = histogram.moments
    rounded_mean, rounded_spread = histogram.rounded_moments(levels)
    factor = spread / rounded_spread if rounded_spread else 1.0
    return tuple(mean + (level - rounded_mean) * factor for level in levels)
