"""What an exporter is: an engine's formats, and how it is told which layer gets which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from kvbits import memory
from kvbits.errors import PlanError
from kvbits.export.choosing import Reach, choose
from kvbits.export.formats import Format, family, widest
from kvbits.layer_plan import SIDES, LayerPlan
from kvbits.plan import CachePlan, summary


class LayerChange(NamedTuple):
    """What becomes of one layer.

    Attributes:
        layer: Its index in the model.
        wanted: Its widths in the plan, such as ``K4V2``.
        format: What the engine calls the format it gets.
        plan_bits: Effective bits in the plan.
        engine_bits: Effective bits in the engine.
        changes: What differs, a few words each.
    """

    layer: int
    wanted: str
    format: str
    plan_bits: float
    engine_bits: float
    changes: tuple[str, ...]


class Settings(NamedTuple):
    """What an engine is told: arguments of its command line, and files by name."""

    arguments: tuple[str, ...] = ()
    files: Mapping[str, str] = MappingProxyType({})


class Export(NamedTuple):
    """A plan in an engine's terms.

    Attributes:
        engine: The engine's name.
        settings: What it is told.
        layers: What becomes of every packable layer.
        plan_bits: Effective bits of the plan, long context.
        engine_bits: The same in the engine.
        losses: What is lost throughout, one sentence each.
        notes: What to know before use, one sentence each.
    """

    engine: str
    settings: Settings
    layers: tuple[LayerChange, ...]
    plan_bits: float
    engine_bits: float
    losses: tuple[str, ...]
    notes: tuple[str, ...]


class Engine(ABC):
    """An engine that kvbits exports to; it holds no state.

    Attributes:
        name: What users call it.
        checked: What its names were checked against.
        formats: How it can store a layer, beside ``exact``.
        exact: Its name for unchanged states.
        reach: What may differ within a model.
        keeps_windows: Whether sinks and the newest tokens can stay exact.
        notes: What to know before use, one sentence each.
        offers: Its formats in words, where a list would be long.
    """

    name: ClassVar[str]
    checked: ClassVar[str]
    formats: ClassVar[tuple[Format, ...]]
    exact: ClassVar[Format]
    reach: ClassVar[Reach]
    keeps_windows: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = ()
    offers: ClassVar[str] = ""

    @abstractmethod
    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        """What the engine is told to give every layer its format."""

    def check(self, plan: CachePlan) -> None:
        """Raise ``PlanError`` where the engine cannot hold the model at all."""
        for index in plan.model.packable_layers:
            layer = plan.model.layers[index]
            if layer.key_head_dim != layer.value_head_dim:
                raise PlanError(
                    f"layers[{index}] must have keys and values of one head_dim for {self.name}, "
                    f"got {layer.key_head_dim} and {layer.value_head_dim}"
                )

    def always_exact(self, format: Format, plan: CachePlan) -> frozenset[int]:
        """Layers the engine leaves exact whatever it is told."""
        return frozenset()

    def choose(self, plan: CachePlan, *, allow_narrower: bool) -> list[Format]:
        """The nearest format of every layer."""
        return choose(
            plan,
            self.formats,
            self.exact,
            self.reach,
            lambda format: self.always_exact(format, plan),
            allow_narrower=allow_narrower,
        )

    def losses(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        """What is lost throughout, one sentence each."""
        return [] if self.keeps_windows else window_losses(plan)

    def notes_on(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        """What to know before use, one sentence each."""
        return list(self.notes)

    def export(self, plan: CachePlan, *, allow_narrower: bool = False) -> Export:
        """Put a plan in the engine's terms.

        Args:
            plan: The plan.
            allow_narrower: Whether codes may be narrower than the plan's.

        Raises:
            PlanError: If the engine cannot hold the model, or has no format that packs anything.
        """
        self.check(plan)
        formats = self.choose(plan, allow_narrower=allow_narrower)
        packable = plan.model.packable_layers
        stored = sum(formats[i].stored_bits(plan.model.layers[i]) for i in packable)
        values = sum(plan.model.layers[i].values_per_token for i in packable)
        return Export(
            engine=self.name,
            settings=self.settings(formats, plan),
            layers=tuple(self._change(plan, index, formats[index]) for index in packable),
            plan_bits=plan.effective_bits,
            engine_bits=float(Fraction(stored) / values) if values else plan.effective_bits,
            losses=tuple(self.losses(formats, plan)),
            notes=tuple(self.notes_on(formats, plan)),
        )

    def changes(self, wanted: LayerPlan, format: Format) -> list[str]:
        """What differs between a layer of the plan and a format, a few words each."""
        changes = []
        for side in SIDES:
            codec, offered = widest(wanted, side), format.side(side)
            if offered.bits != codec.bits:
                changes.append(f"{side}s {codec.bits} → {offered.bits} bits")
            if not (codec.is_exact or offered.is_exact):
                if family(codec) != offered.family:
                    changes.append(f"{side}s {family(codec)} → {offered.family}")
                if codec.block_tokens > 1:
                    changes.append(f"{side} scales per channel → per token")
        if len(wanted.groups) > 1:
            changes.append("heads alike, as the widest")
        return changes

    def _change(self, plan: CachePlan, index: int, format: Format) -> LayerChange:
        wanted, layer = plan.layers[index], plan.model.layers[index]
        return LayerChange(
            index,
            summary.layer_name(wanted),
            format.name,
            float(memory.layer_effective_bits(wanted, layer)),
            float(format.stored_bits(layer) / layer.values_per_token),
            tuple(self.changes(wanted, format)),
        )


def window_losses(plan: CachePlan) -> list[str]:
    """Say which exact tokens of a plan there will not be."""
    packed = [p for p in plan.layers if not p.is_exact]
    losses = []
    for words, lengths in (
        ("first", {layer.sink_tokens for layer in packed}),
        ("newest", {layer.residual_length for layer in packed}),
    ):
        if max(lengths, default=0) > 0:
            losses.append(f"the {words} {max(lengths)} tokens of a sequence do not stay exact")
    return losses


def holds_other_layers(plan: CachePlan) -> bool:
    """Whether layers that kvbits leaves alone, such as sliding ones, cache states too."""
    return any(layer.holds_states and not layer.is_packable for layer in plan.model.layers)
