"""TensorRT-LLM: one format for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import yaml

from kvbits.export.base import Settings
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, NVFP4_SIDE, Format, both
from kvbits.export.whole_model import WholeModel
from kvbits.plan import CachePlan

FILE = "tensorrt_llm.yaml"


class TensorRTLLM(WholeModel):
    """``kv_cache_config.dtype``; ranges of layers are proposed there, but in no release."""

    name: ClassVar = "tensorrt-llm"
    checked: ClassVar = "TensorRT-LLM 1.3 documentation"
    exact: ClassVar = both("auto", EXACT_SIDE)
    formats: ClassVar = (both("fp8", FP8_SIDE), both("nvfp4", NVFP4_SIDE))
    notes: ClassVar = (
        f"{FILE} is for `trtllm-serve MODEL --config {FILE}`, before that option "
        "--extra_llm_api_options",
    )

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        name = self.only(formats, plan).name
        options = {"kv_cache_config": {"dtype": name}}
        return Settings(("--kv_cache_dtype", name), {FILE: yaml.safe_dump(options)})

    def notes_on(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        name = self.only(formats, plan).name
        needs = ["nvfp4 needs a checkpoint quantized by ModelOpt and a Blackwell GPU"]
        return super().notes_on(formats, plan) + (needs if name == "nvfp4" else [])
