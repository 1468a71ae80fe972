"""The number formats that engines store a cache in."""

from __future__ import annotations

from typing import Any, ClassVar

from kvbits.codecs import Affine, AnyCodec, Float4, Float8
from kvbits.codecs.floating import TensorScale
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method


class Format(Method):
    """One codec for every state; what the subclasses share."""

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        return LayerPlan.uniform(self.codec(), self.codec())

    def codec(self) -> AnyCodec:
        """The codec of both sides."""
        raise NotImplementedError


class Int8(Format):
    """8-bit integers with a scale per token and head, around zero."""

    name: ClassVar = "int8"
    source: ClassVar = "vLLM, LMDeploy: int8 per token and head"
    widths: ClassVar = "8"

    def codec(self) -> AnyCodec:
        return Affine(bits=8, symmetric=True)


class Fp8(Format):
    """fp8 e4m3 with one scale for all states."""

    name: ClassVar = "fp8"
    source: ClassVar = "OCP 8-bit floating point; the fp8 cache of vLLM and TensorRT-LLM"
    widths: ClassVar = "8"

    scale: TensorScale = 1.0

    def codec(self) -> AnyCodec:
        return Float8(tensor_scale=self.scale)


class NvFp4(Format):
    """fp4 e2m1 with an e4m3 scale for 16 channels."""

    name: ClassVar = "nvfp4"
    source: ClassVar = "NVIDIA NVFP4"
    widths: ClassVar = "4"

    scale: TensorScale = 1.0

    def codec(self) -> AnyCodec:
        return Float4(format="nvfp4", tensor_scale=self.scale)


class MxFp4(Format):
    """fp4 e2m1 with a power of two for 32 channels."""

    name: ClassVar = "mxfp4"
    source: ClassVar = "OCP microscaling formats, arXiv 2310.10537"
    widths: ClassVar = "4"

    def codec(self) -> AnyCodec:
        return Float4(format="mxfp4")
