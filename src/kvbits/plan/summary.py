"""A plan in a few words."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.codecs import AnyCodec
from kvbits.geometry import ModelGeometry
from kvbits.layer_plan import LayerPlan


def layer_parts(layers: Sequence[LayerPlan], model: ModelGeometry) -> list[str]:
    """Widths and the layers that have them, such as ``["K8V4 0-3", "K4V2 4-11"]``."""
    indices: dict[str, list[int]] = {}
    for index, (plan, layer) in enumerate(zip(layers, model.layers, strict=True)):
        name = layer_name(plan) if layer.is_packable else f"stock {layer.layer_type}"
        indices.setdefault(name, []).append(index)
    return [f"{name} {ranges(found)}" for name, found in indices.items()]


def layer_name(plan: LayerPlan) -> str:
    """``K8V4``; the pairs of several head groups are joined by a slash."""
    return "/".join(f"K{_side_name(group.key)}V{_side_name(group.value)}" for group in plan.groups)


def _side_name(codec: AnyCodec) -> str:
    """Width, and the kind of codecs that are not the usual ones: ``4``, ``3[rotated]``."""
    is_usual = codec.is_exact or codec.kind == "affine"
    return f"{codec.bits}" if is_usual else f"{codec.bits}[{codec.kind}]"


def ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` to ``0-2,5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
