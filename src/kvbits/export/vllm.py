"""vLLM: one format for the model, and layers that are left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import yaml

from kvbits.export.base import Engine, Settings, holds_other_layers
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, NVFP4_SIDE, Format, SideFormat, both
from kvbits.plan import CachePlan

# A float32 scale per token and head; for int4 its lowest bits hold the zero point.
INT8 = SideFormat(8, "affine", parameter_bits=32)
INT4 = SideFormat(4, "affine", parameter_bits=32, is_rotated=True)
KEY4 = SideFormat(4, "norm_scaled", parameter_bits=16, is_rotated=True)
KEY3 = SideFormat(3, "norm_scaled", parameter_bits=16, is_rotated=True)
VALUE4 = SideFormat(4, "affine", parameter_bits=32)
VALUE3 = SideFormat(3, "affine", parameter_bits=32)
TURBOQUANT = "turboquant_"
NUM_TURBOQUANT_ENDS = 2


class Vllm(Engine):
    """``--kv-cache-dtype`` and ``--kv-cache-dtype-skip-layers``."""

    name: ClassVar = "vllm"
    checked: ClassVar = "vLLM 0.33.0"
    exact: ClassVar = both("auto", EXACT_SIDE)
    formats: ClassVar = (
        both("fp8", FP8_SIDE),
        both("int8_per_token_head", INT8),
        both("int4_per_token_head", INT4),
        Format("turboquant_k8v4", FP8_SIDE, VALUE4),
        Format("turboquant_4bit_nc", KEY4, VALUE4),
        Format("turboquant_k3v4_nc", KEY3, VALUE4),
        Format("turboquant_3bit_nc", KEY3, VALUE3),
        both("nvfp4", NVFP4_SIDE),
    )
    reach: ClassVar = "model_or_exact"

    def always_exact(self, format: Format, plan: CachePlan) -> frozenset[int]:
        # vLLM adds these to the skipped layers of every model but hybrids of attention and others.
        num_layers = len(plan.model.layers)
        is_hybrid = not all(layer.holds_states for layer in plan.model.layers)
        if is_hybrid or not format.name.startswith(TURBOQUANT):
            return frozenset()
        ends = min(NUM_TURBOQUANT_ENDS, num_layers // 2)
        return frozenset((*range(ends), *range(num_layers - ends, num_layers)))

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        dtype, skipped = _dtype_and_skipped(formats, plan)
        arguments = ["--kv-cache-dtype", dtype]
        data: dict[str, object] = {"kv-cache-dtype": dtype}
        if skipped:
            arguments += ["--kv-cache-dtype-skip-layers", *skipped]
            data["kv-cache-dtype-skip-layers"] = skipped
        return Settings(tuple(arguments), {"vllm.yaml": yaml.safe_dump(data, sort_keys=False)})

    def notes_on(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        dtype, _ = _dtype_and_skipped(formats, plan)
        notes = ["vllm.yaml is for `vllm serve MODEL --config vllm.yaml`"]
        if dtype == "fp8":
            notes.append("fp8 takes scales of 1 unless the checkpoint has calibrated ones")
        if dtype == "nvfp4":
            notes.append("nvfp4 needs a Blackwell GPU")
        if dtype.startswith(TURBOQUANT):
            notes.append("vLLM keeps the first and last two layers exact with turboquant")
        return notes


def _dtype_and_skipped(formats: Sequence[Format], plan: CachePlan) -> tuple[str, list[str]]:
    """The format of the packed layers, and what is left out of it."""
    packable = plan.model.packable_layers
    packed = [formats[index].name for index in packable if not formats[index].is_exact]
    if not packed:
        return "auto", []
    skipped = [str(index) for index in packable if formats[index].is_exact]
    if holds_other_layers(plan):
        skipped.append("sliding_window")
    return packed[0], skipped
