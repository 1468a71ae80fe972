"""transformers' own quantized cache: one width for both sides of all layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from kvbits.errors import PlanError
from kvbits.export.base import Settings, holds_other_layers, window_losses
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, Format, SideFormat, both
from kvbits.export.whole_model import WholeModel
from kvbits.plan import CachePlan

FILE = "generation_config.json"
CHANNEL_AXIS = {"hqq": 1, "quanto": 0}  # what each calls groups along the channels
# hqq packs fewer bits across tokens and fails at lengths that leave a rest.
BACKENDS = {8: "hqq", 4: "quanto", 2: "quanto"}
GROUP_SIZES = (64, 32)


def _integers(bits: int, group_size: int) -> Format:
    side = SideFormat(bits, "affine", parameter_bits=32, group_size=group_size)
    return both(f"{BACKENDS[bits]} {bits} in {group_size}", side)


class Transformers(WholeModel):
    """``cache_implementation="quantized"`` and its ``cache_config``."""

    name: ClassVar = "transformers"
    checked: ClassVar = "transformers 5.23.0"
    exact: ClassVar = both("dynamic", EXACT_SIDE)
    formats: ClassVar = (
        *(_integers(bits, group_size) for bits in BACKENDS for group_size in GROUP_SIZES),
        both("fp8", FP8_SIDE),
    )
    offers: ClassVar = "fp8; 2 and 4 (quanto), 8 bits (hqq), in groups of 64 or 32 channels"
    notes: ClassVar = (
        f"model.generate(..., **json.load(open({FILE!r}))) uses it",
        "it encodes the whole cache again whenever the residual is full, and decodes all of it "
        "at every step; CachePlan.new_cache does neither",
    )

    def check(self, plan: CachePlan) -> None:
        super().check(plan)
        if holds_other_layers(plan):
            raise PlanError(
                "plan must be for a model of full-attention layers alone, as transformers' "
                f"quantized cache takes no others, got {plan.model.architecture!r}"
            )

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        name = self.only(formats, plan).name
        return Settings(files={FILE: json.dumps(_arguments(name, plan), indent=2) + "\n"})

    def losses(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        losses = window_losses(plan)
        if _residual_length(plan) and self.only(formats, plan).name != "fp8":
            losses = [loss for loss in losses if "newest" not in loss]
            losses.append("the residual is empty again whenever it is packed")
        return losses


def _arguments(name: str, plan: CachePlan) -> dict[str, Any]:
    backend, *sizes = name.replace(" in ", " ").split()
    if backend == "dynamic":
        return {"cache_implementation": "dynamic"}
    config: dict[str, Any] = {"backend": backend}
    if sizes:
        bits, group_size = map(int, sizes)
        config |= {
            "nbits": bits,
            "axis_key": CHANNEL_AXIS[backend],
            "axis_value": CHANNEL_AXIS[backend],
            "q_group_size": group_size,
            "residual_length": max(1, _residual_length(plan)),
        }
    return {"cache_implementation": "quantized", "cache_config": config}


def _residual_length(plan: CachePlan) -> int:
    return max((p.residual_length for p in plan.layers if not p.is_exact), default=0)
