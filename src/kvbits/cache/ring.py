"""Exact states of a layer's newest tokens, where a step can add one without moving the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ring:
    """Exact states by row position: position p of a row lies in slot ``p % capacity``.

    Positions count from a row's first real token, so that rows with different padding work alike.
    What the slots of other positions hold is unspecified.

    Args:
        states: Any states of the side, ``[B, H, T, D]``, for shape, dtype and device.
        capacity: Tokens it has room for.
    """

    def __init__(self, states: Tensor, capacity: int) -> None:
        batch, num_heads, _, head_dim = states.shape
        self.buffer = states.new_zeros(batch, num_heads, capacity, head_dim)

    @property
    def capacity(self) -> int:
        """Tokens it has room for."""
        return int(self.buffer.shape[2])

    def window(self, padding: Sequence[int], num_tokens: int, width: int) -> Tensor:
        """The newest ``width`` of ``num_tokens`` tokens of every row: ``[B, H, width, D]``."""
        if width == 0:
            return self.buffer[:, :, :0]
        slots = self._slots(padding, num_tokens, width)
        if slots.ndim == 1:
            return self.buffer.index_select(2, slots)
        return self.buffer.gather(2, self._expanded(slots))

    def store(self, states: Tensor, padding: Sequence[int], num_tokens: int) -> None:
        """Keep ``[B, H, width, D]`` as the newest of ``num_tokens`` tokens; grows to hold them."""
        width = states.shape[2]
        if width > self.capacity:
            self.buffer = self.buffer.new_zeros(*self.buffer.shape[:2], width, states.shape[3])
        if width == 0:
            return
        slots = self._slots(padding, num_tokens, width)
        if slots.ndim == 1:
            self.buffer.index_copy_(2, slots, states)
        else:
            self.buffer.scatter_(2, self._expanded(slots), states)

    def _slots(self, padding: Sequence[int], num_tokens: int, width: int) -> Tensor:
        """Slots of the newest tokens: ``[width]``, or ``[B, width]`` where padding differs.

        Positions before a row's first token get slots too: no two of a window share one.
        """
        device = self.buffer.device
        position = torch.arange(num_tokens - width, num_tokens, device=device)
        if len(set(padding)) == 1:
            return (position - padding[0]) % self.capacity
        shift = torch.tensor(list(padding), device=device)
        return (position - shift[:, None]) % self.capacity

    def _expanded(self, slots: Tensor) -> Tensor:
        _, num_heads, _, head_dim = self.buffer.shape
        return slots[:, None, :, None].expand(-1, num_heads, -1, head_dim)
