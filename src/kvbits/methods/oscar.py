"""OSCAR: rotations fitted to what queries ask of keys, and scores of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kvbits.calibration.capture import Observations, observe
from kvbits.calibration.rotation import Covariance, value_weights
from kvbits.codecs import Affine, Array, MatrixRotated, Rotated
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.methods.base import Method, Progress
from kvbits.plan import CachePlan


class Oscar(Method):
    """One rotation a layer and side, then clipped codes per token behind sinks and a window.

    Keys are rotated by the eigenvectors of what queries are like, values by those of the values
    themselves, each as heavy as its key is asked for; both then by a Hadamard matrix. Without data
    it is the Hadamard matrix alone.
    """

    name: ClassVar = "oscar"
    source: ClassVar = "arXiv 2605.17757"
    calibration: ClassVar = "text, forwards"
    differs: ClassVar = (
        "written from descriptions of the method; its code was not at hand",
        "values are rotated in the cache, not in the model's weights",
        "tokens are weighted document by document; sinks, which stay exact, are not counted",
    )

    key_bits: Literal[2, 3, 4, 8] = 2
    value_bits: Literal[2, 3, 4, 8] = 2
    group_size: int | None = None
    key_clip_ratio: float = Field(default=0.96, gt=0, le=1)
    value_clip_ratio: float = Field(default=0.92, gt=0, le=1)
    residual_length: int = Field(default=256, ge=0)
    sink_tokens: int = Field(default=64, ge=0)

    @property
    def needs_data(self) -> bool:
        return True

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return self._layer_plan(*(Rotated(inner=self._affine(side)) for side in SIDES))

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        start = self.plan(model.config)
        packed = [index for index, plan in enumerate(start.layers) if not plan.is_exact]
        found = {(index, side): Covariance() for index in packed for side in SIDES}
        is_empty = True
        for seen in observe(model, documents, with_gradients=False, with_queries=True):
            for index in packed:
                is_empty &= not self._count(index, seen, found)
            if progress:
                progress()
        if packed and is_empty:
            raise CalibrationError(
                f"calibration text must have a document of more than {self.sink_tokens} tokens, "
                "the sinks; give longer text or fewer sink_tokens"
            )
        layers = list(start.layers)
        for index in packed:
            layers[index] = self._layer_plan(
                *(self._rotated(index, side, found[index, side]) for side in SIDES)
            )
        return CachePlan.from_layers(model.config, layers, start.provenance)

    def _count(
        self, index: int, seen: Observations, found: dict[tuple[int, Side], Covariance]
    ) -> bool:
        """Count the tokens of a document that a layer packs; whether there are any."""
        key, value = seen[index, "key"], seen[index, "value"]
        asked = key.queries
        if asked is None or asked.shape[-1] != key.states.shape[-1]:
            width = "no" if asked is None else asked.shape[-1]
            raise UnsupportedModelError(
                f"layer {index} must attend to keys as they lie in the cache, of "
                f"{key.states.shape[-1]} channels, got queries of {width} channels"
            )
        keys, values, queries = (
            x[0, :, self.sink_tokens :] for x in (key.states, value.states, asked)
        )
        if not keys.shape[1]:
            return False
        found[index, "key"].add(queries)
        found[index, "value"].add(values, value_weights(keys, queries))
        return True

    def _rotated(self, index: int, side: Side, covariance: Covariance) -> MatrixRotated:
        matrix = Array(f"layers.{index}.{side}.rotation", covariance.rotation()[None])
        return MatrixRotated(inner=self._affine(side), matrix=matrix)

    def _layer_plan(self, key: Any, value: Any) -> LayerPlan:
        return LayerPlan.uniform(
            key, value, sink_tokens=self.sink_tokens, residual_length=self.residual_length
        )

    def _affine(self, side: Side) -> Affine:
        is_key = side == "key"
        return Affine(
            bits=self.key_bits if is_key else self.value_bits,
            group_size=self.group_size,
            clip_ratio=self.key_clip_ratio if is_key else self.value_clip_ratio,
        )
