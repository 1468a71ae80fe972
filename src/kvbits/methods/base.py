"""What a method is: a published recipe that turns a model into a cache plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.plan import CachePlan
from kvbits.plan.loading import one_sentence
from kvbits.plan.modes import exact_layer
from kvbits.plan.provenance import Provenance

Progress = Callable[[], None]


class Method(BaseModel, ABC):
    """A recipe with its settings; immutable, and the same for every model.

    Attributes:
        name: What users call it.
        source: Where it was published.
        calibration: What it needs beside the config.
        differs: What is not as published, one sentence each.
        widths: Bits of a code, where no field lists them.
        exact_layers: Layers at either end of the model that stay exact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ClassVar[str]
    source: ClassVar[str]
    calibration: ClassVar[str] = "none"
    differs: ClassVar[tuple[str, ...]] = ()
    widths: ClassVar[str] = ""

    exact_layers: int = Field(default=0, ge=0)

    @property
    def needs_data(self) -> bool:
        """Whether ``calibrate`` needs the model's weights and text, under these settings."""
        return False

    @property
    def passes(self) -> int:
        """Times ``calibrate`` runs over the documents, if it needs them."""
        return 1

    @abstractmethod
    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        """How one packable layer is stored.

        Args:
            layer: The layer.
            config: The transformers config of the model.
        """

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        """The plan of a model, fitted to what it does on some documents if the method does that.

        Args:
            model: A causal language model of transformers.
            documents: Token ids ``[T]`` each.
            progress: Called after every document, in every pass.

        Raises:
            CalibrationError: If there is too little text, or states are not finite.
            PlanError: If the method does not suit the model's head dimensions.
        """
        return self.plan(model.config)

    def plan(self, config: Any) -> CachePlan:
        """The plan of a model by its config alone; layers that cannot be packed stay.

        Raises:
            ValueError: If settings do not fit each other.
            PlanError: If the method does not suit the model's head dimensions.
            UnsupportedModelError: If the method needs to know what the config does not say.
        """
        layers = ModelGeometry.from_config(config).layers
        ends = {*range(self.exact_layers), *range(len(layers) - self.exact_layers, len(layers))}
        try:
            plans = [
                self.layer_plan(layer, config)
                if layer.is_packable and index not in ends
                else exact_layer()
                for index, layer in enumerate(layers)
            ]
        except ValidationError as error:  # settings that are fine one by one
            raise ValueError(one_sentence(error)) from None
        return CachePlan.from_layers(config, plans, Provenance(method=self.name))
