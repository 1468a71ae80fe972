"""The nearest formats an engine has for the layers of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from kvbits.errors import PlanError
from kvbits.export.formats import Format, family, widest
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan
from kvbits.memory import head_dim
from kvbits.plan import CachePlan

Reach = Literal["model", "model_or_exact", "layer"]
"""What may differ within a model: nothing, which layers stay exact, or every layer's format."""

AlwaysExact = Callable[[Format], frozenset[int]]


class Distance(NamedTuple):
    """How far formats are from a plan; compared in this order.

    Attributes:
        num_refused: Layers the format cannot store, or stores with fewer bits than allowed.
        width: Bits that codes are wider or narrower by, over all values of a token.
        narrower: Bits that codes are narrower by.
        num_families: Sides whose codes mean something else, weighted alike.
        stored: Bits a token takes.
    """

    num_refused: int
    width: Fraction
    narrower: Fraction
    num_families: int
    stored: Fraction

    def plus(self, other: Distance) -> Distance:
        """The distance over both."""
        return Distance(
            self.num_refused + other.num_refused,
            self.width + other.width,
            self.narrower + other.narrower,
            self.num_families + other.num_families,
            self.stored + other.stored,
        )


NOWHERE = Distance(0, Fraction(0), Fraction(0), 0, Fraction(0))


def choose(
    plan: CachePlan,
    formats: Sequence[Format],
    exact: Format,
    reach: Reach,
    always_exact: AlwaysExact,
    *,
    allow_narrower: bool,
) -> list[Format]:
    """Choose a format for every layer of a plan; layers that cannot be packed get ``exact``.

    Codes are at least as wide as the plan's unless ``allow_narrower``. The nearest widths win;
    among equals codes of the same family; then fewer stored bits.

    Args:
        plan: What is wanted.
        formats: What the engine has, beside ``exact``.
        exact: The engine's name for unchanged states.
        reach: What may differ within a model.
        always_exact: Layers the engine leaves exact whatever it is told, by format.
        allow_narrower: Whether codes may be narrower than the plan's.

    Raises:
        PlanError: If the engine could only leave the whole model exact.
    """
    is_packed = not all(layer.is_exact for layer in plan.layers)
    candidates = [*formats, exact]
    if allow_narrower and is_packed and reach != "layer":
        candidates.remove(exact)  # to pack nothing is never what is asked for
    if reach == "layer":
        chosen = _each(plan, lambda index: candidates, exact, allow_narrower)
        return [format for format, _ in chosen]
    best: tuple[Distance, list[Format]] | None = None
    for candidate in candidates:
        skipped = always_exact(candidate)

        def options(
            index: int, candidate: Format = candidate, skipped: frozenset[int] = skipped
        ) -> list[Format]:
            if index in skipped:
                return [exact]
            return [candidate] if reach == "model" else [candidate, exact]

        chosen = _each(plan, options, exact, allow_narrower)
        total = NOWHERE
        for _, distance in chosen:
            total = total.plus(distance)
        if best is None or total < best[0]:
            best = total, [format for format, _ in chosen]
    assert best is not None
    found = best[1]
    if is_packed and all(format.is_exact for format in found):
        raise PlanError(
            "plan must have layers that one format of the engine can hold without narrower codes, "
            f"got {plan.describe()!r}; only 16 bits throughout would do, so allow narrower codes"
        )
    return found


def _each(
    plan: CachePlan,
    options: Callable[[int], list[Format]],
    exact: Format,
    allow_narrower: bool,
) -> list[tuple[Format, Distance]]:
    """The best option of every layer, and how far it is."""
    chosen = []
    for index, (wanted, layer) in enumerate(zip(plan.layers, plan.model.layers, strict=True)):
        if not layer.is_packable:
            chosen.append((exact, NOWHERE))
            continue
        ranked = [(_distance(f, wanted, layer, allow_narrower), f) for f in options(index)]
        distance, best = min(ranked, key=lambda pair: pair[0])
        chosen.append((best, distance))
    return chosen


def _distance(
    format: Format, wanted: LayerPlan, layer: LayerGeometry, allow_narrower: bool
) -> Distance:
    width, narrower, num_families = Fraction(0), Fraction(0), 0
    for side in SIDES:
        codec, offered = widest(wanted, side), format.side(side)
        values = layer.num_key_value_heads * head_dim(layer, side)
        gap = values * (offered.bits - Fraction(codec.bits))
        width += abs(gap)
        narrower += max(Fraction(0), -gap)
        num_families += not offered.is_exact and family(codec) != offered.family
    is_refused = not format.suits(layer) or (narrower > 0 and not allow_narrower)
    return Distance(int(is_refused), width, narrower, num_families, format.stored_bits(layer))
