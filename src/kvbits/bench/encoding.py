"""Encoding: a prompt into pages, in bytes read and written per second, and one token of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvbits.attention.triton.quantize import append_prompt, append_token
from kvbits.bench.kernels import Cell, random_states
from kvbits.bench.timing import graph_time_us
from kvbits.codecs import packing
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import SIDES, Side

PROMPTS = ((64, 8192), (1, 32768))
LAYOUTS = tuple(
    Cell(1, 1024, bits, bits, key_group=group)
    for bits, group in ((8, 0), (4, 0), (3, 0), (2, 0), (4, 128), (4, 64), (2, 64), (2, 32))
)
APPEND_ROWS = 64  # times 8 heads: 512 rows
APPENDS = 20  # of one graph


def measure() -> Iterator[dict[str, Any]]:
    """One record per layout and side of a prompt, and per layout of a step."""
    for layout in LAYOUTS:
        for batch, num_tokens in PROMPTS:
            cell = layout._replace(batch=batch, context=num_tokens)
            for side in SIDES if cell.key_group == 0 else SIDES[:1]:
                yield _prompt_record(cell, side)
                torch.cuda.empty_cache()
        yield from _append_records(layout._replace(batch=APPEND_ROWS))


def prompt_call(cell: Cell, side: Side) -> Callable[[], None]:
    """A call that encodes the cell's prompt into the pages of one side."""
    return _prompt(cell, side)[0]


def _prompt(cell: Cell, side: Side) -> tuple[Callable[[], None], int]:
    """The call, and the bytes it reads and writes."""
    states = torch.randn(cell.batch, cell.context, cell.num_heads, cell.head_dim, device="cuda")
    states = states.to(torch.bfloat16).transpose(1, 2)
    store = PageStore(
        cell.plan.groups[0].codec(side),
        side=side,
        num_heads=cell.num_heads,
        head_dim=cell.head_dim,
        num_rows=cell.batch,
        dtype=torch.bfloat16,
        device=states.device,
        page_tokens=cell.plan.page_tokens,
    )
    store.reserve(cell.context)

    def encode() -> None:
        store.lengths = [0] * cell.batch
        append_prompt(
            store,
            side,
            states,
            None,
            columns=[0] * cell.batch,
            counts=[cell.context] * cell.batch,
        )

    pages = cell.batch * -(-cell.context // store.page_tokens)
    return encode, states.nbytes + pages * store.record_units * packing.OFFSET_UNIT


def _prompt_record(cell: Cell, side: Side) -> dict[str, Any]:
    encode, num_bytes = _prompt(cell, side)
    time_us = _event_time_us(encode)
    return {
        "suite": "prompt",
        "name": f"{cell.name} {side}",
        "cell": cell._asdict(),
        "time_us": round(time_us, 2),
        "num_bytes": num_bytes,
        "gb_s": round(num_bytes / time_us / 1e3),
    }


def append_call(cell: Cell, *, is_flush: bool) -> Callable[[], None]:
    """A call that appends a token to every row, in a step that packs or in one that does not."""
    states = random_states(cell)
    new = torch.randn(2, cell.batch, cell.num_heads, 1, cell.head_dim, device="cuda")
    keys, values = new.to(torch.bfloat16)
    flags = torch.zeros(2, dtype=torch.int32, device="cuda")
    full = cell.context - (cell.context - cell.residual_length) % states.quantum
    states.floor.zero_()
    states.clock.fill_(full if is_flush else full - 1)

    def append() -> None:
        append_token(states, states.groups[0], keys, values, flags, (6e4, 6e4))

    return append


def _append_records(cell: Cell) -> Iterator[dict[str, Any]]:
    """A step that packs and, where tokens leave in blocks, one that does not."""
    for is_flush in (True, False) if cell.plan.quantum > 1 else (True,):
        append = append_call(cell, is_flush=is_flush)
        yield {
            "suite": "append",
            "name": f"{cell.name}{'' if is_flush else ', nothing packed'}",
            "cell": cell._asdict(),
            "rows": cell.batch * cell.num_heads,
            "time_us": round(graph_time_us([append] * APPENDS), 2),
        }


def _event_time_us(call: Any, repeats: int = 9, calls: int = 5) -> float:
    """Median time of a call between events: it copies numbers from the host, so no graph."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)
