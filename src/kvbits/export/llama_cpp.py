"""llama.cpp: one type for all keys, one for all values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvbits.export.base import Settings
from kvbits.export.formats import EXACT_SIDE, Format, SideFormat
from kvbits.export.whole_model import WholeModel
from kvbits.plan import CachePlan

BLOCK = 32
# Blocks of 32 channels with an fp16 scale, and for types 1 an fp16 minimum.
TYPES = {
    "f16": EXACT_SIDE,
    "q8_0": SideFormat(8, "affine", parameter_bits=16, group_size=BLOCK),
    "q5_1": SideFormat(5, "affine", parameter_bits=32, group_size=BLOCK),
    "q5_0": SideFormat(5, "affine", parameter_bits=16, group_size=BLOCK),
    "q4_1": SideFormat(4, "affine", parameter_bits=32, group_size=BLOCK),
    "q4_0": SideFormat(4, "affine", parameter_bits=16, group_size=BLOCK),
    "iq4_nl": SideFormat(4, "codebook", parameter_bits=16, group_size=BLOCK),
}


class LlamaCpp(WholeModel):
    """``--cache-type-k`` and ``--cache-type-v``."""

    name: ClassVar = "llama.cpp"
    checked: ClassVar = "llama.cpp server documentation"
    exact: ClassVar = Format("f16 f16", EXACT_SIDE, EXACT_SIDE)
    formats: ClassVar = tuple(
        Format(f"{key} {value}", TYPES[key], TYPES[value])
        for key in TYPES
        for value in TYPES
        if (key, value) != ("f16", "f16")
    )

    offers: ClassVar = f"{', '.join(TYPES)}, for keys and for values"

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        key, value = self.only(formats, plan).name.split()
        attention = () if value == "f16" else ("--flash-attn", "on")  # values need it
        return Settings(("--cache-type-k", key, "--cache-type-v", value, *attention))

    def notes_on(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        key, value = self.only(formats, plan).name.split()
        if key == value and key in ("f16", "q8_0", "q4_0"):
            return []
        return [f"CUDA builds have K {key}, V {value} only with GGML_CUDA_FA_ALL_QUANTS=ON"]
