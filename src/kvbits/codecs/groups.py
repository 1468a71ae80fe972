"""Groups of values that share a scale: channels of a token, or tokens of a channel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.base import Codec, ParameterSpec


class Grouped(Codec):
    """What codecs with a scale per group share; not one by itself.

    ``granularity="per_token"`` shares a scale along ``head_dim`` in groups of ``group_size``
    channels (default: all of them); ``"per_channel"`` shares it along ``group_size`` tokens.

    Raises:
        ValueError: If ``group_size`` is missing for per-channel codes or is not positive.
    """

    granularity: Literal["per_token", "per_channel"] = "per_token"
    group_size: int | None = None

    @model_validator(mode="after")
    def _check_group_size(self) -> Grouped:
        if self.group_size is None:
            if self.granularity == "per_channel":
                raise ValueError(
                    "group_size must be given when granularity='per_channel', got None"
                )
        elif self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        return self

    @property
    def block_tokens(self) -> int:
        return self.group_size or 1 if self.granularity == "per_channel" else 1

    def check_head_dim(self, head_dim: int) -> None:
        group = self._channels_per_group(head_dim)
        if self.granularity == "per_token" and head_dim % group:
            raise ValueError(
                f"group_size must divide head_dim={head_dim}, got {self.group_size}; "
                "use None for one group per token and head"
            )

    def _affine_spec(self, head_dim: int, components: int, dtype: torch.dtype) -> ParameterSpec:
        """Scale and, as a second component, offset of every group."""
        if self.granularity == "per_channel":
            return ParameterSpec("affine", "block", head_dim, components, dtype, self.block_tokens)
        rows = head_dim // self._channels_per_group(head_dim)
        return ParameterSpec("affine", "token", rows, components, dtype)

    def _channels_per_group(self, head_dim: int) -> int:
        return self.group_size or head_dim

    def grouped(self, x: Tensor) -> Tensor:
        """Bring each group to the last axis: ``[B, H_kv, N, rows, values of the group]``."""
        if self.granularity == "per_token":
            return x.unflatten(-1, (-1, self._channels_per_group(x.shape[-1])))
        return x.unflatten(-2, (-1, self.block_tokens)).transpose(-1, -2)

    def _ungrouped(self, grouped: Tensor, num_tokens: int) -> Tensor:
        if self.granularity == "per_token":
            return grouped.flatten(-2)
        return grouped.transpose(-1, -2).flatten(-3, -2)


def check_whole_bytes(head_dim: int, bits: int) -> None:
    """Raise ``ValueError`` unless the codes of a token fill whole bytes.

    Byte w of a row holds channels w, w + NB, w + 2 NB, ...
    """
    multiple = 8 if bits == 3 else 8 // bits
    if head_dim % multiple:
        raise ValueError(
            f"head_dim must be a multiple of {multiple} for bits={bits}, got {head_dim}"
        )
