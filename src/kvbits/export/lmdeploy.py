"""LMDeploy: one policy for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvbits.export.base import Settings
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, Format, SideFormat, both
from kvbits.export.whole_model import WholeModel
from kvbits.plan import CachePlan

# A scale and a zero point in the model's dtype, per token and head.
INT8 = SideFormat(8, "affine", parameter_bits=32)
INT4 = SideFormat(4, "affine", parameter_bits=32)
PYTORCH_ONLY = ("fp8", "turbo_quant")


class LMDeploy(WholeModel):
    """``--quant-policy``, by the names its command line knows."""

    name: ClassVar = "lmdeploy"
    checked: ClassVar = "LMDeploy 0.18.0"
    exact: ClassVar = both("none", EXACT_SIDE)
    formats: ClassVar = (
        both("int8", INT8),
        both("int4", INT4),
        both("fp8", FP8_SIDE),
        Format(
            "turbo_quant",
            SideFormat(4, "norm_scaled", parameter_bits=32, is_rotated=True),
            SideFormat(2, "norm_scaled", parameter_bits=16, is_rotated=True),
        ),
    )

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        name = self.only(formats, plan).name
        backend = ("--backend", "pytorch") if name in PYTORCH_ONLY else ()
        return Settings(("--quant-policy", name, *backend))
