"""What codecs that wrap another codec share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.arrays import Array
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec, Width

if TYPE_CHECKING:
    from kvbits.codecs import AnyCodec

PROBE_DIM = 512  # parameter names do not depend on it


class Wrapper(Codec):
    """A codec that does something to states before another codec encodes them.

    Raises:
        ValueError: If the inner codec is exact, or both store a parameter of one name.
    """

    kind: str
    inner: AnyCodec

    @model_validator(mode="after")
    def _check_inner(self) -> Wrapper:
        if self.inner.is_exact:
            raise ValueError(f"inner must not be exact, got {self.inner!r}")
        inner = {spec.name for spec in self.inner.parameter_specs(PROBE_DIM)}
        both = inner & {spec.name for spec in self.own_specs(PROBE_DIM)}
        if both:
            raise ValueError(f"inner must not store {sorted(both)[0]!r} too, got {self.inner!r}")
        return self

    def own_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        """Parameters stored beside those of the inner codec."""
        return ()

    @property
    def summary(self) -> str:
        """Kinds alone: ``rotated(norm_scaled)``."""
        inner = self.inner.summary if isinstance(self.inner, Wrapper) else self.inner.kind
        return f"{self.kind}({inner})"

    @property
    def bits(self) -> Width:
        """Nominal width of the inner codec."""
        return self.inner.bits

    @property
    def block_tokens(self) -> int:
        return self.inner.block_tokens

    @property
    def needs_positions(self) -> bool:
        return self.inner.needs_positions

    def largest_magnitude(self, head_dim: int) -> float:
        return self.inner.largest_magnitude(head_dim)

    def constants(self, head_dim: int) -> tuple[Tensor, ...]:
        return self.inner.constants(head_dim)

    def code_bits(self, state_bits: int = 16) -> Width:
        return self.inner.code_bits(state_bits)

    def check_head_dim(self, head_dim: int) -> None:
        self.inner.check_head_dim(head_dim)

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.inner.arrays

    def check_arrays(self, num_heads: int, head_dim: int) -> None:
        self.inner.check_arrays(num_heads, head_dim)

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (*self.inner.parameter_specs(head_dim), *self.own_specs(head_dim))

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        return self.inner.encode(self.apply(states.float(), context), context)

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        return self.undo(self.inner.decode(encoded, context), context)

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        """What the inner codec encodes in place of ``states``, float32."""
        raise NotImplementedError

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        """Undo ``apply``."""
        raise NotImplementedError
