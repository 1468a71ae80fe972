"""KVTuner's published plans: the widths it found for every layer of four models."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any, ClassVar, Literal, NamedTuple

from kvbits.errors import PlanError
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.base import Method
from kvbits.plan import CachePlan
from kvbits.plan.modes import Mode, Pair
from kvbits.plan.provenance import Provenance


class Preset(NamedTuple):
    """One published plan.

    Attributes:
        name: Model, mode and KVTuner's own number of it.
        mode: What its widths were found for.
        paper: What the paper calls it, if it is in there.
        average_bits: Mean width of all codes, as published; metadata comes on top.
        pairs: Key and value widths of every layer.
        note: What is wrong with it, if anything.
    """

    name: str
    mode: Mode
    paper: str | None
    average_bits: float
    pairs: tuple[Pair, ...]
    note: str | None


class KVTuner(Method):
    """The plan KVTuner publishes for a model; ``kvbits tune`` finds one for any other.

    ``preset`` names it, such as ``Llama-3.1-8B/kivi/4_1``.
    """

    name: ClassVar = "kvtuner"
    source: ClassVar = "arXiv 2502.04420"
    widths: ClassVar = "2, 4, 8 by layer"
    differs: ClassVar = (
        "codes are packed, where its code stores a byte each whatever the width",
        "offsets are real numbers, not integer zero points",
    )

    preset: str
    exact_layers: Literal[0] = 0

    def plan(self, config: Any) -> CachePlan:
        found = presets()
        if self.preset not in found:
            raise ValueError(f"preset must be one of {', '.join(found)}, got {self.preset!r}")
        preset = found[self.preset]
        num_layers = len(ModelGeometry.from_config(config).layers)
        if num_layers != len(preset.pairs):
            raise PlanError(
                f"preset must be for a model of {num_layers} layers, got {self.preset!r} for "
                f"{len(preset.pairs)}; use kvbits tune to find a plan"
            )
        plan = CachePlan.from_pairs(config, preset.pairs, mode=preset.mode)
        return plan.with_provenance(Provenance(method=self.name, mode=preset.mode))

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        raise NotImplementedError("a preset is about all layers at once")


@functools.cache
def presets() -> dict[str, Preset]:
    """All published plans, by name."""
    text = (files("kvbits.methods") / "kvtuner_presets.json").read_text(encoding="utf-8")
    return {
        entry["name"]: Preset(
            entry["name"],
            entry["mode"],
            entry["paper"],
            entry["average_bits"],
            _pairs(entry["layers"]),
            entry.get("note"),
        )
        for entry in json.loads(text)
    }


def _pairs(layers: dict[str, str]) -> tuple[Pair, ...]:
    """``{"K4V2": "0,2-3", "K8V8": "1"}`` to a pair for every layer, in order."""
    found = {
        index: (int(pair[1]), int(pair[3]))
        for pair, text in layers.items()
        for index in _each(text)
    }
    return tuple(found[index] for index in range(len(found)))


def _each(text: str) -> list[int]:
    """``"0,2-3"`` to ``[0, 2, 3]``."""
    runs = [part.split("-") for part in text.split(",")]
    return [index for run in runs for index in range(int(run[0]), int(run[-1]) + 1)]
