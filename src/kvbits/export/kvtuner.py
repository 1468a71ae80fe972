"""KVTuner: every layer's widths, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvbits.export.base import Engine, Settings
from kvbits.export.formats import EXACT_SIDE, Format, SideFormat, both
from kvbits.layer_plan import LayerPlan
from kvbits.plan import CachePlan, kvtuner

FILE = "kvtuner.yaml"
WIDTHS = (2, 3, 4, 8)
BYTE = 8  # what its code stores a code in, whatever the width


def _side(bits: int) -> SideFormat:
    return SideFormat(bits, "affine", parameter_bits=32, storage_bits=BYTE)


class KVTuner(Engine):
    """Its YAML, as ``CachePlan.to_kvtuner_yaml`` writes it: strict, nothing is rounded."""

    name: ClassVar = "kvtuner"
    checked: ClassVar = "KVTuner's published presets"
    exact: ClassVar = both("K16V16", EXACT_SIDE)
    formats: ClassVar = tuple(
        Format(f"K{key}V{value}", _side(key), _side(value)) for key in WIDTHS for value in WIDTHS
    )
    reach: ClassVar = "layer"
    notes: ClassVar = ("KVTuner stores a byte for every code, whatever its width",)

    offers: ClassVar = "2, 3, 4 and 8 bits, for keys and for values"

    def check(self, plan: CachePlan) -> None:
        super().check(plan)
        kvtuner.write(plan.layers, plan.model, None)  # refuses what the file cannot say

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        mode = plan.provenance.mode if plan.provenance else None
        return Settings(files={FILE: kvtuner.write(plan.layers, plan.model, mode)})

    def changes(self, wanted: LayerPlan, format: Format) -> list[str]:
        return []

    def losses(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        return ["mode, group sizes, sinks and residual are not in the file: pass them to KVTuner"]
