"""What attention sees of one layer, and the tensor handle that carries it through a model.

Positions are *row positions*: they count a row's real tokens from 0, left padding excluded,
because sinks, groups and pages start at the first real token. Row position p is logical position
``p + padding[row]`` of the model's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvbits.codecs.pages import PageStore
from kvbits.errors import UnsupportedModelError
from kvbits.layer_plan import IntArray, Side


@dataclass(frozen=True, kw_only=True)
class SideStates:
    """Keys or values of one layer.

    Attributes:
        stores: Packed states and the heads each store holds (None: all heads, in order). Token i
            of a store is row position ``num_sinks + i``.
        sinks: Exact first tokens ``[B, H_kv, S, D]``, by row position; zero wide without sinks.
        tail: Exact newest tokens ``[B, H_kv, W, D]``; its last column is the newest token.
        decoded_until: ``[B, Q]``. A query sees row positions from S up to this one decoded, and
            all others exact.
    """

    stores: Sequence[tuple[PageStore, Tensor | None]]
    sinks: Tensor
    tail: Tensor
    decoded_until: IntArray

    def decoded(self, start: int, stop: int) -> Tensor:
        """Decoded states of row positions ``start`` to ``stop``: ``[B, H_kv, T, D]``."""
        first = self.sinks.shape[-2]
        parts = [store.read(start - first, stop - first) for store, _ in self.stores]
        if len(parts) == 1:
            return parts[0]
        heads = torch.cat([heads for _, heads in self.stores if heads is not None])
        return torch.cat(parts, 1)[:, heads.argsort()]


@dataclass(frozen=True, kw_only=True)
class LayerStates:
    """All states of one layer at the time of one attention call.

    Attributes:
        key: Key side.
        value: Value side.
        num_tokens: Tokens in the cache, padding included, queries included.
        padding: Left padding of every row, in tokens.
        impl: Which attention may run: ``reference``, ``triton`` or ``auto``.
    """

    key: SideStates
    value: SideStates
    num_tokens: int
    padding: Sequence[int]
    impl: str = "reference"

    @property
    def num_heads(self) -> int:
        """Key/value heads."""
        return int(self.key.tail.shape[1])

    @property
    def num_queries(self) -> int:
        """Queries this view was made for."""
        return int(self.key.decoded_until.shape[1])

    @property
    def row_lengths(self) -> IntArray:
        """Real tokens of every row, ``[B]``."""
        return np.maximum(self.num_tokens - np.asarray(self.padding, dtype=np.int64), 0)

    def side(self, side: Side) -> SideStates:
        """One of the two sides."""
        return self.key if side == "key" else self.value

    def exact(self, side: Side, start: int, stop: int) -> Tensor:
        """Exact states of row positions ``start`` to ``stop``, ``[B, H_kv, stop - start, D]``.

        Only what the sinks or the tail hold; other places hold unspecified finite values.
        """
        states = self.side(side)
        num_sinks = states.sinks.shape[-2]
        if stop <= num_sinks:
            return states.sinks[:, :, start:stop]
        if start < num_sinks:
            parts = (self.exact(side, start, num_sinks), self.exact(side, num_sinks, stop))
            return torch.cat(parts, -2)
        offset = states.tail.shape[-2] - self.num_tokens  # logical position to column of the tail
        if not any(self.padding):
            begin, end = max(start + offset, 0), max(stop + offset, 0)
            missing = (stop - start) - (end - begin)
            inner = states.tail[:, :, begin:end]
            return torch.nn.functional.pad(inner, (0, 0, missing, 0)) if missing else inner
        shifts = torch.tensor(list(self.padding), device=states.tail.device)[:, None] + offset
        column = torch.arange(start, stop, device=states.tail.device) + shifts  # [B, T]
        return take_columns(states.tail, column)

    def dense(self, side: Side, start: int = 0, stop: int | None = None) -> Tensor:
        """Materialise logical positions ``start`` to ``stop``: ``[B, H_kv, stop - start, D]``.

        Padding is zero. Every query must see the same tokens decoded.

        Raises:
            UnsupportedModelError: If queries differ in what they see decoded.
        """
        states, stop = self.side(side), self.num_tokens if stop is None else stop
        until = states.decoded_until
        if (until != until[:, :1]).any():
            raise UnsupportedModelError(
                "quantize_prefill must be used with kvbits attention or one token at a time, got "
                f"{self.num_queries} tokens in another attention; call kvbits.enable(model) first"
            )
        if not any(self.padding):
            return self._rows(side, start, stop, until[:, 0])
        shift = torch.tensor(list(self.padding), device=states.tail.device)
        rows = self._rows(side, 0, int(self.row_lengths.max(initial=0)), until[:, 0])
        position = torch.arange(start, stop, device=shift.device) - shift[:, None]
        return take_columns(rows, position)

    def _rows(self, side: Side, start: int, stop: int, until: IntArray) -> Tensor:
        """States by row position, decoded below ``until [B]`` and exact above."""
        states = self.side(side)
        num_sinks = states.sinks.shape[-2]
        low, high = max(start, num_sinks), min(stop, int(until.max(initial=0)))
        exact = self.exact(side, start, stop)
        if low >= high:
            return exact
        decoded = states.decoded(low, high).to(exact.dtype)
        boundary = torch.tensor(until, device=exact.device)[:, None]
        is_decoded = torch.arange(low, high, device=exact.device) < boundary  # [B, T]
        middle = torch.where(
            is_decoded[:, None, :, None], decoded, exact[:, :, low - start : high - start]
        )
        return torch.cat((exact[:, :, : low - start], middle, exact[:, :, high - start :]), -2)


class StoreGroup(NamedTuple):
    """One head group: its stores, and the heads they hold (None: all heads, in order)."""

    key: PageStore
    value: PageStore
    heads: Tensor | None


Stores = Sequence[tuple[PageStore, Tensor | None]]


def store_groups(keys: Stores, values: Stores) -> tuple[StoreGroup, ...]:
    """The stores of both sides by head group."""
    return tuple(
        StoreGroup(key, value, heads)
        for (key, heads), (value, _) in zip(keys, values, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class KernelStates:
    """All states of one layer as kernels take them: lengths on the device, nothing to compute.

    A row holds ``clock - padding`` tokens. Of those beyond the sinks, the packed ones number
    ``floor``, or, unless ``is_held``, as many as have left the residual since.

    Attributes:
        groups: Page stores by head group.
        sinks: Exact first tokens of keys and of values, ``[B, H_kv, S, D]``, by row position.
        tails: Exact newest tokens of keys and of values, ``[B, H_kv, W, D]``, contiguous.
        is_ring: Whether the tails hold row position p in slot ``p % W``; else their last column is
            the newest token.
        clock: int32 ``[1]``, tokens of a row, padding included.
        padding: int32 ``[B]``.
        floor: int32 ``[B]``.
        is_held: Whether exactly ``floor`` tokens are packed.
        residual_length: R of the plan.
        quantum: Tokens that are packed together.
        packed: Packed tokens of every row that a call, captured ones too, has to serve: what a
            schedule is chosen for.
    """

    groups: tuple[StoreGroup, ...]
    sinks: tuple[Tensor, Tensor]
    tails: tuple[Tensor, Tensor]
    is_ring: bool
    clock: Tensor
    padding: Tensor
    floor: Tensor
    is_held: bool
    residual_length: int
    quantum: int
    packed: Sequence[int]

    @property
    def num_heads(self) -> int:
        """Key/value heads of the layer."""
        return int(self.tails[0].shape[1])

    def arguments(self, group: StoreGroup) -> tuple[Tensor, ...]:
        """What kernels over one head group read and write, in the order of their arguments."""
        return (
            group.key.pool.view(torch.int8),
            group.value.pool.view(torch.int8),
            group.key.table,
            group.value.table,
            *self.sinks,
            *self.tails,
            self.clock if group.heads is None else group.heads,
            self.clock,
            self.padding,
            self.floor,
        )

    @property
    def most_exact(self) -> int:
        """Room for exact tokens: sinks and tail."""
        return int(self.sinks[0].shape[2] + self.tails[0].shape[2])


@dataclass(frozen=True, kw_only=True)
class StepStates:
    """All states of one layer after a step that only kernels saw.

    Attributes:
        kernel: The states as kernels take them.
        num_tokens: Tokens in the cache, padding and the query included.
        impl: Which attention may run.
        resolve: Makes the view that everything but a kernel needs.
    """

    kernel: KernelStates
    num_tokens: int
    impl: str
    resolve: Callable[[], LayerStates]

    @property
    def num_heads(self) -> int:
        """Key/value heads."""
        return self.kernel.num_heads


def take_columns(states: Tensor, column: Tensor) -> Tensor:
    """``[B, H, W, D]`` and columns ``[B, T]`` to ``[B, H, T, D]``; zero outside 0 to W - 1."""
    width = states.shape[-2]
    if width == 0:
        return states.new_zeros(*states.shape[:2], column.shape[1], states.shape[-1])
    index = column.clamp(0, width - 1)[:, None, :, None]
    taken = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[-1]))
    return taken.masked_fill(((column < 0) | (column >= width))[:, None, :, None], 0)


class StatesHandle(torch.Tensor):
    """A tensor without storage that stands for the keys or values of a layer.

    The registered attention function takes ``source`` from it; any other operation materialises
    the dense tensor, so that models which post-process their keys still work.
    """

    source: LayerStates | StepStates
    side: Side

    @staticmethod
    def __new__(
        cls, source: LayerStates | StepStates, side: Side, dtype: torch.dtype
    ) -> StatesHandle:
        tail = _tail(source, side)
        shape = (tail.shape[0], tail.shape[1], source.num_tokens, tail.shape[-1])
        handle: StatesHandle = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=tail.device
        )
        handle.source, handle.side = source, side
        return handle

    def __init__(self, source: LayerStates | StepStates, side: Side, dtype: torch.dtype) -> None:
        pass

    @property
    def states(self) -> LayerStates:
        """The states it stands for."""
        source = self.source
        return source.resolve() if isinstance(source, StepStates) else source

    def dense(self) -> Tensor:
        """The dense tensor ``[B, H_kv, T, D]``."""
        return self.states.dense(self.side).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StatesHandle({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks cls and func
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def materialise(x: Any) -> Any:
            return x.dense() if isinstance(x, StatesHandle) else x

        return func(*tree_map(materialise, args), **tree_map(materialise, kwargs or {}))


def _tail(source: LayerStates | StepStates, side: Side) -> Tensor:
    if isinstance(source, StepStates):
        return source.kernel.tails[0 if side == "key" else 1]
    return source.side(side).tail
