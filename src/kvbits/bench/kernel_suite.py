"""Which cells ``kvbits bench kernels`` times, and the record of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvbits.bench.kernels import METHODS, Cell, CellBench, dense_times_us
from kvbits.bench.timing import ReadFloor

SHAPES = ((32, 32768), (8, 32768), (1, 32768), (1, 2048))
PAIRS = ((8, 8), (8, 4), (4, 4), (4, 2), (3, 3), (2, 2))
METHOD_SHAPES = [
    (SHAPES[1], 2, "hadamard"),
    (SHAPES[1], 2, "kvarn"),
    (SHAPES[1], 3, "turboquant"),
    (SHAPES[1], 3, "kvquant"),
    (SHAPES[1], 2, "kvquant"),
    (SHAPES[0], 4, "kvquant"),
    (SHAPES[2], 4, "kvquant"),
    (SHAPES[3], 4, "kvquant"),
    (SHAPES[3], 4, "hadamard"),
]
CONTEXTS = (2048, 8192, 131072)  # beside 32k, for time against context

Suite = dict[str, list[Cell]]


def suites() -> Suite:
    """Cells by what they ask."""
    main = [Cell(*shape, *pair) for shape in SHAPES for pair in PAIRS]
    exact = [Cell(*shape, 16, 16) for shape in SHAPES]
    return {
        "per token": main,
        "exact": exact,
        "per channel": [*_per_channel(32), *_per_channel(8), *_per_channel(1)],
        "GQA 8": [
            Cell(batch, 32768, *pair, group_queries=8)
            for batch in (32, 8)
            for pair in ((8, 8), (4, 4), (3, 3), (2, 2))
        ],
        "head_dim": [
            Cell(8, 32768, bits, bits, head_dim=dim) for dim in (64, 96, 256) for bits in (4, 2)
        ],
        "several queries": [
            Cell(8, 32768, 4, 4, num_queries=queries) for queries in (2, 8, 32, 128)
        ],
        "ragged": [Cell(32, 32768, bits, bits, shortest=0.1) for bits in (4, 2)],
        "window": [Cell(8, 32768, bits, bits, window=4096) for bits in (16, 4)],
        "methods": [
            *(Cell(*SHAPES[1], 4, 4, method=method) for method in METHODS),
            *(Cell(*shape, bits, bits, method=method) for shape, bits, method in METHOD_SHAPES),
        ],
        "contexts": [
            Cell(8, context, *pair)
            for context in CONTEXTS
            for pair in ((16, 16), (8, 8), (4, 4), (2, 2))
        ],
    }


def _per_channel(batch: int) -> Iterator[Cell]:
    for bits, group, groups in ((4, 128, 1), (4, 64, 2), (4, 32, 4), (2, 128, 1), (2, 128, 4)):
        yield Cell(batch, 32768, bits, bits, key_group=group, value_groups=groups)


def measure(
    suite: str, cells: Sequence[Cell], *, is_searched: bool = False
) -> Iterator[dict[str, Any]]:
    """Time cells against 16-bit attention and the read roofline; one record each.

    Args:
        suite: Name of the suite, for the records.
        cells: What to time.
        is_searched: Whether to look for a faster schedule than the shipped one.
    """
    floor = ReadFloor()
    bandwidth = floor.bandwidth_gb_s()
    dense: dict[tuple[int, ...], dict[str, float]] = {}
    for cell in cells:
        shape = (
            cell.batch,
            _dense_context(cell),
            cell.num_heads,
            cell.group_queries,
            cell.head_dim,
            cell.num_queries,
        )
        if shape not in dense:
            dense[shape] = dense_times_us(cell.batch, _dense_context(cell), cell)
            torch.cuda.empty_cache()
        bench = CellBench(cell)
        time_us = bench.time_us()
        record = {
            "suite": suite,
            "name": cell.name,
            "cell": cell._asdict(),
            "schedule": str(bench.shipped),
            "time_us": round(time_us, 2),
            "exact_us": {name: round(value, 2) for name, value in dense[shape].items()},
            "speedup": round(min(dense[shape].values()) / time_us, 3),
            "num_bytes": bench.num_bytes,
            "read_gb_s": round(bandwidth),
            "roofline_share": round(floor.time_us(bench.num_bytes) / time_us, 3),
        }
        if is_searched:
            best_us, best = bench.best()
            record |= {"best_us": round(best_us, 2), "best_schedule": best._asdict()}
        yield record
        del bench
        torch.cuda.empty_cache()


def _dense_context(cell: Cell) -> int:
    """A stock sliding layer holds its window alone."""
    return min(cell.context, cell.window or cell.context)
