"""KVTuner's per-layer and per-head YAML, in and out.

    0: {nbits_key: 8, nbits_value: 4}                       # per layer
    1: {0: {nbits_key: 4, nbits_value: 2}, 1: {...}}        # per key/value head

The file names widths only. Mode, group size and residual length are not in it.
Source: KVTuner (arXiv 2502.04420), its published calibration presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvbits.codecs import Affine, Codec
from kvbits.errors import PlanError
from kvbits.geometry import ModelGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.plan.files import read_text
from kvbits.plan.loading import shorten
from kvbits.plan.modes import EXACT_BITS, WIDTHS, Pair

_KEYS = ("nbits_key", "nbits_value")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, and anchors, whose nesting can explode."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise PlanError("file must not use YAML aliases, got one; write the widths out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise PlanError(
                f"{shorten(repeated)} must be given once, got it twice "
                f"near line {node.start_mark.line + 1}"
            )
        return mapping


def read(path: Path, model: ModelGeometry) -> list[list[Pair]]:
    """Read the pairs of every layer: one for all heads, or one per key/value head.

    Args:
        path: The YAML file.
        model: Geometry of the model; its packable layers must all be in the file.

    Raises:
        PlanError: If the file is malformed or names other layers, heads or widths.
    """
    text = read_text(path)
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise PlanError(f"{path} must hold valid YAML, got {shorten(reason)}{where}") from None
    except (RecursionError, ValueError) as error:
        raise PlanError(f"{path} must hold valid YAML, got {shorten(str(error))}") from None
    layers = _indexed(data, "layers", set(model.packable_layers), len(model.layers))
    return [_layer_pairs(layers.get(i), i, model) for i in range(len(model.layers))]


def _layer_pairs(entry: Any, index: int, model: ModelGeometry) -> list[Pair]:
    if entry is None:  # only layers that are not packable may be absent
        return [(EXACT_BITS, EXACT_BITS)]
    name, heads = f"layer {index}", model.layers[index].num_key_value_heads
    if isinstance(entry, dict) and not set(entry) & set(_KEYS):
        per_head = _indexed(entry, f"heads of {name}", set(range(heads)), heads)
        return [_pair(per_head[head], f"{name} head {head}") for head in range(heads)]
    return [_pair(entry, name)]


def _indexed(data: Any, name: str, required: set[int], count: int) -> dict[int, Any]:
    """Check that ``data`` maps integers, all ``required`` ones and none from ``count`` on."""
    if not isinstance(data, dict):
        raise PlanError(f"{name} must be a mapping from integers to widths, got {shorten(data)}")
    for key, value in data.items():
        if isinstance(key, bool) or not isinstance(key, int):
            raise PlanError(
                f"{name} must have integer keys, got {shorten(key)}; write them without quotes"
            )
        if not 0 <= key < count:
            raise PlanError(
                f"{name} must be numbered 0 to {count - 1} for this model, got {key}; "
                "the file is for another model"
            )
        if value is None:
            raise PlanError(f"{name} must give widths for {key}, got nothing")
    missing = sorted(required - set(data))
    if missing:
        raise PlanError(
            f"{name} must be complete, got none for {', '.join(map(str, missing[:5]))}"
            f"{' and more' if len(missing) > 5 else ''}; the file is for another model"
        )
    return data


def _pair(entry: Any, name: str) -> Pair:
    if not isinstance(entry, dict) or set(entry) != set(_KEYS):
        raise PlanError(f"{name} must have exactly {' and '.join(_KEYS)}, got {shorten(entry)}")
    for key in _KEYS:
        if isinstance(entry[key], bool) or entry[key] not in WIDTHS:
            raise PlanError(
                f"{key} of {name} must be one of {', '.join(map(str, WIDTHS))}, "
                f"got {shorten(entry[key])}"
            )
    return entry["nbits_key"], entry["nbits_value"]


def write(layers: Sequence[LayerPlan], model: ModelGeometry, mode: str | None) -> str:
    """Text of a KVTuner file; stock layers that cannot be packed are left out.

    Raises:
        PlanError: If a packable layer keeps a side exact, as KVTuner overflows int8 above 8 bits,
            or has codecs that KVTuner does not know.
    """
    data: dict[int, dict[Any, Any]] = {}
    for index in model.packable_layers:
        pairs = _head_pairs(layers[index])
        widest = max(max(pair) for pair in pairs.values())
        if widest == EXACT_BITS:
            raise PlanError(
                f"layers[{index}] must have widths of at most 8 bits in a KVTuner file, got 16"
            )
        entries = {head: dict(zip(_KEYS, pair, strict=True)) for head, pair in pairs.items()}
        data[index] = entries if len(layers[index].groups) > 1 else next(iter(entries.values()))
    note = f"# written by kvbits; quantization mode: {mode or 'not recorded'}\n"
    return note + yaml.safe_dump(data, sort_keys=True)


def _head_pairs(plan: LayerPlan) -> dict[int, Pair]:
    """Pair of every named head in order; of one unnamed group, as head 0."""
    pairs = {
        head: (_width(group.key), _width(group.value))
        for group in plan.groups
        for head in group.heads or (0,)
    }
    return dict(sorted(pairs.items()))


def _width(codec: Codec) -> int:
    """Whole bits of a codec that KVTuner has."""
    if codec.is_exact:
        return EXACT_BITS
    if not isinstance(codec, Affine) or codec.bits not in WIDTHS:
        raise PlanError(
            f"codecs must be affine with whole bits in a KVTuner file, got {shorten(codec)}"
        )
    return int(codec.bits)
