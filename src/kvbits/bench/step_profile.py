"""What a decode step's time on a GPU is made of, by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from kvbits.generation import generate

STEPS = 8  # the first a prompt of one token, the others steps like it
# The first that a kernel's name matches; anything else is norms, rotations, sampling and the like.
KINDS = {
    "attention": r"attend_|prepare_queries|merge_splits|flash|fmha|sdpa",
    "append": r"append_|encode_",
    "matmul": r"gemm|gemv|nvjet|cutlass|splitk|xmma",
}
OTHER = "other"


def kernel_ms(model: Any, cache: Any, batch: int) -> dict[str, float]:
    """Milliseconds of a step that kernels of each kind ran, over a few steps of a filled cache.

    Their sum is less than the time of a step by what lies between kernels.

    Args:
        model: A model on a CUDA device.
        cache: With room for ``STEPS`` more tokens.
        batch: Its rows.
    """
    from torch.profiler import ProfilerActivity, profile

    token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        generate(model, token, cache, max_new_tokens=STEPS)
    events = profiler.key_averages()
    return by_kind((event.key, event.self_device_time_total / STEPS / 1e3) for event in events)


def by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sum times by kind of kernel, from names of kernels."""
    total = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, value in times:
        total[_kind(name)] += value
    return {kind: round(value, 3) for kind, value in total.items()}


def _kind(name: str) -> str:
    kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(kinds, OTHER)
