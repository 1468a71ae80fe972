"""SGLang: one format for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvbits.export.base import Settings
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, NVFP4_SIDE, Format, SideFormat, both
from kvbits.export.whole_model import WholeModel
from kvbits.plan import CachePlan


class Sglang(WholeModel):
    """``--kv-cache-dtype``."""

    name: ClassVar = "sglang"
    checked: ClassVar = "SGLang 0.5.23"
    exact: ClassVar = both("auto", EXACT_SIDE)
    formats: ClassVar = (
        both("fp8_e4m3", FP8_SIDE),
        both("nvfp4", NVFP4_SIDE),
        both("fp4_mx_block16", SideFormat(4, "mxfp4", parameter_bits=8, group_size=16)),
    )

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        return Settings(("--kv-cache-dtype", self.only(formats, plan).name))

    def notes_on(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        name = self.only(formats, plan).name
        if name == "auto":
            return []
        if name == "fp8_e4m3":
            return ["scales are 1 unless --quantization-param-path or the checkpoint has some"]
        return [f"{name} needs CUDA 12.8 or newer and an attention backend that reads it"]
