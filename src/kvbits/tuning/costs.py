"""What every candidate stores in every packable layer, exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.memory import layer_bytes, stored_bits_per_token
from kvbits.plan.modes import exact_layer
from kvbits.tuning.candidates import Candidates
from kvbits.tuning.tables import CostTable, place_of


def cost_table(candidates: Candidates, *, context: int | None = None, batch: int = 1) -> CostTable:
    """Tabulate stored sizes, metadata included; rows are the packable layers or their heads.

    Heads are counted as if each had pages of its own; those that share a codec share pages, which
    at a context takes a little less and never more.

    Args:
        candidates: What may be stored.
        context: None counts what one more token of a long context adds. A number counts the bytes
            allocated at that many tokens a row: residual, sinks, page rounding included.
        batch: Rows of that many tokens.
    """
    layers = [(row, candidates.row_geometry(row)) for row in candidates.layers]
    sizes = [
        [
            _stored_bits(candidates.layer_plan(index, column), layer, context, batch)
            if column or place_of(index).head is None
            else _exact_head(candidates.layer_plan(index, 1), layer, context, batch)
            for column in range(len(candidates.columns))
        ]
        for index, layer in layers
    ]
    unit = math.lcm(*(size.denominator for row in sizes for size in row))
    units = np.array([[int(size * unit) for size in row] for row in sizes], dtype=np.int64)
    num_values = sum(layer.values_per_token for _, layer in layers) * (context or 1) * batch
    starts = [i for i, row in enumerate(candidates.layers) if not place_of(row).head]
    return CostTable(candidates.columns, units, num_values, 1 / unit, tuple(starts))


def _exact_head(
    window: LayerPlan, layer: LayerGeometry, context: int | None, batch: int
) -> Fraction:
    """Size of a head that stays exact beside packed ones: it lies in pages as they do."""
    if context is None:
        return batch * stored_bits_per_token(exact_layer(), layer)
    packed, exact = window.groups[0], exact_layer().groups[0]
    groups = (packed.model_copy(update={"heads": (0,)}), exact.model_copy(update={"heads": (1,)}))
    both = LayerPlan.model_validate({**dict(window), "groups": groups})
    two = layer.model_copy(update={"num_key_value_heads": 2})
    alone = layer_bytes(window, layer, context, batch)
    return Fraction(8 * (layer_bytes(both, two, context, batch) - alone))


def _stored_bits(
    plan: LayerPlan, layer: LayerGeometry, context: int | None, batch: int
) -> Fraction:
    if context is None:
        return batch * stored_bits_per_token(plan, layer)
    return Fraction(8 * layer_bytes(plan, layer, context, batch))
