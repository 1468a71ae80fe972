"""What engines share that know one format for a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvbits.export.base import Engine, holds_other_layers
from kvbits.export.formats import Format
from kvbits.plan import CachePlan


class WholeModel(Engine):
    """An engine with one setting for all layers; not one by itself."""

    reach: ClassVar = "model"

    def only(self, formats: Sequence[Format], plan: CachePlan) -> Format:
        """The format of all layers."""
        packable = plan.model.packable_layers
        return formats[packable[0]] if packable else self.exact

    def losses(self, formats: Sequence[Format], plan: CachePlan) -> list[str]:
        losses = super().losses(formats, plan)
        format = self.only(formats, plan)
        if not format.is_exact and holds_other_layers(plan):
            losses.append(f"layers the plan leaves to the stock cache become {format.name} too")
        return losses
