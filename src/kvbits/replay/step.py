"""One step of a replay: the policy decides, its families quantize, the bits are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbits.errors import PolicyError
from kvbits.replay.families import Attention, Family, Kivi, Skvq
from kvbits.replay.hooks import KINDS
from kvbits.replay.process import PolicyProcess
from kvbits.replay.qaq import Qaq
from kvbits.replay.settings import Request, TensorSettings
from kvbits.replay.token_stats import token_stats

FAMILIES: dict[str, Family] = {family.name: family for family in (Family(), Kivi(), Skvq(), Qaq())}
REFERENCE_TOKENS = 4096  # the length at which the bits of policies are compared
LEAST_NORM = 1e-8

Stats = list[list[dict[str, Any]]]  # of every tensor and head
Entries = list[Tensor]  # ``[1, H_kv, T, D]``: keys of all layers, then values
AttentionOf = Callable[[TensorSettings, int, int], Attention]


class TensorRecord(NamedTuple):
    """What one step did to one tensor; the bits are averages over its entries.

    Attributes:
        chosen: Bits of every head as the policy chose them, cut down to the budget; empty where
            attention decided.
        bits: Exact tokens at 16 included.
        bits_with_meta: Scales and offsets too.
        bits_at_reference: What ``bits`` would be at 4096 tokens.
        error: Relative error over the whole tensor.
    """

    chosen: tuple[int, ...]
    bits: float
    bits_with_meta: float
    bits_at_reference: float
    error: float


class Step(NamedTuple):
    """A quantized cache, and a record of each of its tensors."""

    entries: Entries
    records: list[TensorRecord]
    num_clamped: int


def check_settings(settings: Sequence[TensorSettings], head_dim: int) -> list[TensorSettings]:
    """Refuse settings that do not go together; return what the families read of them.

    Raises:
        PolicyError: With hook, layer and kind.
    """
    for each in settings:
        FAMILIES[each.quantizer_family].check(each, head_dim)
    read = [FAMILIES[each.quantizer_family].read(each) for each in settings]
    for kind in KINDS:
        tensors = [each for each in read if each.kv_kind == kind]
        spanning = [each for each in tensors if _spans_layers(each)]
        for each in tensors if spanning else []:
            if _units(each) != _units(spanning[0]):
                raise spanning[0].refuse(
                    "quantization_level",
                    f"be another unless all layers of the kind agree, and layer {each.layer_id} "
                    "does not",
                )
    return read


def _units(settings: TensorSettings) -> TensorSettings:
    """What must agree where units span layers: all that qaq reads, so not axis and group size."""
    return settings._replace(layer_id=0, choose_axis="token", group_size=0)


def _spans_layers(settings: TensorSettings) -> bool:
    return settings.quantizer_family == "qaq" and settings.quantization_level == "token"


class Quantizer:
    """Quantizes the cache of one request, step by step.

    Args:
        policy: The policy.
        request: What it may know of the request.
        settings: What it asked for, one entry for each tensor.
        frozen: ``token_stats`` that hold for every step; None computes them anew.
        attention: What the newest queries say of a tensor.
    """

    def __init__(
        self,
        policy: PolicyProcess,
        request: Request,
        settings: list[TensorSettings],
        frozen: Stats | None,
        attention: AttentionOf,
    ) -> None:
        self._policy, self._request, self._settings = policy, request, settings
        self._frozen, self._attention = frozen, attention
        self._steps: list[float] = []
        self._num_clamped = 0

    def run(self, entries: Entries) -> Step:
        """Quantize the cache of this step; ``entries`` stay as they are."""
        self._num_clamped = 0
        made: list[Tensor | None] = [None] * len(entries)
        records: list[TensorRecord | None] = [None] * len(entries)
        chosen: dict[int, list[int]] = {}
        half = len(entries) // 2
        for indices in (range(half), range(half, len(entries))):
            together: list[int] = []
            for index in indices:
                chosen[index] = self._decide(index, entries, records, chosen)
                together.append(index)
                if _spans_layers(self._settings[index]) and index != indices[-1]:
                    continue
                self._quantize(entries, together, chosen, made, records)
                together = []
        done = [record for record in records if record is not None]
        self._steps.append(sum(record.bits for record in done) / len(done))
        return Step([x for x in made if x is not None], done, self._num_clamped)

    def _decide(
        self,
        index: int,
        entries: Entries,
        records: list[TensorRecord | None],
        chosen: dict[int, list[int]],
    ) -> list[int]:
        """Bits of every head, as the policy chooses; none where attention decides."""
        settings, states = self._settings[index], entries[index]
        if settings.use_attentions:
            return []
        family = FAMILIES[settings.quantizer_family]
        state = self._request.budget_state(
            states.shape[2],
            step=len(self._steps) + 1,
            avg_bits_so_far=sum(self._steps) / len(self._steps) if self._steps else 0.0,
            spent_bits_this_step=self._spent(entries, records, chosen),
        )
        found = []
        for head, stats in enumerate(self._stats_of(index, states)):
            asked = self._policy.ask(
                "choose_bits", head, stats, state,
                layer_id=settings.layer_id, kv_kind=settings.kv_kind,
            )  # fmt: skip
            bits = min(int(asked), self._request.budget_bits)
            self._num_clamped += bits < asked
            family.check_bits(settings, bits)
            found.append(bits)
        return found

    def _spent(
        self,
        entries: Entries,
        records: list[TensorRecord | None],
        chosen: dict[int, list[int]],
    ) -> float:
        """Mean bits of the tensors decided so far, by their entries; nominal until quantized."""
        total = values = 0.0
        for index, bits in chosen.items():
            record, settings = records[index], self._settings[index]
            if record is None:  # waits for the other layers
                family = FAMILIES[settings.quantizer_family]
                spent = family.average_bits(settings, entries[index].shape[2], min(bits))
            else:
                spent = record.bits
            total += spent * entries[index].numel()
            values += entries[index].numel()
        return total / values if values else 0.0

    def _stats_of(self, index: int, states: Tensor) -> list[dict[str, Any]]:
        if self._frozen is not None:
            return self._frozen[index]
        return stats_of(states, self._settings[index], "online")

    def _quantize(
        self,
        entries: Entries,
        indices: list[int],
        chosen: dict[int, list[int]],
        made: list[Tensor | None],
        records: list[TensorRecord | None],
    ) -> None:
        """Quantize tensors whose units span them, usually one, and record each."""
        settings = self._settings[indices[0]]
        family = FAMILIES[settings.quantizer_family]
        states = [entries[index] for index in indices]
        num_tokens = states[0].shape[2]
        start, stop = family.quantizable(settings, num_tokens)
        bits = [each for index in indices for each in chosen[index]]
        part = torch.cat([x[0, :, start:stop] for x in states])
        attention = None
        if settings.use_attentions:
            seen = [self._attention(self._settings[i], start, stop) for i in indices]
            attention = seen[0]._replace(weights=torch.cat([each.weights for each in seen]))
            bits = [settings.bit_range[1]]  # of an empty range
        decoded = family.quantize(part, settings, bits, attention)
        heads = decoded.states.split([x.shape[1] for x in states])
        for index, exact, new in zip(indices, states, heads, strict=True):
            out = exact.clone()
            out[0, :, start:stop] = new.to(exact.dtype)
            _check_finite(settings._replace(layer_id=self._settings[index].layer_id), out)
            average = family.average_bits(settings, num_tokens, decoded.bits)
            records[index] = TensorRecord(
                chosen=tuple(chosen[index]),
                bits=average,
                bits_with_meta=average + decoded.parameter_bits / len(indices) / exact.numel(),
                bits_at_reference=family.average_bits(settings, REFERENCE_TOKENS, decoded.bits),
                error=relative_norm(exact, out),
            )
            made[index] = out


def stats_of(states: Tensor, settings: TensorSettings, source: str) -> list[dict[str, Any]]:
    """``token_stats`` of every head of one tensor ``[1, H_kv, T, D]``."""
    span = FAMILIES[settings.quantizer_family].quantizable(settings, states.shape[2])
    return token_stats(states[0], settings, span, source)


def relative_norm(exact: Tensor, approximate: Tensor) -> float:
    """||X - X^|| / max(||X||, 1e-8) over a whole tensor, float32."""
    norm = torch.linalg.vector_norm(exact.float()).clamp_min(LEAST_NORM)
    return float(torch.linalg.vector_norm(exact.float() - approximate.float()) / norm)


def _check_finite(settings: TensorSettings, states: Tensor) -> None:
    if not bool(states.isfinite().all()):
        raise PolicyError(
            f"quantized states (layer {settings.layer_id}, kind {settings.kv_kind}) must be "
            "finite, got NaN or infinity"
        )
