"""Codes that another library computes: optimum-quanto and HQQ, as transformers' cache has them.

A library gives codes, scales and offsets of a block; they lie in pages like those of ``Affine``,
and reading them back needs no library.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.affine import Affine
from kvbits.codecs.base import NO_CONTEXT, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.groups import Grouped
from kvbits.errors import MissingLibraryError


class Quantized(NamedTuple):
    """Blocks as a library encodes them: codes ``[n, groups, values]``, scale and offset
    ``[n, groups, 1]``."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


class External(Grouped):
    """Groups of values that a library quantizes: ``x ≈ codes * scale + offset``.

    What the subclasses share; not one by itself. Scale and offset are rounded to
    ``parameter_dtype`` once the codes are computed, so that a decoded state is off from the
    library's own by that rounding: ``2**-11`` of ``codes * scale`` and of the offset in float16.
    """

    bits: Any
    parameter_dtype: Literal["float16", "float32"] = "float16"

    @property
    def stored_as(self) -> Affine:
        """The codec that reads what is stored."""
        return Affine(
            bits=self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            parameter_dtype=self.parameter_dtype,
        )

    def largest_magnitude(self, head_dim: int) -> float:
        return self.stored_as.largest_magnitude(head_dim) / 2  # leaves a moved offset room

    def code_bits(self, state_bits: int = 16) -> int:
        return int(self.bits)

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return self.stored_as.parameter_specs(head_dim)

    def check_head_dim(self, head_dim: int) -> None:
        self.stored_as.check_head_dim(head_dim)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        grouped = self.grouped(states.float())  # [B, H_kv, N, rows, values]
        tokens = self.block_tokens if self.granularity == "per_token" else 1
        blocks = grouped.reshape(-1, tokens * grouped.shape[-2], grouped.shape[-1])
        # In one layout, so that the order of a library's sums never shows in what is stored.
        found = self.quantized(blocks.contiguous())
        scale, offset = (x.reshape(*grouped.shape[:-1], 1) for x in (found.scale, found.offset))
        spec = self.parameter_specs(states.shape[-1])[0]
        codes = found.codes.to(torch.uint8).reshape(grouped.shape)
        return Encoded(
            self._ungrouped(codes, states.shape[-2]),
            {"affine": torch.cat((scale, offset), -1).to(spec.dtype)},
        )

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        return self.stored_as.decode(encoded, context)

    @abstractmethod
    def quantized(self, blocks: Tensor) -> Quantized:
        """What the library makes of blocks of one head each, ``[n, groups, values]``."""


class Quanto(External):
    """optimum-quanto's affine quantizer with the scales of its ``MaxOptimizer``.

    Source: optimum-quanto, as transformers' ``QuantoQuantizedLayer`` calls it.
    Differs from the library: where all values of a group are equal, it divides by a scale of 0;
    the code is 0 then.

    Raises:
        MissingLibraryError: On encoding, if optimum-quanto is not installed.
    """

    kind: Literal["quanto"] = "quanto"
    bits: Literal[2, 4]

    def quantized(self, blocks: Tensor) -> Quantized:
        quanto = library("optimum.quanto", "quanto")
        qtype = quanto.qint4 if self.bits == 4 else quanto.qint2
        groups = blocks.flatten(0, 1)
        scale, shift = quanto.MaxOptimizer().optimize(groups, qtype, 0)
        codes = torch.ops.quanto.quantize_affine(groups, self.bits, 0, None, scale, shift)
        codes = torch.where(scale == 0, 0, codes)
        return Quantized(*(x.unflatten(0, blocks.shape[:2]) for x in (codes, scale, -shift)))


class Hqq(External):
    """HQQ's quantizer, which moves zero points until large errors are few.

    It stops for all groups of a call at once, so a call holds the tokens of one block of one head:
    what is stored does not depend on who shares a batch. A block has ``tile_tokens`` where scales
    are per token, ``group_size`` where they are per channel.

    Source: HQQ (half-quadratic quantization), as transformers' ``HQQQuantizedLayer`` calls it.
    Differs from the library: an offset ``-zero * scale`` is stored in place of the zero point.

    Raises:
        MissingLibraryError: On encoding, if hqq is not installed.
    """

    kind: Literal["hqq"] = "hqq"
    bits: Literal[2, 3, 4, 8]
    tile_tokens: int = Field(default=64, ge=1)

    @property
    def block_tokens(self) -> int:
        return self.tile_tokens if self.granularity == "per_token" else super().block_tokens

    def quantized(self, blocks: Tensor) -> Quantized:
        quantizer = library("hqq.core.quantize", "hqq").Quantizer
        found = []
        for block in blocks.unbind():
            codes, meta = quantizer.quantize(
                block,
                nbits=self.bits,
                group_size=block.shape[-1],
                axis=1,
                bitpack=False,
                device=str(block.device),
            )
            found.append(Quantized(codes, meta["scale"], -meta["zero"] * meta["scale"]))
        return Quantized(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def library(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        MissingLibraryError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(
            f"{module} must be installed to encode states with it, got {error}; "
            f"pip install 'kvbits[{extra}]'"
        ) from error
