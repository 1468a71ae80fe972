"""Cache plans: which codecs every layer uses, where that came from, and what it costs."""

from __future__ import annotations

from kvbits.plan.cache_plan import CachePlan
from kvbits.plan.modes import MODES, WIDTHS, Mode, Pair, Settings
from kvbits.plan.provenance import Dataset, Metric, Provenance

__all__ = [
    "MODES",
    "WIDTHS",
    "CachePlan",
    "Dataset",
    "Metric",
    "Mode",
    "Pair",
    "Provenance",
    "Settings",
]
