"""What every candidate stores in every packable layer, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.memory import layer_bytes, stored_bits_per_token
from kvbits.plan.modes import Mode, Settings, layer_plan
from kvbits.tuning.tables import CostTable, Pair


def cost_table(
    geometry: ModelGeometry,
    pairs: Sequence[Pair],
    mode: Mode,
    *,
    settings: Settings | None = None,
    context: int | None = None,
) -> CostTable:
    """Tabulate stored sizes, metadata included; rows are the packable layers.

    Args:
        geometry: The model's cache geometry.
        pairs: Candidate widths.
        mode: What a pair means for a layer.
        settings: Group size and so on; the mode's own by default.
        context: None counts what one more token of a long context adds. A number counts the bytes
            allocated at that many tokens of one sequence: residual, sinks, page rounding included.
    """
    layers = [geometry.layers[index] for index in geometry.packable_layers]
    sizes = [
        [_stored_bits(layer, pair, mode, settings or {}, context) for pair in pairs]
        for layer in layers
    ]
    unit = math.lcm(*(size.denominator for row in sizes for size in row))
    units = np.array([[int(size * unit) for size in row] for row in sizes], dtype=np.int64)
    num_values = sum(layer.values_per_token for layer in layers) * (context or 1)
    return CostTable(tuple(pairs), units, num_values, 1 / unit)


def _stored_bits(
    layer: LayerGeometry, pair: Pair, mode: Mode, settings: Settings, context: int | None
) -> Fraction:
    plan = layer_plan(layer, [pair], mode, settings)
    if context is None:
        return stored_bits_per_token(plan, layer)
    return Fraction(8 * layer_bytes(plan, layer, context))
