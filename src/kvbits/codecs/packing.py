"""The only code that knows bytes: bit packing, pages, and the store of one side of a layer.

Layout ``kvbits-1``. A page holds ``page_tokens`` tokens (a multiple of 64) of one key/value head.

    byte w of a token    channels w, w + NB, w + 2 NB, ...   NB = D * bits // 8
        8 bits           [7..0] c0
        4 bits           [7..4] c1 [3..0] c0
        2 bits           [7..6] c3 [5..4] c2 [3..2] c1 [1..0] c0
        3 bits           three planes of D // 8 bytes each, cj = channel w + j * D // 8:
                         P0 = c0 | c1 << 3 | (c6 & 3) << 6
                         P2 = c4 | c5 << 3 | (c7 >> 1) << 6
                         P1 = c2 | c3 << 3 | (c6 >> 2) << 6 | (c7 & 1) << 7
    bit 7 of every byte is flipped, so that a byte read as int8 is a sum of codes around zero and
    integer tensor cores can take it with one AND.

    keys    token rows           [pages, H_kv, page_tokens, NB]
    values  transposed by page   [pages, H_kv, NB, page_tokens]; within 32 tokens, token t lies at
                                 position (t % 8) * 4 + t // 8: the order a matrix fragment wants
    scale and offset             pairs: [pages, H_kv, rows, page_tokens, 2] per token,
                                 [pages, H_kv, blocks, D, 2] per channel

Every token has bytes of its own, so any token can be appended alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvbits.codecs.base import Codec, Encoded

LAYOUT_ID = "kvbits-1"
BASE_PAGE_TOKENS = 64
_SIGN = 0x80


def page_tokens(codec: Codec) -> int:
    """Tokens of one page: a multiple of 64 and of the codec's block."""
    return math.lcm(BASE_PAGE_TOKENS, codec.block_tokens)


def page_capacity(num_pages: int) -> int:
    """Pages a row has room for once it has needed ``num_pages``: grows by a sixteenth.

    A pure function of the largest need, so that allocated bytes do not depend on how a cache grew
    (chunk by chunk or at once).
    """
    capacity = 0
    while capacity < num_pages:
        capacity += max(1, capacity // 16)
    return capacity


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis: uint8 ``[..., D]`` to uint8 ``[..., D * bits // 8]``."""
    if bits == 8:
        return codes ^ _SIGN
    if bits == 3:
        c = codes.unflatten(-1, (8, -1)).unbind(-2)
        plane_0 = c[0] | c[1] << 3 | (c[6] & 3) << 6
        plane_2 = c[4] | c[5] << 3 | (c[7] >> 1) << 6
        plane_1 = c[2] | c[3] << 3 | (c[6] >> 2) << 6 | (c[7] & 1) << 7
        return torch.cat((plane_0, plane_2, plane_1), -1) ^ _SIGN
    fields = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = fields[0].clone()
    for index, field in enumerate(fields[1:], start=1):
        packed |= field << (bits * index)
    return packed ^ _SIGN


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack_bits``: uint8 ``[..., D * bits // 8]`` to uint8 ``[..., D]``."""
    packed = packed ^ _SIGN
    if bits == 8:
        return packed
    if bits == 3:
        plane_0, plane_2, plane_1 = packed.chunk(3, -1)
        c6 = plane_0 >> 6 | (plane_1 >> 4 & 4)
        c7 = plane_1 >> 7 | (plane_2 >> 5 & 6)
        low = (plane_0, plane_1, plane_2)
        c0_to_c5 = [part for plane in low for part in (plane & 7, plane >> 3 & 7)]
        return torch.cat((*c0_to_c5, c6, c7), -1)
    mask = 2**bits - 1
    return torch.cat([packed >> shift & mask for shift in range(0, 8, bits)], -1)


def _value_positions(tokens: int) -> Tensor:
    """Position inside a page of each of its tokens, for values."""
    token = torch.arange(tokens)
    return token // 32 * 32 + token % 8 * 4 + token % 32 // 8


class _Place(NamedTuple):
    """Where some of the items of a write go: a chunk, and page and slot of each item in it."""

    chunk: int
    page: Tensor
    slot: Tensor
    items: Tensor | slice


class PageStore:
    """Packed states of one side of one head group: pages in a pool, addressed by a table per row.

    Rows of a batch may hold different numbers of tokens. The pool grows in chunks that are never
    copied; pages are shared between rows after a reorder and copied only when one of them writes.

    Args:
        codec: How states become codes.
        side: ``"key"`` or ``"value"``; decides the order of bytes in a page.
        num_heads: Heads of this group.
        head_dim: Channels of this side.
        num_rows: Batch rows.
        dtype: Dtype of the states (what an exact codec stores).
        device: Where the pages live.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        side: Literal["key", "value"],
        num_heads: int,
        head_dim: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        codec.check_head_dim(head_dim)
        self.codec = codec
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        self.page_tokens = page_tokens(codec)
        self.lengths = [0] * num_rows
        self._is_transposed = side == "value" and not codec.is_exact
        self._specs = codec.parameter_specs(head_dim)
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]  # page ids of every row
        self._references: list[int] = []  # rows that use each page
        self._free: list[int] = []
        self._chunks: list[dict[str, Tensor]] = []
        self._chunk_starts: list[int] = []
        self._table: Tensor | None = None  # the page ids on the device; rebuilt when they change
        self._positions = torch.arange(self.page_tokens, device=device)
        if self._is_transposed:
            self._positions = _value_positions(self.page_tokens).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: all pages of the pool, free ones included, and the table."""
        pages = sum(plane.nbytes for chunk in self._chunks for plane in chunk.values())
        return pages + self._block_table().nbytes

    def append(self, states: Tensor, rows: Sequence[int] | None = None) -> None:
        """Encode ``[n, H, T, D]`` and append it to ``rows`` (default: all n rows, in order).

        T must be a multiple of the codec's block. Nothing already stored is touched.
        """
        self._write(self.codec.encode(states), rows)

    def read(self, start: int, stop: int) -> Tensor:
        """Decode tokens ``start`` to ``stop`` of every row: ``[B, H, stop - start, D]``.

        Tokens a row does not hold come back as zeros.
        """
        held_by_all, held_by_some = min(self.lengths), max(self.lengths)
        if stop > held_by_some:
            kept = max(held_by_some, start)
            zeros = torch.zeros(
                (len(self.lengths), self.num_heads, stop - kept, self.head_dim), device=self.device
            )
            return zeros if kept == start else torch.cat((self.read(start, kept), zeros), -2)
        first, last = start // self.page_tokens, -(-stop // self.page_tokens)
        decoded = self.codec.decode(self._encoded(self._gather(first, last)))
        begin = first * self.page_tokens
        decoded = decoded[:, :, start - begin : stop - begin]
        if held_by_all >= stop:
            return decoded
        held = torch.tensor(self.lengths, device=self.device)[:, None]
        is_held = torch.arange(start, stop, device=self.device) < held  # [B, T]
        return decoded.masked_fill(~is_held[:, None, :, None], 0)  # never NaN from unwritten bytes

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of ``row`` from ``length`` on (a multiple of the codec's block)."""
        keep = -(-length // self.page_tokens)
        for page in self._pages[row][keep:]:
            self._release(page)
        del self._pages[row][keep:]
        self.lengths[row] = length
        self._table = None

    def map_rows(self, index: Sequence[int]) -> None:
        """Make row i a copy of what row ``index[i]`` was; pages are shared, not copied."""
        former = self._pages
        self._pages = [list(former[i]) for i in index]
        self.lengths = [self.lengths[i] for i in index]
        for page in (page for pages in self._pages for page in pages):
            self._references[page] += 1
        for page in (page for pages in former for page in pages):
            self._release(page)
        self._table = None

    def to(self, device: torch.device) -> None:
        """Move every page to ``device``."""
        self._chunks = [
            {name: plane.to(device, non_blocking=True) for name, plane in chunk.items()}
            for chunk in self._chunks
        ]
        self._positions = self._positions.to(device)
        self._table = None
        self.device = device

    def export_pages(self) -> dict[str, Tensor]:
        """The pages of every row, each row padded to the longest: plane name to tensor."""
        return self._gather(0, max(map(len, self._pages)))

    def import_pages(self, planes: dict[str, Tensor], lengths: Sequence[int]) -> None:
        """Fill an empty store with what ``export_pages`` returned for rows of ``lengths``."""
        needed = [-(-length // self.page_tokens) for length in lengths]
        self.lengths = list(lengths)
        self._reserve(max(needed))
        self._pages = [self._allocate(count) for count in needed]
        self._table = None
        own = [
            row * max(needed) + page for row, count in enumerate(needed) for page in range(count)
        ]
        if own:  # all pages were just allocated in one chunk, in order
            for name, plane in self._chunks[0].items():
                plane[: len(own)] = planes[name][torch.tensor(own)].to(plane)

    # ----- pages

    def _plane_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of each plane of one page, and its dtype."""
        width, dtype = self.head_dim, self.dtype
        if not self.codec.is_exact:
            width, dtype = width * self.codec.code_bits() // 8, torch.uint8
        row = (width, self.page_tokens) if self._is_transposed else (self.page_tokens, width)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.num_heads, *row), dtype)
        }
        for spec in self._specs:
            shape = (spec.rows, self.page_tokens, spec.components)
            if spec.axis == "block":
                shape = (self.page_tokens // self.codec.block_tokens, spec.rows, spec.components)
            shapes[spec.name] = ((self.num_heads, *shape), spec.dtype)
        return shapes

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def _reserve(self, pages_per_row: int) -> None:
        """Grow the pool so that every row could hold ``pages_per_row`` pages of its own."""
        missing = page_capacity(pages_per_row) * len(self._pages) - len(self._references)
        if missing > 0:
            self._grow(missing)

    def _allocate(self, count: int) -> list[int]:
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def _grow(self, num_pages: int) -> None:
        begin = len(self._references)
        self._chunk_starts.append(begin)
        self._chunks.append(
            {
                name: torch.zeros((num_pages, *shape), dtype=dtype, device=self.device)
                for name, (shape, dtype) in self._plane_shapes().items()
            }
        )
        self._references.extend([0] * num_pages)
        self._free[:0] = range(begin + num_pages - 1, begin - 1, -1)  # lowest ids are popped first

    def _block_table(self) -> Tensor:
        """Page ids ``[B, capacity]``, int32; places a row does not use hold page 0."""
        if self._table is None:
            width = page_capacity(max(map(len, self._pages)))
            rows = [pages + [0] * (width - len(pages)) for pages in self._pages]
            self._table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        return self._table

    def _chunks_of(self, pages: Iterable[int]) -> list[int]:
        """Indices of the chunks that hold ``pages``."""
        return sorted({bisect_right(self._chunk_starts, page) - 1 for page in pages})

    def _make_room(self, rows: Sequence[int], num_tokens: int) -> None:
        """Give every row pages of its own for the ``num_tokens`` it is about to write."""
        needed = [-(-(self.lengths[row] + num_tokens) // self.page_tokens) for row in rows]
        self._reserve(max(*needed, *map(len, self._pages)))
        for row, count in zip(rows, needed, strict=True):
            pages, (last, slot) = self._pages[row], divmod(self.lengths[row], self.page_tokens)
            if slot and self._references[pages[last]] > 1:
                self._unshare(pages, last)
            if count > len(pages):
                pages.extend(self._allocate(count - len(pages)))
                self._table = None

    def _unshare(self, pages: list[int], position: int) -> None:
        """Give a row its own copy of a page it shares."""
        (own,) = self._allocate(1)
        for name, plane in self._gather_pages([pages[position]]).items():
            chunk = self._chunks_of([own])[0]
            self._chunks[chunk][name][own - self._chunk_starts[chunk]] = plane[0]
        self._release(pages[position])
        pages[position] = own
        self._table = None

    def _gather(self, first: int, last: int) -> dict[str, Tensor]:
        """Pages ``first`` to ``last`` of every row, row after row: plane name to ``[B * n, ...]``.

        Where a row has fewer pages, page 0 stands in.
        """
        if len(self._chunks) == 1 and last <= self._block_table().shape[1]:
            ids = self._block_table()[:, first:last].flatten()
            return {name: plane.index_select(0, ids) for name, plane in self._chunks[0].items()}
        return self._gather_pages(
            [
                pages[i] if i < len(pages) else 0
                for pages in self._pages
                for i in range(first, last)
            ]
        )

    def _gather_pages(self, pages: list[int]) -> dict[str, Tensor]:
        ids = torch.tensor(pages, dtype=torch.int64)
        gathered = {
            name: torch.empty((len(pages), *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in self._plane_shapes().items()
        }
        bounds = [*self._chunk_starts, len(self._references)]
        for index in self._chunks_of(pages):
            begin, end = bounds[index], bounds[index + 1]
            (target,) = torch.nonzero((ids >= begin) & (ids < end), as_tuple=True)
            source = (ids[target] - begin).to(self.device)
            for name, plane in self._chunks[index].items():
                gathered[name][target.to(self.device)] = plane[source]
        return gathered

    # ----- between pages and codes

    def _write(self, encoded: Encoded, rows: Sequence[int] | None) -> None:
        codes, parameters = encoded
        num_tokens = codes.shape[-2]
        written = list(range(len(self.lengths)) if rows is None else rows)
        starts = [self.lengths[row] for row in written]
        self._make_room(written, num_tokens)
        for row in written:
            self.lengths[row] += num_tokens
        if not self.codec.is_exact:
            codes = pack_bits(codes, self.codec.code_bits())
        places = self._places(written, starts, num_tokens, 1)
        slots = [place._replace(slot=self._positions[place.slot]) for place in places]
        self._scatter("codes", codes, slots, self._is_transposed)
        for spec in self._specs:
            values = parameters[spec.name]
            if spec.axis == "token":
                self._scatter(spec.name, values, places, True)
            else:
                blocks = self._places(written, starts, values.shape[2], self.codec.block_tokens)
                self._scatter(spec.name, values, blocks, False)

    def _places(self, rows: list[int], starts: list[int], count: int, step: int) -> list[_Place]:
        """Where ``count`` items per row go, each covering ``step`` tokens from ``starts`` on."""
        per_page = self.page_tokens // step
        first = torch.tensor([start // step for start in starts], device=self.device)
        item = first[:, None] + torch.arange(count, device=self.device)  # [n, N]
        table = self._block_table()[torch.tensor(rows, device=self.device)]
        page = table.gather(1, item // per_page).flatten()
        slot = (item % per_page).flatten()
        touched = self._chunks_of(
            page_id
            for row, start in zip(rows, starts, strict=True)
            for page_id in self._pages[row][start // self.page_tokens :]
        )
        places = []
        for chunk in touched:
            local = page - self._chunk_starts[chunk]
            if len(touched) == 1:
                return [_Place(chunk, local, slot, slice(None))]
            size = len(self._chunks[chunk]["codes"])
            (items,) = torch.nonzero((local >= 0) & (local < size), as_tuple=True)
            places.append(_Place(chunk, local[items], slot[items], items))
        return places

    def _scatter(self, name: str, values: Tensor, places: list[_Place], is_inner: bool) -> None:
        """Write items ``[n, H, N, ...]`` to one plane.

        ``is_inner``: inside a page the items lie one axis further in, as transposed value codes
        and per-token parameters do.
        """
        flat = values.transpose(1, 2).flatten(0, 1)  # [n * N, H, ...]
        for place in places:
            plane = self._chunks[place.chunk][name]
            plane = plane.transpose(2, 3) if is_inner else plane
            plane[place.page, :, place.slot] = flat[place.items].to(plane.dtype)

    def _encoded(self, planes: dict[str, Tensor]) -> Encoded:
        """Codes and parameters ``[B, H, T, ...]`` of pages that came from ``_gather``."""
        codes = planes["codes"]
        if self._is_transposed:
            codes = codes[..., self._positions].transpose(-1, -2)
        codes = self._rows_first(codes)
        if not self.codec.is_exact:
            codes = unpack_bits(codes, self.codec.code_bits())
        parameters = {}
        for spec in self._specs:
            plane = planes[spec.name]
            if spec.axis == "token":
                plane = plane.transpose(2, 3)
            parameters[spec.name] = self._rows_first(plane)
        return Encoded(codes, parameters)

    def _rows_first(self, pages: Tensor) -> Tensor:
        """Join the pages of each row: ``[B * n, H, N, ...]`` to ``[B, H, n * N, ...]``."""
        rows = pages.unflatten(0, (len(self.lengths), -1))  # [B, n, H, N, ...]
        return rows.transpose(1, 2).flatten(2, 3)
