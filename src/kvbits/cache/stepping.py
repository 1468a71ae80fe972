"""Decode steps that stay on the device: one token a row, appended by a kernel.

How much of a row is packed follows from its length, and lengths lie on the device, so a step needs
nothing from the host but pages to write to. The host counts along and looks at the stores again
when something other than a step happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvbits.attention.states import KernelStates, StoreGroup
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import IntArray, LayerPlan


class Clock:
    """Tokens of a row, padding included: as the host counts them, and for kernels."""

    def __init__(self, device: torch.device) -> None:
        self.num_tokens = 0
        self.device_tokens = torch.zeros(1, dtype=torch.int32, device=device)

    def set(self, num_tokens: int) -> None:
        """Bring both to ``num_tokens``. A step of one is an addition, which a graph can replay."""
        if num_tokens == self.num_tokens + 1:
            self.device_tokens.add_(1)
        elif num_tokens != self.num_tokens:
            self.device_tokens.fill_(num_tokens)
        self.num_tokens = num_tokens

    def count_replayed(self, num_tokens: int) -> None:
        """Note that a captured graph has brought the device to ``num_tokens``."""
        self.num_tokens = num_tokens


class Clocks:
    """One clock per device, shared by the layers of a cache: they count the same tokens."""

    def __init__(self) -> None:
        self._clocks: dict[torch.device, Clock] = {}

    def on(self, device: torch.device) -> Clock:
        """The clock of a device."""
        return self._clocks.setdefault(device, Clock(device))


class Stepper:
    """The steps of one layer, from a moment on.

    Args:
        plan: The layer's plan; joint flush.
        groups: Page stores by head group; both sides of all groups hold the same tokens.
        sinks: Of keys and of values, ``[B, H_kv, S, D]``.
        rings: Exact tokens of keys and of values, ``[B, H_kv, C, D]``.
        padding: Left padding of every row.
        clock: Counts the tokens.
    """

    def __init__(
        self,
        plan: LayerPlan,
        groups: tuple[StoreGroup, ...],
        *,
        sinks: tuple[Tensor, Tensor],
        rings: tuple[Tensor, Tensor],
        padding: Sequence[int],
        clock: Clock,
    ) -> None:
        device = sinks[0].device
        self._plan = plan
        self._padding = np.asarray(padding, dtype=np.int64)
        self._floor = np.asarray(groups[0].key.lengths, dtype=np.int64)
        self._clock = clock
        self._room_until = 0
        self._states = KernelStates(
            groups=groups,
            sinks=sinks,
            tails=rings,
            is_ring=True,
            clock=clock.device_tokens,
            padding=_on(device, self._padding),
            floor=_on(device, self._floor),
            is_held=False,
            residual_length=plan.residual_length,
            quantum=plan.quantum,
            packed=self._floor.tolist(),
        )
        self.flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._limits = tuple(
            min(
                torch.finfo(sinks[0].dtype).max,
                *(store.codec.largest_magnitude(store.head_dim) for store in stores),
            )
            for stores in zip(*((group.key, group.value) for group in groups), strict=True)
        )

    def packed(self, num_tokens: int) -> IntArray:
        """Packed tokens of every row once it holds ``num_tokens``, padding included."""
        lengths = np.maximum(num_tokens - self._padding, 0)
        return np.maximum(self._floor, self._plan.packed_lengths(lengths).key)

    def append(self, key_states: Tensor, value_states: Tensor, num_tokens: int) -> KernelStates:
        """Append one token ``[B, H_kv, 1, D]`` to every row, which then holds ``num_tokens``."""
        from kvbits.attention.triton.quantize import append_token

        self._clock.set(num_tokens)
        if num_tokens > self._room_until:
            self._make_room(num_tokens)
        limits = (self._limits[0], self._limits[1])
        for group in self._states.groups:
            append_token(self._states, group, key_states, value_states, self.flags, limits)
        return self._states

    def count_replayed(self, num_tokens: int) -> None:
        """Note that a captured graph has appended up to ``num_tokens``."""
        self._clock.count_replayed(num_tokens)

    def expect_tokens(self, num_tokens: int) -> None:
        """Launch the next steps so that they suit rows of up to ``num_tokens``."""
        self._states = replace(self._states, packed=self.packed(num_tokens).tolist())

    def _make_room(self, num_tokens: int) -> None:
        """Give every row as many pages as the longest needs by now, and find out when that ends.

        The pool has them anyway, and tables are built anew once a page, not once a page and row.
        """
        longest = self.packed(num_tokens).max(initial=0)
        for store in self._stores():
            counts = longest - np.asarray(store.lengths)
            store.make_room(list(range(len(counts))), np.maximum(counts, 0).tolist())
        room = np.min([store.room for store in self._stores()], axis=0)
        plan = self._plan
        last = room + plan.sink_tokens + plan.residual_length + plan.quantum - 1
        self._room_until = int((last + self._padding).min())
        self.expect_tokens(num_tokens)

    def _stores(self) -> list[PageStore]:
        return [store for group in self._states.groups for store in (group.key, group.value)]


def _on(device: torch.device, numbers: IntArray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32)).to(device, non_blocking=True)
