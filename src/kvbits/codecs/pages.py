"""The page store: packed states of one side of a layer, in pages addressed by a table per row.

``packing.py`` has the layout of a page.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvbits.codecs import packing
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded


class _Chunk(NamedTuple):
    """Pages allocated together: ids from ``start`` on, their records, and views of the planes."""

    start: int
    records: Tensor  # uint8 [pages, record bytes]
    planes: dict[str, Tensor]  # name to [pages, H, ...]


class _Place(NamedTuple):
    """Where some of the items of a write go: a chunk, and page and slot of each item in it."""

    chunk: int
    page: Tensor
    slot: Tensor
    items: Tensor | slice


class PageStore:
    """Packed states of one side of one head group: pages in a pool, addressed by a table per row.

    Rows of a batch may hold different numbers of tokens. The pool grows in chunks, which readers
    other than kernels join; pages are shared between rows after a reorder and copied only when one
    of them writes.

    Args:
        codec: How states become codes.
        side: ``"key"`` or ``"value"``; decides the order of bytes in a page.
        num_heads: Heads of this group.
        head_dim: Channels of this side.
        num_rows: Batch rows.
        dtype: Dtype of the states (what an exact codec stores).
        device: Where the pages live.
        page_tokens: Tokens of a page, if more than the codec needs: a multiple of that.
        first_position: Row position of the first token.
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
        page_tokens: int | None = None,
        first_position: int = 0,
    ) -> None:
        codec.check_heads(num_heads, head_dim)
        self.codec = codec
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        self.page_tokens = page_tokens or packing.page_tokens(codec)
        self.first_position = first_position
        self.lengths = [0] * num_rows
        self._is_transposed = side == "value" and not codec.is_exact
        self._specs = codec.parameter_specs(head_dim)
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]  # page ids of every row
        self._references: list[int] = []  # rows that use each page
        self._free: list[int] = []
        self._chunks: list[_Chunk] = []
        self._reserved_pages = 0
        self._table: Tensor | None = None  # where pages lie, on the device; see ``table``
        self._positions = torch.arange(self.page_tokens, device=device)
        if self._is_transposed:
            self._positions = packing.value_positions(self.page_tokens).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: all pages of the pool, free ones included, and the table."""
        return sum(chunk.records.nbytes for chunk in self._chunks) + self.table.nbytes

    @property
    def pool(self) -> Tensor:
        """The memory that offsets of ``table`` count from, uint8."""
        return self._chunks[0].records if self._chunks else self._positions.view(torch.uint8)

    @property
    def record_units(self) -> int:
        """Size of a page record, in units of packing.OFFSET_UNIT bytes."""
        sizes = (
            math.prod(shape) * dtype.itemsize for shape, dtype in self._plane_shapes().values()
        )
        return packing.record_bytes(sum(sizes)) // packing.OFFSET_UNIT

    @property
    def table(self) -> Tensor:
        """Where each page of each row lies: int64 ``[B, capacity]``, in units from the pool.

        Places a row does not use hold 0, the first page of the pool. Pages of later chunks lie
        outside the first one's memory; an offset reaches them all the same.
        """
        if self._table is None:
            width = self._capacity(max(map(len, self._pages)))
            units = self.record_units
            offsets: list[int] = []
            for chunk in self._chunks:
                start = self._offset(chunk)
                offsets += range(start, start + units * len(chunk.records), units)
            rows = [
                [offsets[page] for page in pages] + [0] * (width - len(pages))
                for pages in self._pages
            ]
            table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
            self._table = table.to(self.device, non_blocking=True)
        return self._table

    def append(self, states: Tensor, rows: Sequence[int] | None = None) -> None:
        """Encode ``[n, H, T, D]`` and append it to ``rows`` (default: all n rows, in order).

        T must be a multiple of the codec's block. Nothing already stored is touched.
        """
        starts = self.lengths if rows is None else [self.lengths[row] for row in rows]
        context = self._context(starts, states.shape[-2])
        self._write(self.codec.encode(states, context), rows)

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
        first, last = start // self.page_tokens, self._num_pages(stop)
        begin = first * self.page_tokens
        context = self._context([begin], (last - first) * self.page_tokens)
        decoded = self.codec.decode(self._encoded(self._gather(first, last)), context)
        decoded = decoded[:, :, start - begin : stop - begin]
        if held_by_all >= stop:
            return decoded
        held = torch.tensor(self.lengths, device=self.device)[:, None]
        is_held = torch.arange(start, stop, device=self.device) < held  # [B, T]
        return decoded.masked_fill(~is_held[:, None, :, None], 0)  # never NaN from unwritten bytes

    def view_pages(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """The first ``count`` pages of every row where they lie: planes, and ids ``[B, count]``.

        A pool in several chunks becomes one first: a copy for every sixteenth it grows by. Places
        a row does not use name some page.
        """
        if len(self._chunks) > 1:  # in place of a search for every page, at every step
            records = torch.cat([chunk.records for chunk in self._chunks])
            self._chunks, self._table = [self._chunk(0, records)], None
        return self._chunks[0].planes, self.table[:, :count] // self.record_units

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of ``row`` from ``length`` on (a multiple of the codec's block)."""
        used = self._num_pages(length)
        for page in self._pages[row][used:]:
            self._release(page)
        del self._pages[row][used:]
        self.lengths[row] = length
        self._refill()

    def map_rows(self, index: Sequence[int]) -> None:
        """Make row i a copy of what row ``index[i]`` was; pages are shared, not copied."""
        former = self._pages
        self.lengths = [self.lengths[i] for i in index]
        used = [self._num_pages(length) for length in self.lengths]
        self._pages = [former[i][:count] for i, count in zip(index, used, strict=True)]
        for page in (page for pages in self._pages for page in pages):
            self._references[page] += 1
        for page in (page for pages in former for page in pages):
            self._release(page)
        self._refill()

    @property
    def planes(self) -> dict[str, Tensor]:
        """All pages of the pool by plane, ``[pages, H, ...]``, while it is one piece of memory."""
        (chunk,) = self._chunks
        return chunk.planes

    def reserve(self, num_tokens: int, *, order: torch.Generator | None = None) -> None:
        """Give every row pages of its own for ``num_tokens`` tokens, so that appending allocates
        nothing and no page moves until then.

        Args:
            num_tokens: Tokens of a row.
            order: Hands pages out in random order, as a pool that has been in use for long would.
        """
        count = self._num_pages(num_tokens)
        self._reserved_pages = max(self._reserved_pages, count)
        self._reserve(count)
        if order is not None:
            permutation = torch.randperm(len(self._free), generator=order)
            self._free = [self._free[i] for i in permutation.tolist()]
        self._refill()

    def _refill(self) -> None:
        """Give every row the pages that were reserved for it: none that another row uses."""
        self._reserve(self._reserved_pages)
        for pages in self._pages:
            pages.extend(self._allocate(max(0, self._reserved_pages - len(pages))))
        self._table = None

    @property
    def room(self) -> list[int]:
        """Tokens for which each row has pages."""
        return [len(pages) * self.page_tokens for pages in self._pages]

    def make_room(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Give every row pages of its own for the tokens it is about to write."""
        needed = [
            self._num_pages(self.lengths[row] + count)
            for row, count in zip(rows, counts, strict=True)
        ]
        self._reserve(max(*needed, *map(len, self._pages)))
        for row, count in zip(rows, needed, strict=True):
            pages, last = self._pages[row], self.lengths[row] // self.page_tokens
            if last < min(count, len(pages)) and self._references[pages[last]] > 1:
                self._unshare(pages, last)
            if count > len(pages):
                pages.extend(self._allocate(count - len(pages)))
                self._table = None

    def to(self, device: torch.device) -> PageStore:
        """The store with every page on ``device``; this one stays, for who still reads it."""
        moved = copy.copy(self)
        moved._chunks = [
            self._chunk(chunk.start, chunk.records.to(device, non_blocking=True))
            for chunk in self._chunks
        ]
        moved._positions = self._positions.to(device)
        moved._table = None
        moved.device = device
        return moved

    def export_pages(self) -> dict[str, Tensor]:
        """The pages of every row, each row padded to the longest: plane name to tensor."""
        used = [self._num_pages(length) for length in self.lengths]
        return self._gather_pages(
            [
                pages[i] if i < count else 0
                for pages, count in zip(self._pages, used, strict=True)
                for i in range(max(used))
            ]
        )

    def import_pages(self, planes: dict[str, Tensor], lengths: Sequence[int]) -> None:
        """Fill an empty store with what ``export_pages`` returned for rows of ``lengths``."""
        needed = [self._num_pages(length) for length in lengths]
        width = len(planes["codes"]) // max(1, len(lengths))  # pages of each row as exported
        self.make_room(list(range(len(lengths))), list(lengths))
        self.lengths = list(lengths)
        ids = [page for row, count in enumerate(needed) for page in self._pages[row][:count]]
        own = [row * width + page for row, count in enumerate(needed) for page in range(count)]
        if own:
            for name, plane in self.planes.items():  # one chunk: it was empty
                plane[torch.tensor(ids)] = planes[name][torch.tensor(own)].to(plane)

    # ----- pages

    def _plane_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of each plane of one page, and its dtype."""
        width, dtype = self.head_dim, self.dtype
        if not self.codec.is_exact:
            width, dtype = self.codec.row_bytes(self.head_dim), torch.uint8
        row = (width, self.page_tokens) if self._is_transposed else (self.page_tokens, width)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.num_heads, *row), dtype)
        }
        for spec in self._specs:
            shape = (spec.rows, self.page_tokens, spec.components)
            if spec.axis == "block":
                shape = (self.page_tokens // spec.block_tokens, spec.rows, spec.components)
            shapes[spec.name] = ((self.num_heads, *shape), spec.dtype)
        return shapes

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def _capacity(self, num_pages: int) -> int:
        return (
            self._reserved_pages
            if num_pages <= self._reserved_pages
            else packing.page_capacity(num_pages)
        )

    def _reserve(self, pages_per_row: int) -> None:
        """Grow the pool so that every row could hold ``pages_per_row`` pages of its own."""
        missing = self._capacity(pages_per_row) * len(self._pages) - len(self._references)
        if missing > 0:
            self._grow(missing)

    def _allocate(self, count: int) -> list[int]:
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def _grow(self, num_pages: int) -> None:
        begin = len(self._references)
        records = torch.zeros(
            (num_pages, self.record_units * packing.OFFSET_UNIT),
            dtype=torch.uint8,
            device=self.device,
        )
        self._chunks.append(self._chunk(begin, records))
        self._references.extend([0] * num_pages)
        self._free[:0] = range(begin + num_pages - 1, begin - 1, -1)  # lowest ids are popped first

    def _chunk(self, start: int, records: Tensor) -> _Chunk:
        planes, begin = {}, 0
        for name, (shape, dtype) in self._plane_shapes().items():
            end = begin + math.prod(shape) * dtype.itemsize
            planes[name] = records[:, begin:end].view(dtype).unflatten(1, shape)
            begin = end
        return _Chunk(start, records, planes)

    def _offset(self, chunk: _Chunk) -> int:
        """Where a chunk's pages start, in units from the start of the pool."""
        distance = chunk.records.data_ptr() - self.pool.data_ptr()
        assert distance % packing.OFFSET_UNIT == 0
        return distance // packing.OFFSET_UNIT

    def _chunk_of(self, page: int) -> int:
        return bisect_right(self._chunks, page, key=lambda chunk: chunk.start) - 1

    def _chunks_of(self, pages: Iterable[int]) -> list[int]:
        """Indices of the chunks that hold ``pages``."""
        return sorted({self._chunk_of(page) for page in pages})

    def _unshare(self, pages: list[int], position: int) -> None:
        """Give a row its own copy of a page it shares."""
        (own,) = self._allocate(1)
        for name, plane in self._gather_pages([pages[position]]).items():
            chunk = self._chunks[self._chunk_of(own)]
            chunk.planes[name][own - chunk.start] = plane[0]
        self._release(pages[position])
        pages[position] = own
        self._table = None

    def _gather(self, first: int, last: int) -> dict[str, Tensor]:
        """Pages ``first`` to ``last`` of every row, row after row: plane name to ``[B * n, ...]``.

        Where a row has fewer pages, page 0 stands in.
        """
        if self._chunks and last <= self.table.shape[1]:
            planes, ids = self.view_pages(last)
            wanted = ids[:, first:].flatten()
            return {name: plane.index_select(0, wanted) for name, plane in planes.items()}
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
        for index in self._chunks_of(pages):
            chunk = self._chunks[index]
            end = chunk.start + len(chunk.records)
            (target,) = torch.nonzero((ids >= chunk.start) & (ids < end), as_tuple=True)
            source = (ids[target] - chunk.start).to(self.device)
            for name, plane in chunk.planes.items():
                gathered[name][target.to(self.device)] = plane[source]
        return gathered

    # ----- between pages and codes

    def _context(self, starts: Sequence[int], count: int) -> EncodeContext:
        """For ``count`` tokens of every row from ``starts`` on; one row if all start alike."""
        if not self.codec.needs_positions:  # a decode step should not make them for nothing
            return NO_CONTEXT
        distinct = starts if len(set(starts)) > 1 else starts[:1]
        first = torch.tensor(distinct, device=self.device)[:, None] + self.first_position
        return EncodeContext(first + torch.arange(count, device=self.device))

    def _write(self, encoded: Encoded, rows: Sequence[int] | None) -> None:
        codes, parameters = encoded
        num_tokens = codes.shape[-2]
        written = list(range(len(self.lengths)) if rows is None else rows)
        starts = [self.lengths[row] for row in written]
        self.make_room(written, [num_tokens] * len(written))
        for row in written:
            self.lengths[row] += num_tokens
        if not self.codec.is_exact:
            codes = packing.pack_bits(codes, self.codec.code_bits())
        places = self._places(written, starts, num_tokens, 1)
        slots = [place._replace(slot=self._positions[place.slot]) for place in places]
        self._scatter("codes", codes, slots, self._is_transposed)
        for spec in self._specs:
            values = parameters[spec.name]
            if spec.axis == "token":
                self._scatter(spec.name, values, places, True)
            else:
                blocks = self._places(written, starts, values.shape[2], spec.block_tokens)
                self._scatter(spec.name, values, blocks, False)

    def _places(self, rows: list[int], starts: list[int], count: int, step: int) -> list[_Place]:
        """Where ``count`` items per row go, each covering ``step`` tokens from ``starts`` on."""
        per_page = self.page_tokens // step
        if count == 1:
            return self._places_of_one(rows, [start // step for start in starts], per_page)
        first = torch.tensor([start // step for start in starts], device=self.device)
        item = first[:, None] + torch.arange(count, device=self.device)  # [n, N]
        offsets = self.table[torch.tensor(rows, device=self.device)]
        offset = offsets.gather(1, item // per_page).flatten()
        slot = (item % per_page).flatten()
        touched = self._chunks_of(
            page_id
            for row, start in zip(rows, starts, strict=True)
            for page_id in self._pages[row][start // self.page_tokens :]
        )
        places = []
        for index in touched:
            chunk = self._chunks[index]
            local = (offset - self._offset(chunk)) // self.record_units
            if len(touched) == 1:
                return [_Place(index, local, slot, slice(None))]
            (items,) = torch.nonzero((local >= 0) & (local < len(chunk.records)), as_tuple=True)
            places.append(_Place(index, local[items], slot[items], items))
        return places

    def _places_of_one(self, rows: list[int], items: list[int], per_page: int) -> list[_Place]:
        """Where one item per row goes: a decode step, worth a short way."""
        pages = [self._pages[row][item // per_page] for row, item in zip(rows, items, strict=True)]
        chunks = [self._chunk_of(page) for page in pages]
        slot = torch.tensor([item % per_page for item in items], device=self.device)
        places = []
        for index in sorted(set(chunks)):
            own = [i for i, chunk in enumerate(chunks) if chunk == index]
            start = self._chunks[index].start
            page = torch.tensor([pages[i] - start for i in own], device=self.device)
            is_all = len(own) == len(chunks)
            chosen = slice(None) if is_all else torch.tensor(own, device=self.device)
            places.append(_Place(index, page, slot[chosen], chosen))
        return places

    def _scatter(self, name: str, values: Tensor, places: list[_Place], is_inner: bool) -> None:
        """Write items ``[n, H, N, ...]`` to one plane.

        ``is_inner``: inside a page the items lie one axis further in, as transposed value codes
        and per-token parameters do.
        """
        flat = values.transpose(1, 2).flatten(0, 1)  # [n * N, H, ...]
        for place in places:
            plane = self._chunks[place.chunk].planes[name]
            plane = plane.transpose(2, 3) if is_inner else plane
            plane[place.page, :, place.slot] = flat[place.items].to(plane.dtype)

    def _encoded(self, planes: dict[str, Tensor]) -> Encoded:
        """Codes and parameters ``[B, H, T, ...]`` of pages that came from ``_gather``."""
        codes = planes["codes"]
        if self._is_transposed:
            codes = codes[..., self._positions].transpose(-1, -2)
        codes = self._rows_first(codes)
        if not self.codec.is_exact:
            codes = packing.unpack_bits(codes, self.codec.code_bits(), self.head_dim)
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
