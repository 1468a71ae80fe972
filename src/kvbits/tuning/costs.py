"""What every candidate stores in every packable layer, exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.memory import layer_bytes, stored_bits_per_token
from kvbits.tuning.candidates import Candidates
from kvbits.tuning.tables import CostTable


def cost_table(candidates: Candidates, *, context: int | None = None, batch: int = 1) -> CostTable:
    """Tabulate stored sizes, metadata included; rows are the packable layers.

    Args:
        candidates: What may be stored.
        context: None counts what one more token of a long context adds. A number counts the bytes
            allocated at that many tokens a row: residual, sinks, page rounding included.
        batch: Rows of that many tokens.
    """
    layers = [(index, candidates.geometry.layers[index]) for index in candidates.layers]
    sizes = [
        [
            _stored_bits(candidates.layer_plan(index, column), layer, context, batch)
            for column in range(len(candidates.columns))
        ]
        for index, layer in layers
    ]
    unit = math.lcm(*(size.denominator for row in sizes for size in row))
    units = np.array([[int(size * unit) for size in row] for row in sizes], dtype=np.int64)
    num_values = sum(layer.values_per_token for _, layer in layers) * (context or 1) * batch
    return CostTable(candidates.columns, units, num_values, 1 / unit)


def _stored_bits(
    plan: LayerPlan, layer: LayerGeometry, context: int | None, batch: int
) -> Fraction:
    if context is None:
        return batch * stored_bits_per_token(plan, layer)
    return Fraction(8 * layer_bytes(plan, layer, context, batch))
