"""TurboQuant: a norm per token, and the best levels for the rest of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.codecs import AnyCodec, NormScaled, Rotated
from kvbits.codecs.levels import lloyd_max
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method


class TurboQuant(Method):
    """Every token is rotated with random signs, and its direction takes Lloyd-Max levels."""

    name: ClassVar = "turboquant"
    source: ClassVar = "arXiv 2504.19874"
    differs: ClassVar = (
        "a Hadamard matrix with random signs in place of a random rotation",
        "the stored norm makes the decoded token as long as the exact one",
        "the variant of least squared error; no sketch of the residual",
    )

    key_bits: Literal[2, 3, 4] = 4
    value_bits: Literal[2, 3, 4] = 4
    sign_seed: int = 0
    residual_length: int = Field(default=0, ge=0)
    sink_tokens: int = Field(default=0, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return LayerPlan.uniform(
            self._codec(self.key_bits),
            self._codec(self.value_bits),
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )

    def _codec(self, bits: int) -> AnyCodec:
        return Rotated(inner=NormScaled(levels=lloyd_max(bits)), sign_seed=self.sign_seed)
