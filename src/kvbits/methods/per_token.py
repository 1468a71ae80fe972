"""One scale for every token and head, plain or behind a rotation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.codecs import Affine, AnyCodec, Rotated
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method


class TokenByToken(Method):
    """Both sides by one kind of codec, token by token; what the subclasses share.

    They say which widths there are.
    """

    key_bits: Any
    value_bits: Any
    residual_length: int = Field(default=0, ge=0)
    sink_tokens: int = Field(default=0, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return LayerPlan.uniform(
            self.codec(self.key_bits),
            self.codec(self.value_bits),
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )

    @abstractmethod
    def codec(self, bits: int) -> AnyCodec:
        """The codec of one side."""


class PerToken(TokenByToken):
    """Round to nearest with a scale and an offset per token and head: the plainest method."""

    name: ClassVar = "per-token"
    source: ClassVar = "KVTuner's per-token mode, arXiv 2502.04420"
    differs: ClassVar = ("offsets are real numbers, not integer zero points",)

    key_bits: Literal[2, 3, 4, 8] = 4
    value_bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = None

    def codec(self, bits: int) -> AnyCodec:
        return Affine(bits=bits, group_size=self.group_size)


class Hadamard(PerToken):
    """The same behind a Hadamard rotation of every head, which spreads outlier channels."""

    name: ClassVar = "hadamard"
    source: ClassVar = "QuaRot, arXiv 2404.00456"
    differs: ClassVar = ("weights and activations are left alone; only the cache is rotated",)

    def codec(self, bits: int) -> AnyCodec:
        return Rotated(inner=super().codec(bits))
