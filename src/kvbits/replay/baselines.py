"""Policies of the package: the five baselines, one of our own, and one that follows a plan.

They are ordinary policies: nothing here that a file of yours could not do.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kvbits.replay.policy import AdaptiveQuantPolicy

Meta = dict[str, Any]


class _Fixed(AdaptiveQuantPolicy):
    """One setting for every tensor; what the baselines share."""

    bits = 4
    family = "minmax"
    key_axis = "token"
    group = 64
    residual = 0
    sinks = 0
    clip = 1.0

    def choose_bits(
        self, layer_id: int, kv_kind: str, head_group: int, token_stats: Meta, budget_state: Meta
    ) -> int:
        return self.bits

    def choose_axis(self, layer_id: int, kv_kind: str) -> str:
        return self.key_axis if kv_kind == "key" else "token"

    def residual_length(self, layer_id: int, request_meta: Meta) -> int:
        return self.residual

    def quantizer_family(self, layer_id: int, kv_kind: str, request_meta: Meta) -> str:
        return self.family

    def group_size(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return self.group

    def sink_tokens(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return self.sinks

    def clip_ratio(self, layer_id: int, kv_kind: str, request_meta: Meta) -> float:
        return self.clip


class UniformQuant4Bit(_Fixed):
    """Four bits, 64 channels a scale, nothing exact."""


class UniformQuant2Bit(_Fixed):
    """Two bits, 64 channels a scale, nothing exact."""

    bits = 2


class KiviOverlap4Bit(_Fixed):
    """KIVI as its documentation runs LongBench: G = 32, R = 128."""

    family, key_axis, group, residual = "kivi", "channel", 32, 128


class KiviOverlap2Bit(KiviOverlap4Bit):
    """The same at two bits."""

    bits = 2


class SkvqOverlap2Bit(_Fixed):
    """SKVQ's recipe without reordering and keys before the rotary embedding."""

    bits, family, group, residual, sinks, clip = 2, "skvq", 128, 128, 5, 0.92


class EvenError(AdaptiveQuantPolicy):
    """Ours: as much error in every head, a small window, smaller groups, and sinks.

    A head gets three bits where they would cost it no more error than four cost most heads; the
    prompt decides, and the error at three bits is taken for the geometric mean of those at two and
    four. What that and a window of 16 in place of 128 save pays for groups of 24 in place of 32.
    The numbers were chosen on kvbits-tiny and the visible slices.
    """

    tolerated_error = 0.07

    def choose_bits(
        self, layer_id: int, kv_kind: str, head_group: int, token_stats: Meta, budget_state: Meta
    ) -> int:
        error_at_three = math.sqrt(token_stats["err2"] * token_stats["err4"])
        return 3 if 0 < error_at_three <= self.tolerated_error else 4

    def residual_length(self, layer_id: int, request_meta: Meta) -> int:
        return 16

    def calibration_mode(self, workload_meta: Meta, budget_state: Meta) -> str:
        return "prefill"

    def group_size(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return 24

    def sink_tokens(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return 8


class TunedPlan(AdaptiveQuantPolicy):
    """Follows a plan file of ``kvbits tune``: widths, groups, sinks and residual of every layer.

    Only affine codecs and exact layers have a family here. Where keys and values leave a plan's
    residual together, the replay lets values leave one by one, so a few more of them are packed.

    Args:
        path: The plan; the run has checked it against the model before it is read here.
    """

    def __init__(self, path: str) -> None:
        # Read as data: CachePlan would load torch, which this process has no use for.
        self._layers: list[Meta] = json.loads(Path(path).read_text())["layers"]

    def _codec(self, layer_id: int, kv_kind: str, head: int = 0) -> Meta:
        groups = self._layers[layer_id]["groups"]
        group = next(each for each in groups if each["heads"] is None or head in each["heads"])
        codec: Meta = group[kv_kind]
        if codec["kind"] not in ("affine", "identity"):
            raise ValueError(f"plan must have affine or exact layers, got {codec['kind']}")
        return codec

    def choose_bits(
        self, layer_id: int, kv_kind: str, head_group: int, token_stats: Meta, budget_state: Meta
    ) -> int:
        codec = self._codec(layer_id, kv_kind, head_group)
        return codec["bits"] if codec["kind"] == "affine" else 16

    def choose_axis(self, layer_id: int, kv_kind: str) -> str:
        granularity = self._codec(layer_id, kv_kind).get("granularity")
        return "channel" if granularity == "per_channel" else "token"

    def residual_length(self, layer_id: int, request_meta: Meta) -> int:
        return self._layers[layer_id]["residual_length"]

    def quantizer_family(self, layer_id: int, kv_kind: str, request_meta: Meta) -> str:
        is_kivi = self._layers[layer_id]["flush"] == "independent"
        return "kivi" if is_kivi and self.choose_axis(layer_id, "key") == "channel" else "minmax"

    def group_size(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return self._codec(layer_id, kv_kind).get("group_size") or request_meta["head_dim"]

    def sink_tokens(self, layer_id: int, kv_kind: str, request_meta: Meta) -> int:
        return self._layers[layer_id]["sink_tokens"]

    def clip_ratio(self, layer_id: int, kv_kind: str, request_meta: Meta) -> float:
        return self._codec(layer_id, kv_kind).get("clip_ratio", 1.0)

    def symmetric(self, layer_id: int, kv_kind: str, request_meta: Meta) -> bool:
        return self._codec(layer_id, kv_kind).get("symmetric", False)


BUILT_IN: dict[str, type[AdaptiveQuantPolicy]] = {
    "default": AdaptiveQuantPolicy,
    "uniform_quant_4bit": UniformQuant4Bit,
    "uniform_quant_2bit": UniformQuant2Bit,
    "kivi_overlap_4bit": KiviOverlap4Bit,
    "kivi_overlap_2bit": KiviOverlap2Bit,
    "skvq_overlap_2bit": SkvqOverlap2Bit,
    "even_error": EvenError,
}
"""Policies by the names ``kvbits replay`` takes in place of a file."""
