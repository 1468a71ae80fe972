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

Choice: TypeAlias = tuple[int, ...]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

EXACT_LABEL = "K16V16"

Row: TypeAlias = int | str
"""What decides alone: a layer by its index, or a head of one: ``3.1`` is head 1 of layer 3."""


class Place(NamedTuple):
    """Where in the model a row is; no head means all of the layer."""

    layer: int
    head: int | None


def place_of(row: Row) -> Place:
    """Return the layer and the key/value head of a row."""
    if isinstance(row, int):
        return Place(row, None)
    layer, _, head = row.partition(".")
    return Place(int(layer), int(head))


class Candidate(NamedTuple):
    """One way to store a layer, a column of every table; None is a side that stays exact."""

    label: str
    key: str | None
    value: str | None


class SensitivityTable(NamedTuple):
    """Isolated forward KLs: what each codec of each layer costs when it alone is used."""

    domains: tuple[str, ...]
    sides: tuple[str, ...]  # labels of the codecs, of keys and of values
    kl_nats: FloatArray  # [domains, L, sides], nats per token

    def candidate_kl(self, candidates: Sequence[Candidate]) -> FloatArray:
        """Return the additive estimate of every candidate, ``[domains, L, P]``, nats per token.

        Isolated KLs add up over sides and layers to within a few per cent; an exact side costs
        nothing.
        """
        columns: dict[str | None, FloatArray] = {None: np.zeros(self.kl_nats.shape[:2])}
        columns |= {label: self.kl_nats[..., i] for i, label in enumerate(self.sides)}
        return np.stack([columns[each.key] + columns[each.value] for each in candidates], axis=-1)


def sensitivity_table(
    records: Iterable[Mapping[str, Any]],
    *,
    domains: Sequence[str],
    sides: Sequence[str],
    layers: Sequence[Row],
) -> SensitivityTable:
    """Assemble the table from the lines of ``sensitivity.jsonl``, one row per layer of ``layers``.

    Negative estimates (rounding noise of sides that cost nothing) count as zero.

    Raises:
        RecordError: A layer, side or domain has no record.
    """
    kl_nats = np.full((len(domains), len(layers), len(sides)), np.nan)
    for record in records:
        index = (
            domains.index(record["domain"]),
            layers.index(record["layer"]),
            sides.index(record["label"]),
        )
        kl_nats[index] = max(0.0, record["kl_nats"])
    missing = np.argwhere(np.isnan(kl_nats))
    if missing.size:
        domain, row, side = missing[0]
        raise RecordError(
            f"sensitivity must hold every layer, side and domain, got {len(missing)} gaps, "
            f"first at layer {layers[row]}, {sides[side]}, {domains[domain]}"
        )
    return SensitivityTable(tuple(domains), tuple(sides), kl_nats)


class CostTable(NamedTuple):
    """Stored size of every candidate in every layer, in whole units, so that budgets are exact.

    Attributes:
        candidates: One per column.
        units: ``[L, P]`` stored size in units.
        num_values: Values stored by all packable layers together, in the same accounting.
        unit_bits: Bits in one unit.
        layer_starts: First row of every packable layer; empty where every row is one.
    """

    candidates: tuple[Candidate, ...]
    units: IntArray
    num_values: int
    unit_bits: float
    layer_starts: tuple[int, ...] = ()

    @property
    def layer_ends(self) -> tuple[int, ...]:
        """Rows at which the first 0, 1, ... layers end."""
        rows = len(self.units)
        return (*(self.layer_starts or range(rows)), rows)

    def total(self, choice: Choice) -> int:
        """Return the units of one candidate index per layer."""
        return int(self.units[np.arange(len(choice)), list(choice)].sum())

    def effective_bits(self, choice: Choice) -> float:
        """Return stored bits per value, metadata included."""
        return self.total(choice) * self.unit_bits / self.num_values

    def budget(self, bits: float) -> int:
        """Return the most units that ``bits`` effective bits allow, rounded down."""
        return int(np.floor(bits * self.num_values / self.unit_bits + 1e-9))

    def labels(self, choice: Choice) -> tuple[str, ...]:
        """Return the candidate's label of each layer."""
        return tuple(self.candidates[index].label for index in choice)


class Allocation(NamedTuple):
    """One candidate per layer, with what it stores and what the additive model expects of it."""

    choice: Choice
    effective_bits: float
    predicted_kl: tuple[float, ...]  # nats per token, one per domain
    loss: float  # the objective: worst or weighted mean of the normalised domains
