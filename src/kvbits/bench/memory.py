"""The largest batch that runs: found by running it, not by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvbits.bench.workloads import Variant, fill
from kvbits.generation import generate
from kvbits.plan import CachePlan

STEPS = 4
SPARE_TOKENS = 256  # what a row may grow by


def measure(model: Any, plans: Sequence[Variant], context: int) -> Iterator[dict[str, Any]]:
    """The largest batch of rows of ``context`` tokens under each plan; one record each.

    A batch fits if a cache with room for it can be made, filled and decoded from.

    Raises:
        ValueError: If a variant has no plan.
    """
    device = model.device
    for variant in plans:
        if variant.plan is None:
            raise ValueError(
                f"plan must reserve its room on a GPU, got {variant.name!r}; pass K16V16 for a "
                "16-bit cache"
            )
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        weights = torch.cuda.memory_allocated(device)
        batch = _largest(model, variant.plan, context, free)
        yield {
            "variant": variant.name,
            "context": context,
            "effective_bits": round(variant.plan.effective_bits, 4),
            "largest_batch": batch,
            "formula_bytes": variant.plan.bytes(
                context, max(batch, 1), max_tokens=context + SPARE_TOKENS
            ),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "weights_bytes": weights,
            "device_bytes": total,
        }


def _largest(model: Any, plan: CachePlan, context: int, free: int) -> int:
    """Start from what the formula says and walk to the edge."""
    batch = max(1, free // plan.bytes(context, max_tokens=context + SPARE_TOKENS))
    step = max(1, batch // 64)
    while batch > 0 and not _fits(model, plan, batch, context):
        batch -= step
    return max(batch, 0)


def _fits(model: Any, plan: CachePlan, batch: int, context: int) -> bool:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    try:
        cache = plan.new_cache(model, max_tokens=context + SPARE_TOKENS)
        fill(model, cache, batch, context)
        token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        generate(model, token, cache, max_new_tokens=STEPS)
    except torch.cuda.OutOfMemoryError:
        return False
    return True
