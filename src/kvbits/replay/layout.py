"""Which entries share a scale: groups as views, to be written through."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor


def group_views(states: Tensor, axis: str, group_size: int) -> Iterator[Tensor]:
    """Yield the groups of ``[H, T, D]`` as views ``[..., values of a group]``.

    ``channel``: whole groups of consecutive tokens of one channel; what is left over of the tokens
    is in no group. ``token``: neighbouring channels of one token, heads side by side; a short last
    group is a group. A size of 0 or less takes the whole axis.
    """
    heads, tokens, channels = states.shape
    if axis == "channel":
        size = group_size if group_size > 0 else tokens
        whole = tokens - tokens % size if size else 0
        if whole:
            yield states[:, :whole].unflatten(1, (-1, size)).transpose(2, 3)
        return
    row = heads * channels
    size = min(group_size, row) if group_size > 0 else row
    whole = row - row % size
    # Groups may span heads, so the view must hold heads side by side.
    flat = states.transpose(0, 1).reshape(tokens, row)
    assert flat.data_ptr() == states.data_ptr(), "states must lie token by token"
    if tokens:
        yield flat[:, :whole].unflatten(1, (-1, size))
    if tokens and whole < row:
        yield flat[:, whole:]


def token_major(states: Tensor) -> Tensor:
    """``[H, T, D]`` in memory token by token, so that groups along ``token`` are views."""
    return states.transpose(0, 1).contiguous().transpose(0, 1)


def num_grouped_tokens(tokens: int, axis: str, group_size: int) -> int:
    """How many of ``tokens`` quantizable tokens lie in groups."""
    if axis == "token" or group_size <= 0:
        return tokens
    return tokens - tokens % group_size


def num_groups(heads: int, tokens: int, channels: int, axis: str, group_size: int) -> int:
    """Groups of ``tokens`` quantizable tokens."""
    if axis == "channel":
        size = group_size if group_size > 0 else max(tokens, 1)
        return heads * channels * (tokens // size)
    row = heads * channels
    return tokens * math.ceil(row / (group_size if group_size > 0 else row))
