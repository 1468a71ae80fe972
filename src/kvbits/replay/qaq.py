"""The ``qaq`` family: units of one token, and bits that may follow from attention.

Source: QAQ (arXiv 2403.04643) and its code.
Differs from the code: bits count the outliers that really are kept, not the ratio asked for; where
units span heads or layers, ``choose_bits`` counts by its least answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbits.codecs.base import Codec
from kvbits.codecs.simulated import NormalQuantiles, Simulated
from kvbits.methods.qaq import bits_needed, key_deviation, value_deviation
from kvbits.replay.families import (
    OFFSET_BITS,
    SCALE_BITS,
    Attention,
    Decoded,
    Family,
    outliers,
    quantize_rows,
)
from kvbits.replay.hooks import EXACT_BITS
from kvbits.replay.settings import TensorSettings

LEAST_RANGE = 1e-8


class Qaq(Family):
    """``qaq``: every unit has its own bits, its range around its mean."""

    name = "qaq"
    unread: ClassVar[dict[str, Any]] = {"clip_ratio": 1.0}

    def num_grouped(self, settings: TensorSettings, num_tokens: int) -> int:
        start, stop = self.quantizable(settings, num_tokens)
        return stop - start

    def check(self, settings: TensorSettings, head_dim: int) -> None:
        if settings.use_attentions and settings.quantization_method != "uniform":
            raise settings.refuse("use_attentions", "be False with the method 'normal'")

    def quantize(
        self,
        states: Tensor,
        settings: TensorSettings,
        bits: Sequence[int],
        attention: Attention | None = None,
    ) -> Decoded:
        """Quantize ``[H, T, D]``; heads of several layers, one after the other, for level token.

        ``bits`` for each head; not read where there is ``attention``.
        """
        is_by_head = settings.quantization_level == "head"
        units = states.float().transpose(0, 1)  # [T, H, D]
        units = (units if is_by_head else units.flatten(1)[:, None]).clone()
        if attention is not None:
            widths = self._widths(units, settings, attention)
        else:
            each = torch.tensor(bits if is_by_head else [min(bits)], device=states.device)
            widths = each.expand(units.shape[:2])
        num_apart = 0
        for width in widths.unique().tolist():
            rows = units[widths == width]
            num_apart += self._quantize_rows(rows, settings, int(width))
            units[widths == width] = rows
        apart = num_apart / max(units.numel(), 1)
        mean = widths.float().mean().item() if widths.numel() else float(min(bits))
        out = units.unflatten(-1, (-1, states.shape[-1])).flatten(1, 2).transpose(0, 1)
        parameters = SCALE_BITS + (0 if settings.symmetric else OFFSET_BITS)
        total = mean * (1 - apart) + EXACT_BITS * apart
        return Decoded(out, total, widths.numel() * parameters)

    def _quantize_rows(self, rows: Tensor, settings: TensorSettings, bits: int) -> int:
        if bits == EXACT_BITS:
            return 0
        if bits > 0:
            return quantize_rows(rows, self._codec(settings, bits), settings.outliers_ratio)
        is_apart = _outliers(rows, settings)
        middle = rows.masked_fill(is_apart, math.nan).nanmean(-1, keepdim=True)
        if settings.symmetric:
            middle = torch.zeros_like(middle)
        rows.copy_(torch.where(is_apart, rows, middle))
        return int(is_apart.sum())

    def _codec(self, settings: TensorSettings, bits: int) -> Codec:
        if settings.quantization_method == "normal":
            return NormalQuantiles(
                bits=bits, symmetric=settings.symmetric, least_spread=LEAST_RANGE
            )
        fit = "zero" if settings.symmetric else "mean"
        return Simulated.model_validate({"bits": bits, "fit": fit, "least_range": LEAST_RANGE})

    def _widths(self, units: Tensor, settings: TensorSettings, attention: Attention) -> Tensor:
        """Bits of every unit ``[T, units]``: the least that keep its error at the target."""
        low, high = settings.bit_range
        deviation = self._deviation(units, settings, attention)
        known = units.masked_fill(_outliers(units, settings), math.nan)
        least = known.nan_to_num(math.inf).amin(-1)
        most = known.nan_to_num(-math.inf).amax(-1)
        width = 2 * torch.maximum(most, -least) if settings.symmetric else most - least
        width = width.nan_to_num(posinf=0.0, neginf=0.0).clamp_min(0)
        widths = bits_needed(width, deviation, "code").clamp(low, high).int()
        if attention.num_newest:
            widths[-attention.num_newest :] = high
        return widths

    def _deviation(self, units: Tensor, settings: TensorSettings, attention: Attention) -> Tensor:
        """The standard deviation that a unit may err by, ``[T, units]``."""
        tokens = max(attention.num_tokens, 2)
        target = settings.target_quantization_error
        if settings.kv_kind == "key":
            return key_deviation(tokens, target, settings.q_norm).expand(units.shape[:2])
        weights = attention.weights.T  # [T, H]
        if units.shape[1] == 1:
            weights = weights.amax(1, keepdim=True)
        return value_deviation(tokens, target, weights)


def _outliers(rows: Tensor, settings: TensorSettings) -> Tensor:
    if not settings.outliers_ratio:
        return torch.zeros_like(rows, dtype=torch.bool)
    return outliers(rows, settings.outliers_ratio)
