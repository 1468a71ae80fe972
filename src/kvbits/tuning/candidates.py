"""The ways a layer may be stored in a study: whatever methods and widths, each under a label.

A mode, or a method at several widths, is a *family*: any of its key codecs goes with any of its
value codecs under the family's sinks and residual. Everything after this file works by column and
label; what a label means for a layer is asked here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from kvbits.codecs import Identity
from kvbits.codecs.base import Width
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import HeadGroup, LayerPlan, Side
from kvbits.methods import METHODS, Method, build_method
from kvbits.plan import CachePlan, Mode
from kvbits.plan.modes import exact_layer
from kvbits.tuning.tables import EXACT_LABEL, Candidate, Choice, Row, place_of

Granularity: TypeAlias = Literal["side", "layer", "head"]
MakePlan: TypeAlias = Callable[[str, Method], CachePlan]
"""The plan of a method under a name that files may have: from the config, or calibrated."""


class SideOption(NamedTuple):
    """One codec of one side, as the sensitivity profile isolates it.

    Attributes:
        label: ``K4``; with the family in front where a study has several: ``kvarn K4``.
        side: Keys or values.
        bits: Width of its codes.
        plan: A plan of the whole model that has it.
    """

    label: str
    side: Side
    bits: Width
    plan: CachePlan


class Family(NamedTuple):
    """Codecs that may go together: every key codec with every value codec."""

    keys: tuple[SideOption, ...]
    values: tuple[SideOption, ...]


class Candidates:
    """Every candidate of every packable layer, or of every head of them; exact is the first.

    Args:
        config: Transformers config of the model.
        families: What may be stored; labels must be unique.
        granularity: ``side``: keys and values of a layer apart; ``layer``: one width for both;
            ``head``: keys and values of every key/value head apart.

    Raises:
        ValueError: If no candidate is left, or heads of a layer could not be stored together.
    """

    def __init__(
        self, config: Any, families: Sequence[Family], *, granularity: Granularity = "side"
    ) -> None:
        self.config = config
        self.geometry = ModelGeometry.from_config(config)
        self.layers = _rows(self.geometry, granularity)
        """Rows of every table: the packable layers, or their heads."""
        is_joint = granularity == "layer"
        self.sides = tuple(option for each in families for side in each for option in side)
        self._pairs = [
            (key, value)
            for each in families
            for key, value in itertools.product(each.keys, each.values)
            if not is_joint or key.bits == value.bits
        ]
        if not self._pairs:
            raise ValueError(
                "granularity must be side where no method has one width for both sides, got layer"
            )
        packed = (Candidate(_joined(*pair), pair[0].label, pair[1].label) for pair in self._pairs)
        self.columns = (Candidate(EXACT_LABEL, None, None), *packed)
        if granularity == "head":
            _check_heads(families)

    def layer_plan(self, row: Row, column: int) -> LayerPlan:
        """Return how a candidate stores a layer of the model, or one head, as if it were alone."""
        if column == 0:
            return exact_layer()
        layer = place_of(row).layer
        key, value = (option.plan.layers[layer] for option in self._pairs[column - 1])
        return _with_codecs(key, HeadGroup(key=key.groups[0].key, value=value.groups[0].value))

    def row_geometry(self, row: Row) -> LayerGeometry:
        """Return the shape of what a row stores."""
        layer, head = place_of(row)
        whole = self.geometry.layers[layer]
        return whole if head is None else whole.model_copy(update={"num_key_value_heads": 1})

    def plan(self, choice: Choice) -> CachePlan:
        """Return the plan with one candidate per row; other layers stay stock."""
        columns: dict[int, list[int]] = {}
        for row, column in zip(self.layers, choice, strict=True):
            columns.setdefault(place_of(row).layer, []).append(column)
        return self._plan({layer: self._of_heads(layer, each) for layer, each in columns.items()})

    def _of_heads(self, layer: int, columns: Sequence[int]) -> LayerPlan:
        """A layer of one candidate, or of one for each head; heads of one candidate share it."""
        heads: dict[int, list[int]] = {}
        for head, column in enumerate(columns):
            heads.setdefault(column, []).append(head)
        plans = {column: self.layer_plan(layer, column) for column in heads}
        window = next((p for p in plans.values() if not p.is_exact), exact_layer())
        if len(plans) == 1:
            return window
        groups = [
            plans[column].groups[0].model_copy(update={"heads": tuple(named)})
            for column, named in heads.items()
        ]
        return _with_codecs(window, *groups)

    def isolated(self, row: Row, option: SideOption) -> CachePlan:
        """Return the plan that packs one side of one row and leaves all else exact."""
        layer, head = place_of(row)
        plan = option.plan.layers[layer]
        group, exact = plan.groups[0], Identity()
        alone = (
            HeadGroup(key=group.key, value=exact)
            if option.side == "key"
            else HeadGroup(key=exact, value=group.value)
        )
        others = set(range(self.geometry.layers[layer].num_key_value_heads)) - {head}
        if head is None or not others:
            return self._plan({layer: _with_codecs(plan, alone)})
        rest = HeadGroup(heads=tuple(sorted(others)), key=exact, value=exact)
        named = alone.model_copy(update={"heads": (head,)})
        return self._plan({layer: _with_codecs(plan, named, rest)})

    def labels(self, choice: Choice) -> tuple[str, ...]:
        """Return the label of every layer of the model; of heads that differ, one after another:
        ``K4V2 K2V2``."""
        found: dict[int, list[str]] = {}
        for row, column in zip(self.layers, choice, strict=True):
            found.setdefault(place_of(row).layer, []).append(self.columns[column].label)
        layers = range(self.geometry.num_hidden_layers)
        return tuple(_told(found.get(layer, [EXACT_LABEL])) for layer in layers)

    def _plan(self, packed: dict[int, LayerPlan]) -> CachePlan:
        layers = range(len(self.geometry.layers))
        return CachePlan.from_layers(
            self.config, (packed.get(layer, exact_layer()) for layer in layers)
        )


def _rows(geometry: ModelGeometry, granularity: Granularity) -> tuple[Row, ...]:
    if granularity != "head":
        return geometry.packable_layers
    return tuple(
        f"{layer}.{head}"
        for layer in geometry.packable_layers
        for head in range(geometry.layers[layer].num_key_value_heads)
    )


def _check_heads(families: Sequence[Family]) -> None:
    """Refuse candidates that heads of one layer cannot have at the same time."""
    plans = [option.plan for each in families for side in each for option in side]
    packed = [layer for plan in plans for layer in plan.layers if not layer.is_exact]
    windows = {(p.sink_tokens, p.residual_length, p.flush, p.quantum) for p in packed}
    if len(windows) > 1:
        raise ValueError(
            "granularity head must be given with methods that keep the same tokens exact, which "
            "heads of a layer share, got (sinks, residual, flush, block) of "
            f"{' and '.join(map(str, sorted(windows)))}"
        )
    if any(layer.arrays or len(layer.groups) > 1 for layer in packed):
        raise ValueError(
            "granularity head must be given with methods that store every head alike, got one "
            "with arrays fitted to all heads of a layer together"
        )


def _told(labels: Sequence[str]) -> str:
    return labels[0] if len(set(labels)) == 1 else " ".join(labels)


def _with_codecs(window: LayerPlan, *groups: HeadGroup) -> LayerPlan:
    """The sinks, residual and flush rule of one layer plan with other codecs."""
    return LayerPlan(
        groups=groups,
        sink_tokens=window.sink_tokens,
        residual_length=window.residual_length,
        flush=window.flush,
    )


def _joined(key: SideOption, value: SideOption) -> str:
    """``kvarn K4`` and ``kvarn V2`` to ``kvarn K4V2``."""
    return f"{key.label}V{value.bits}"


def of_mode(
    config: Any, mode: Mode, widths: Sequence[Width], *, granularity: Granularity = "side"
) -> Candidates:
    """Return every pair of ``widths`` in a mode, widest first, and the exact layer."""
    each = {bits: CachePlan.uniform(config, int(bits), int(bits), mode) for bits in _down(widths)}
    family = _family("", each.values(), each.values())
    return Candidates(config, [family], granularity=granularity)


def of_methods(
    config: Any,
    names: Sequence[str],
    widths: Sequence[Width],
    make: MakePlan | None = None,
    *,
    granularity: Granularity = "side",
) -> Candidates:
    """Return every pair of widths in each of several methods, and the exact layer.

    Args:
        config: Transformers config of the model.
        names: Methods, each with settings if they are not its own: ``kivi:sink_tokens=4``.
        widths: Code widths; a method takes those it has. A width that the settings name stays.
        make: Makes the plan of a method; from the config alone by default, which gives methods
            that have to be calibrated the right sizes but not the right levels.
        granularity: As for ``Candidates``.

    Raises:
        ValueError: If a method or setting does not exist, or has none of the widths.
    """
    _check_distinct(names)
    make = make or (lambda _, method: method.plan(config))
    prefixes = ["" if len(names) == 1 else f"{name} " for name in names]
    families = [
        _of_method(name, prefix, widths, make)
        for name, prefix in zip(names, prefixes, strict=True)
    ]
    return Candidates(config, families, granularity=granularity)


def check_names(names: Sequence[str], widths: Sequence[Width]) -> None:
    """Check methods, settings and widths without a model.

    Raises:
        ValueError: As ``of_methods``.
    """
    _check_distinct(names)
    for name in names:
        method, settings = _parsed(name)
        for pair in _width_pairs(name, method, settings, widths):
            build_method(method, **settings, **pair)


def _check_distinct(names: Sequence[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"candidates must be given once each, got {sorted(repeated)[0]!r} twice")


def _of_method(name: str, prefix: str, widths: Sequence[Width], make: MakePlan) -> Family:
    method, settings = _parsed(name)
    keys: dict[Width, CachePlan] = {}
    values: dict[Width, CachePlan] = {}
    for pair in _width_pairs(name, method, settings, widths):
        bits = "-".join(f"{width:g}" for width in pair.values())
        plan = make(f"{name}-{bits}" if bits else name, build_method(method, **settings, **pair))
        key, value = _bits(name, plan)
        keys.setdefault(key, plan)
        values.setdefault(value, plan)
    return _family(prefix, keys.values(), values.values())


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Read ``kivi:sink_tokens=4,flush=joint``; values are JSON where they are some, else text."""
    method, _, text = name.partition(":")
    if method not in METHODS:
        raise ValueError(f"candidates must be among {', '.join(METHODS)}, got {method!r}")
    settings: dict[str, Any] = {}
    for part in text.split(",") if ":" in name else ():
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise ValueError(
                f"candidates must be METHOD or METHOD:name=value,name=value, got {name!r}"
            )
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return method, settings


def _width_pairs(
    name: str, method: str, settings: dict[str, Any], widths: Sequence[Width]
) -> Iterator[dict[str, Width]]:
    """Yield settings of widths so that every key width and every value width is in one of them.

    Nothing for a side whose width is fixed; methods without a choice are made once.
    """
    fields = METHODS[method].model_fields
    build_method(method, **settings)  # a wrong setting is an error, a wrong width is left out
    free = {}
    for field in ("key_bits", "value_bits"):
        if field in fields and field not in settings:
            free[field] = [
                bits for bits in _down(widths) if _builds(method, settings | {field: bits})
            ]
            if not free[field]:
                raise ValueError(
                    f"widths must hold one that {name} has as {field}, "
                    f"got {', '.join(f'{bits:g}' for bits in widths)}"
                )
    for index in range(max(map(len, free.values()), default=1)):
        yield {field: each[min(index, len(each) - 1)] for field, each in free.items()}


def _builds(method: str, settings: dict[str, Any]) -> bool:
    try:
        build_method(method, **settings)
    except ValueError:
        return False
    return True


def _bits(name: str, plan: CachePlan) -> tuple[Width, Width]:
    """The widths of the packed layers, which must be alike to be one candidate."""
    found = {
        (group.key.bits, group.value.bits)
        for layer in plan.layers
        for group in layer.groups
        if not layer.is_exact
    }
    if len(found) != 1:
        raise ValueError(
            f"candidates must store every layer with one pair of widths, got {name!r}, which has "
            f"{len(found)}; the tuner chooses the pair of a layer"
        )
    return found.pop()


def _family(prefix: str, keys: Iterable[CachePlan], values: Iterable[CachePlan]) -> Family:
    def option(plan: CachePlan, side: Side) -> SideOption:
        group = next(layer for layer in plan.layers if not layer.is_exact).groups[0]
        bits = (group.key if side == "key" else group.value).bits
        return SideOption(f"{prefix}{side[0].upper()}{bits}", side, bits, plan)

    return Family(
        tuple(option(plan, "key") for plan in keys),
        tuple(option(plan, "value") for plan in values),
    )


def _down(widths: Sequence[Width]) -> list[Width]:
    return sorted(set(widths), reverse=True)
