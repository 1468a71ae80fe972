"""``token_stats``: what a policy is told of the entries of one head that may be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbits.replay.families import Family
from kvbits.replay.settings import TensorSettings

PROBED_BITS = (2, 4)
LEAST_NORM = 1e-8
_PROBE = Family()
_NUMBERS = (
    "mean", "std", "min", "max", "absmax", "rms", "channel_range_mean", "token_range_mean",
    "channel_outlier", "token_outlier", "err2", "err4",
)  # fmt: skip


def token_stats(
    states: Tensor, settings: TensorSettings, span: tuple[int, int], source: str
) -> list[dict[str, Any]]:
    """Describe every head of ``[H, T, D]``; tokens ``span[0]`` to ``span[1]`` are quantizable."""
    heads, num_tokens, head_dim = states.shape
    part = states[:, span[0] : span[1]].float()
    counts = {
        "seq_len": num_tokens,
        "quant_tokens": part.shape[1],
        "protected_tokens": num_tokens - part.shape[1],
        "head_dim": head_dim,
    }
    rows = _numbers(part, settings) if part.numel() else [[0.0] * len(_NUMBERS)] * heads
    return [{**counts, **dict(zip(_NUMBERS, row, strict=True)), "source": source} for row in rows]


def _numbers(x: Tensor, settings: TensorSettings) -> list[list[float]]:
    size = x.abs()
    columns = [
        x.mean((1, 2)),
        x.std((1, 2), correction=0),
        x.amin((1, 2)),
        x.amax((1, 2)),
        size.amax((1, 2)),
        x.square().mean((1, 2)).sqrt(),
        (x.amax(1) - x.amin(1)).mean(1),
        (x.amax(2) - x.amin(2)).mean(1),
        _outlier(size.amax(1)),
        _outlier(size.amax(2)),
        *(_probe(x, settings, bits) for bits in PROBED_BITS),
    ]
    return [list(map(float, row)) for row in torch.stack(columns, 1).tolist()]


def _outlier(largest: Tensor) -> Tensor:
    """Largest over median of ``[H, N]``, the median of an even number being its middle."""
    return largest.amax(1) / (largest.quantile(0.5, dim=1) + LEAST_NORM)


def _probe(x: Tensor, settings: TensorSettings, bits: int) -> Tensor:
    """Relative error of every head on its own, min-max on the axis and groups of the plan."""
    plain = settings._replace(clip_ratio=1.0, symmetric=False, outliers_ratio=0.0)
    # Groups along a token would span heads: as tokens of one head, they do not.
    rows = x if plain.choose_axis == "channel" else x.flatten(0, 1)[None]
    decoded = _PROBE.quantize(rows, plain, [bits] * len(rows)).states.view_as(x)
    error = torch.linalg.vector_norm(x - decoded, dim=(1, 2))
    return error / torch.linalg.vector_norm(x, dim=(1, 2)).clamp_min(LEAST_NORM)
