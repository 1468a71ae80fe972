"""The two libraries behind KVTuner's and transformers' quantized caches."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvbits.codecs import AnyCodec, Hqq, Quanto
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.memory import head_dim
from kvbits.methods.base import Method

Granularity = Literal["per_token", "per_channel"]
DIFFERS: tuple[str, ...] = (
    "a token is encoded once; the caches encode all of them again at every flush",
    "groups lie within a token or channel of one head",
)


class Backend(Method):
    """Both sides by one library, in groups along the channels or along the tokens.

    The subclasses say which widths there are.
    """

    differs: ClassVar[tuple[str, ...]] = DIFFERS

    key_bits: Any
    value_bits: Any
    key_granularity: Granularity = "per_token"
    value_granularity: Granularity = "per_token"
    group_size: int = Field(default=64, ge=1)
    residual_length: int = Field(default=128, ge=0)
    sink_tokens: int = Field(default=0, ge=0)

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        key = self._settings(self.key_bits, self.key_granularity, head_dim(layer, "key"))
        value = self._settings(self.value_bits, self.value_granularity, head_dim(layer, "value"))
        return LayerPlan.uniform(
            self.codec(**key),
            self.codec(**value),
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )

    def _settings(self, bits: int, granularity: Granularity, width: int) -> dict[str, Any]:
        """Fields of a codec; heads that are no multiple of the group share one scale a token."""
        is_whole = granularity == "per_token" and width % self.group_size
        group = None if is_whole else self.group_size
        return {"bits": bits, "granularity": granularity, "group_size": group}

    @abstractmethod
    def codec(self, **settings: Any) -> AnyCodec:
        """The codec of one side."""


class QuantoBackend(Backend):
    """optimum-quanto's 2 and 4 bits, as transformers' quantized cache uses them."""

    name: ClassVar = "quanto"
    source: ClassVar = "optimum-quanto; pip install 'kvbits[quanto]'"

    key_bits: Literal[2, 4] = 4
    value_bits: Literal[2, 4] = 4

    def codec(self, **settings: Any) -> AnyCodec:
        return Quanto(**settings)


class HqqBackend(Backend):
    """HQQ, which moves zero points until large errors are few."""

    name: ClassVar = "hqq"
    source: ClassVar = "HQQ, mobiusml.github.io/hqq_blog; pip install 'kvbits[hqq]'"
    differs: ClassVar[tuple[str, ...]] = (
        *DIFFERS,
        "a call holds 64 tokens, or one group of tokens, of one head",
    )

    key_bits: Literal[2, 3, 4, 8] = 4
    value_bits: Literal[2, 3, 4, 8] = 4

    def codec(self, **settings: Any) -> AnyCodec:
        return Hqq(**settings)
