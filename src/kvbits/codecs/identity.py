"""States kept as they are: the 16-bit end of every plan."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec


class Identity(Codec):
    """Store states unchanged, in the model's own dtype (16 bits nominal)."""

    kind: Literal["identity"] = "identity"

    @property
    def bits(self) -> int:
        """Nominal width; a float32 model really stores 32, which ``code_bits`` reports."""
        return 16

    @property
    def block_tokens(self) -> int:
        return 1

    @property
    def is_exact(self) -> bool:
        return True

    def code_bits(self, state_bits: int = 16) -> int:
        return state_bits

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return ()

    def check_head_dim(self, head_dim: int) -> None:
        """Any head_dim can be stored."""

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        return Encoded(states, {})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        return encoded.codes
