"""The plain tables the search works on: candidate pairs, their sensitivities and their costs.

Everything after the measurements is arithmetic on these arrays, so that pruning, clustering and
the searches can be tested without a model. Rows are the layers that can be packed, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvbits.errors import RecordError

Pair: TypeAlias = tuple[int, int]
Choice: TypeAlias = tuple[int, ...]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

EXACT_BITS = 16
SIDES = ("key", "value")


def candidate_pairs(widths: Sequence[int]) -> tuple[Pair, ...]:
    """Return every (key bits, value bits) of ``widths``, widest first, and the exact pair.

    >>> candidate_pairs((4, 2))
    ((16, 16), (4, 4), (4, 2), (2, 4), (2, 2))
    """
    ordered = sorted(set(widths), reverse=True)
    packed = [(key, value) for key in ordered for value in ordered]
    return ((EXACT_BITS, EXACT_BITS), *packed)


class SensitivityTable(NamedTuple):
    """Isolated forward KLs: what each side of each layer costs when it alone is quantized."""

    domains: tuple[str, ...]
    widths: tuple[int, ...]
    kl_nats: FloatArray  # [domains, L, 2 sides, widths], nats per token

    def pair_kl(self, pairs: Sequence[Pair]) -> FloatArray:
        """Return the additive estimate of every pair, ``[domains, L, P]``, in nats per token.

        Isolated KLs add up over sides and layers to within a few per cent; 16 bits cost nothing.
        """
        columns = {EXACT_BITS: np.zeros(self.kl_nats.shape[:3])}
        columns |= {bits: self.kl_nats[..., i] for i, bits in enumerate(self.widths)}
        estimates = [columns[key][..., 0] + columns[value][..., 1] for key, value in pairs]
        return np.stack(estimates, axis=-1)


def sensitivity_table(
    records: Iterable[Mapping[str, Any]],
    *,
    domains: Sequence[str],
    widths: Sequence[int],
    layers: Sequence[int],
) -> SensitivityTable:
    """Assemble the table from the lines of ``sensitivity.jsonl``, one row per layer of ``layers``.

    Negative estimates (rounding noise of sides that cost nothing) count as zero.

    Raises:
        RecordError: A layer, side, width or domain has no record.
    """
    kl_nats = np.full((len(domains), len(layers), len(SIDES), len(widths)), np.nan)
    for record in records:
        index = (
            domains.index(record["domain"]),
            layers.index(record["layer"]),
            SIDES.index(record["side"]),
            widths.index(record["bits"]),
        )
        kl_nats[index] = max(0.0, record["kl_nats"])
    missing = np.argwhere(np.isnan(kl_nats))
    if missing.size:
        domain, row, side, width = missing[0]
        raise RecordError(
            f"sensitivity must hold every layer, side, width and domain, got {len(missing)} gaps, "
            f"first at layer {layers[row]}, {SIDES[side]}, {widths[width]} bits, {domains[domain]}"
        )
    return SensitivityTable(tuple(domains), tuple(widths), kl_nats)


class CostTable(NamedTuple):
    """Stored size of every candidate in every layer, in whole units, so that budgets are exact.

    Attributes:
        pairs: The candidates, one per column.
        units: ``[L, P]`` stored size in units.
        num_values: Values stored by all packable layers together, in the same accounting.
        unit_bits: Bits in one unit.
    """

    pairs: tuple[Pair, ...]
    units: IntArray
    num_values: int
    unit_bits: float

    def total(self, choice: Choice) -> int:
        """Return the units of one candidate index per layer."""
        return int(self.units[np.arange(len(choice)), list(choice)].sum())

    def effective_bits(self, choice: Choice) -> float:
        """Return stored bits per value, metadata included."""
        return self.total(choice) * self.unit_bits / self.num_values

    def budget(self, bits: float) -> int:
        """Return the most units that ``bits`` effective bits allow, rounded down."""
        return int(np.floor(bits * self.num_values / self.unit_bits + 1e-9))

    def pairs_of(self, choice: Choice) -> tuple[Pair, ...]:
        """Return the pair of each layer."""
        return tuple(self.pairs[index] for index in choice)


class Allocation(NamedTuple):
    """One candidate per layer, with what it stores and what the additive model expects of it."""

    choice: Choice
    effective_bits: float
    predicted_kl: tuple[float, ...]  # nats per token, one per domain
    loss: float  # the objective: worst or weighted mean of the normalised domains
