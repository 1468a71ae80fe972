"""Keys or values of a packed layer: where the sinks, the packed pages and the exact rest lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.attention.states import take_columns
from kvbits.cache.ring import Ring
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import SIDES, IntArray, LayerPlan, Side


@dataclass
class SideStorage:
    """One side of a layer: packed stores by head group, sinks, residual."""

    side: Side
    stores: list[tuple[PageStore, Tensor | None]]  # None: all heads
    sinks: Tensor  # [B, H_kv, S, D], by row position
    ring: Ring  # exact tokens beyond the sinks

    @classmethod
    def empty(
        cls, plan: LayerPlan, side: Side, states: Tensor, *, max_tokens: int | None
    ) -> SideStorage:
        """Storage for states like ``[B, H_kv, T, D]``, room for ``max_tokens`` a row reserved."""
        batch, num_heads, _, head_dim = states.shape
        stores: list[tuple[PageStore, Tensor | None]] = []
        for group in plan.groups:
            heads = None
            if group.heads is not None:
                heads = torch.tensor(group.heads, device=states.device)
            store = PageStore(
                group.codec(side),
                side=side,
                num_heads=num_heads if group.heads is None else len(group.heads),
                head_dim=head_dim,
                num_rows=batch,
                dtype=states.dtype,
                device=states.device,
                page_tokens=plan.page_tokens,
                first_position=plan.sink_tokens,
            )
            if max_tokens is not None:
                most = plan.packed_lengths(np.array([max_tokens]))
                store.reserve(int(most[SIDES.index(side)][0]))
            stores.append((store, heads))
        sinks = states.new_zeros(batch, num_heads, plan.sink_tokens, head_dim)
        return cls(side, stores, sinks, Ring(states, plan.exact_capacity))

    @property
    def packed(self) -> IntArray:
        """Packed tokens of every row."""
        return np.asarray(self.stores[0][0].lengths, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for states and page tables."""
        packed = sum(store.nbytes for store, _ in self.stores)
        return packed + self.sinks.nbytes + self.ring.buffer.nbytes

    def fill_sinks(
        self, tail: Tensor, held: IntArray, padding: Sequence[int], num_tokens: int
    ) -> None:
        """Copy the first real tokens of rows that ``held`` fewer than S out of the tail."""
        device = self.sinks.device
        position = torch.arange(self.sinks.shape[2], device=device)
        shift = tail.shape[-2] - num_tokens
        column = position + torch.tensor(list(padding), device=device)[:, None] + shift
        is_held = position < torch.from_numpy(held).to(device)[:, None]
        from_tail = take_columns(tail, column)
        self.sinks.copy_(torch.where(is_held[:, None, :, None], self.sinks, from_tail))

    def pack(self, tail: Tensor, columns: IntArray, counts: IntArray, *, by_kernels: bool) -> None:
        """Encode ``counts[b]`` tokens of every row's tail ``[B, H_kv, W, D]`` from a column on."""
        if by_kernels:
            from kvbits.attention.triton.quantize import append_prompt

            places = {"columns": columns.tolist(), "counts": counts.tolist()}
            for store, heads in self.stores:
                append_prompt(store, self.side, tail, heads, **places)
            return
        for column, count in sorted({*zip(columns.tolist(), counts.tolist(), strict=True)}):
            rows = np.flatnonzero((counts == count) & (columns == column)).tolist()
            if count:  # rows in step go together
                states = tail[rows] if len(rows) < len(counts) else tail
                self._append(states[:, :, column : column + count], rows)

    def _append(self, states: Tensor, rows: Sequence[int]) -> None:
        for store, heads in self.stores:
            store.append(states if heads is None else states[:, heads], rows)

    def truncate(self, lengths: IntArray) -> None:
        """Forget what every row has packed beyond ``lengths[b]`` tokens."""
        for row, length in enumerate(lengths.tolist()):
            for store, _ in self.stores:
                store.truncate(row, length)

    def map_rows(self, index: Sequence[int]) -> None:
        """Make row i a copy of what row ``index[i]`` was."""
        rows = torch.tensor(list(index), device=self.sinks.device)
        self.ring.buffer = self.ring.buffer.index_select(0, rows)
        self.sinks = self.sinks.index_select(0, rows)
        for store, _ in self.stores:
            store.map_rows(index)

    def to(self, device: torch.device) -> None:
        """Move all states to ``device``."""
        self.ring.buffer = self.ring.buffer.to(device, non_blocking=True)
        self.sinks = self.sinks.to(device, non_blocking=True)
        self.stores = [  # an attention call that is under way reads the old ones
            (store.to(device), None if heads is None else heads.to(device))
            for store, heads in self.stores
        ]

    def export(self) -> dict[str, Tensor]:
        """Sinks and pages by name; not the residual, whose place in a ring says little."""
        tensors = {"sinks": self.sinks}
        for index, (store, _) in enumerate(self.stores):
            for name, plane in store.export_pages().items():
                tensors[f"{index}.{name}"] = plane
        return tensors

    def restore(self, tensors: dict[str, Tensor], packed: list[int]) -> None:
        """Take back what ``export`` returned, with the packed tokens of every row."""
        self.sinks = tensors["sinks"]
        for index, (store, _) in enumerate(self.stores):
            store.import_pages(below(tensors, str(index)), packed)


def below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors named ``<name>.<rest>``, by their rest."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
