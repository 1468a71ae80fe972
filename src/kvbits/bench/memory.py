"""The largest batch that runs: found by running it, not by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvbits.bench.workloads import Variant, fill
from kvbits.generation import generate
from kvbits.plan import CachePlan

CONTEXT = 32768
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
        batch, peak = _largest(model, variant.plan, context, free)
        yield {
            "variant": variant.name,
            "context": context,
            "effective_bits": round(variant.plan.effective_bits, 4),
            "largest_batch": batch,
            "formula_bytes": _bytes(model, variant.plan, context, max(batch, 1)),
            "peak_bytes": peak,
            "weights_bytes": weights,
            "device_bytes": total,
        }


def _largest(model: Any, plan: CachePlan, context: int, free: int) -> tuple[int, int]:
    """Bisect between no rows and what free bytes would hold if a step needed no others.

    Returns:
        Rows, and the most bytes that were allocated for them.
    """
    fits, peak, fails = 0, 0, free // _bytes(model, plan, context) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2 if fits else max(1, 9 * fails // 10)
        found = _peak_bytes(model, plan, middle, context)
        if found is None:
            fails = middle
        else:
            fits, peak = middle, found
    return fits, peak


def _bytes(model: Any, plan: CachePlan, context: int, batch: int = 1) -> int:
    bits = 8 * model.dtype.itemsize
    return plan.bytes(context, batch, state_bits=bits, max_tokens=context + SPARE_TOKENS)


def _peak_bytes(model: Any, plan: CachePlan, batch: int, context: int) -> int | None:
    """Decode a few tokens of a full batch: the peak of memory, or None if there is too little."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    try:
        cache = plan.new_cache(model, max_tokens=context + SPARE_TOKENS)
        fill(model, cache, batch, context)
        token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        generate(model, token, cache, max_new_tokens=STEPS)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(model.device)
