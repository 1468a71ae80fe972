"""What a codec is: a frozen, serialisable description of how states are stored.

A codec turns states ``[B, H_kv, T, D]`` into integer codes of the same shape and a few named
parameters (scales, offsets). It knows nothing about bytes or pages: ``codecs/packing.py`` does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvbits.codecs.arrays import Array

Width = int | float
TERNARY_BITS = 1.5


class ParameterSpec(NamedTuple):
    """One named parameter of a codec, as the page store must keep it.

    ``axis`` says what owns a value: every token, or every block of ``block_tokens`` tokens, by
    which the codec's own block can be divided.
    Tensors are ``[B, H_kv, N, rows, components]`` with N tokens or N blocks.
    """

    name: str
    axis: Literal["token", "block"]
    rows: int
    components: int
    dtype: torch.dtype
    block_tokens: int = 1

    @property
    def bits_per_item(self) -> int:
        """Stored bits for one token or one block of one head."""
        return self.rows * self.components * self.dtype.itemsize * 8


class Encoded(NamedTuple):
    """Codes ``[B, H_kv, T, D]`` (uint8; the states themselves when exact) and their parameters."""

    codes: Tensor
    parameters: dict[str, Tensor]


class EncodeContext(NamedTuple):
    """What a codec may know of states beside the states themselves.

    Attributes:
        positions: Row positions of the tokens, int64 ``[B or 1, T]``; needed by codecs that undo
            the rotary embedding.
    """

    positions: Tensor | None = None


NO_CONTEXT = EncodeContext()


class Codec(BaseModel, ABC):
    """How a block of states is stored; immutable, tagged by ``kind`` so that plans are readable.

    Subclasses declare ``kind: Literal["..."]`` and ``bits``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def summary(self) -> str:
        """The codec in a message."""
        return repr(self)

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens that must be encoded together: 1 per token, G per channel."""

    @property
    def is_exact(self) -> bool:
        """Whether decoding returns the very states that were encoded."""
        return False

    @property
    def needs_positions(self) -> bool:
        """Whether ``encode`` and ``decode`` read the positions of their context."""
        return False

    def largest_magnitude(self, head_dim: int) -> float:
        """Largest absolute value of a state that can be stored; more is refused."""
        return math.inf

    def largest_norm(self, head_dim: int) -> float:
        """Largest Euclidean norm of a token that can be stored, whatever its direction."""
        return self.largest_magnitude(head_dim)

    def rotation(self, head_dim: int, device: torch.device) -> Tensor | None:
        """The orthogonal matrix M, float32 ``[D, D]``, if the codec stores states @ M.

        Attention may then turn the query and its output instead of every state.
        """
        return None

    def constants(self, head_dim: int) -> tuple[Tensor, ...]:
        """Numbers that a kernel which encodes reads beside states, from the outermost codec on."""
        return ()

    @abstractmethod
    def code_bits(self, state_bits: int = 16) -> Width:
        """Stored width of one code, 1.5 for three levels; ``state_bits`` is the width of the
        states' own dtype."""

    def row_bytes(self, head_dim: int, state_bits: int = 16) -> int:
        """Bytes of the codes of one token and head; three levels go five to a byte."""
        bits = self.code_bits(state_bits)
        return -(-head_dim // 5) if bits == TERNARY_BITS else int(head_dim * bits) // 8

    @abstractmethod
    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        """The parameters stored beside the codes, for states of ``head_dim`` channels."""

    @abstractmethod
    def check_head_dim(self, head_dim: int) -> None:
        """Raise ``ValueError`` if states of ``head_dim`` channels cannot be stored."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What the codec was fitted with, beside its numbers."""
        return ()

    def check_arrays(self, num_heads: int, head_dim: int) -> None:
        """Raise ``ValueError`` if the arrays do not suit heads of ``head_dim`` channels."""

    def check_heads(self, num_heads: int, head_dim: int) -> None:
        """Raise ``ValueError`` if states of such heads cannot be stored."""
        self.check_head_dim(head_dim)
        self.check_arrays(num_heads, head_dim)

    @abstractmethod
    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        """Encode ``[B, H_kv, T, D]``, T a multiple of ``block_tokens``, in float32 arithmetic."""

    @abstractmethod
    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        """Return states ``[B, H_kv, T, D]``: float32, or the stored dtype when exact."""

    def stored_bits(self, head_dim: int, state_bits: int = 16) -> Fraction:
        """Exact bits per stored value, parameters included (page rounding is not)."""
        total = Fraction(8 * self.row_bytes(head_dim, state_bits), head_dim)
        for spec in self.parameter_specs(head_dim):
            total += Fraction(spec.bits_per_item, spec.block_tokens * head_dim)
        return total
