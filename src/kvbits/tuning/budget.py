"""Budgets in the user's terms, and what a plan buys in them."""

from __future__ import annotations

from typing import Any

from kvbits.memory import exact_bytes, largest_fitting
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import Candidates
from kvbits.tuning.search.trials import Limit
from kvbits.tuning.sensitivity import rounded
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.tables import CostTable


def limit_of(settings: TuneSettings, candidates: Candidates, costs: CostTable) -> Limit:
    """Return the budget as effective bits in the accounting of ``costs``, or as a KL.

    A drop in a task is neither: ``drop.DropLimit`` holds it.

    Raises:
        ValueError: The smallest plan is larger than the budget.
    """
    if settings.max_kl is not None:
        return Limit(kl_nats=settings.max_kl)
    if settings.max_drop is not None:
        return Limit()
    bits, given = settings.bits, f"got {settings.bits}"
    if settings.memory is not None:
        left = settings.memory - _stock_bytes(settings, candidates)
        bits = 8 * left / costs.num_values
        given = f"got {bits:.2f}, which is what memory={settings.memory} bytes allow"
    assert bits is not None
    smallest = costs.units.min(axis=1).sum() * costs.unit_bits / costs.num_values
    if smallest > bits + 1e-9:
        raise ValueError(
            f"bits must be at least {smallest:.2f} effective bits, what the smallest plan stores "
            f"with its metadata, {given}; raise the budget or add narrower widths"
        )
    return Limit(bits=min(bits, float(costs.effective_bits((0,) * len(costs.units)))))


def _stock_bytes(settings: TuneSettings, candidates: Candidates) -> int:
    """Bytes of the layers that are never packed."""
    assert settings.context is not None
    return sum(
        exact_bytes(layer, settings.context, settings.batch)
        for layer in candidates.geometry.layers
        if not layer.is_packable
    )


FEWEST_TOKENS, MOST_TOKENS = 256, 131_072


def memory_curve(plan: CachePlan, settings: TuneSettings) -> list[dict[str, Any]]:
    """Return what a plan's cache takes at context lengths that double, beside one of 16 bits."""
    own, batch = settings.context or settings.report_context, settings.batch
    lengths = {own}
    tokens = FEWEST_TOKENS
    while tokens <= max(MOST_TOKENS, own):
        lengths.add(tokens)
        tokens *= 2
    return [
        {
            "context": tokens,
            "bytes": plan.bytes(tokens, batch),
            "bytes_16bit": plan.bytes_16bit(tokens, batch),
            "effective_bits": rounded(plan.effective_bits_at(tokens, batch)),
        }
        for tokens in sorted(lengths)
    ]


def bought(plan: CachePlan, settings: TuneSettings) -> dict[str, Any]:
    """Return what a plan buys: its bytes beside those of 16 bits, and tokens in equal memory.

    Memory is the one that was given, or what the 16-bit cache takes for the same tokens.
    """
    context, batch = settings.context or settings.report_context, settings.batch
    full = plan.bytes_16bit(context, batch)
    memory = settings.memory or full
    return {
        "context": context,
        "batch": batch,
        "bytes": plan.bytes(context, batch),
        "bytes_16bit": full,
        "memory": memory,
        "tokens": largest_fitting(lambda tokens: plan.bytes(tokens, batch) <= memory),
        "tokens_16bit": largest_fitting(lambda tokens: plan.bytes_16bit(tokens, batch) <= memory),
    }
