"""GPU time: replays of a captured graph, rotated over layers so that no run hits the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

Call = Callable[[], object]
REPEATS = 9
TARGET_MS = 3.0  # a timed stretch is at least this long
COLD_BYTES = 200 << 20  # read in turn, several times the cache of any GPU


def num_copies(num_bytes: int) -> int:
    """Copies of ``num_bytes`` to go through in turn so that none is found in the cache."""
    return max(2, -(-COLD_BYTES // num_bytes))


def graph_time_us(
    calls: Sequence[Call], *, repeats: int = REPEATS, target_ms: float = TARGET_MS
) -> float:
    """Median time of one call in microseconds, over replays of a graph of all calls in turn."""
    for call in calls:  # compiles, and builds what must not be built under capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = _elapsed_ms(graph, 1)
    count = max(1, int(target_ms / max(once, 1e-3)))
    times = [_elapsed_ms(graph, count) for _ in range(repeats)]
    return statistics.median(times) / count / len(calls) * 1e3


def _elapsed_ms(graph: torch.cuda.CUDAGraph, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@triton.jit  # type: ignore[untyped-decorator]
def _read(X, OUT, BLOCK: tl.constexpr, TURNS: tl.constexpr):  # type: ignore[no-untyped-def]
    p_x = X + tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for i in range(TURNS):
        b_sum += tl.load(p_x + i * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(b_sum, 0) == 123456789:
        tl.store(OUT, 1)


class ReadFloor:
    """How fast the GPU reads memory and does nothing else: the limit for any attention kernel.

    Args:
        pool_bytes: Memory to read from, several times the cache.
    """

    _SHAPES = ((2048, 4, 8), (4096, 8, 8), (2048, 4, 2), (2048, 4, 1))  # block, warps, turns

    def __init__(self, pool_bytes: int = 4 << 30) -> None:
        self._pool = torch.randint(0, 1000, (pool_bytes // 4,), device="cuda", dtype=torch.int32)
        self._out = torch.zeros(1, device="cuda", dtype=torch.int32)

    def time_us(self, num_bytes: int) -> float:
        """Least time to read ``num_bytes`` once."""
        return min(self._time_us(num_bytes, *shape) for shape in self._SHAPES)

    def bandwidth_gb_s(self) -> float:
        """Bandwidth of a read of the whole pool, in GB/s."""
        num_bytes = self._pool.nbytes
        return num_bytes / self.time_us(num_bytes) / 1e3

    def _time_us(self, num_bytes: int, block: int, warps: int, turns: int) -> float:
        values = block * turns
        programs = max(1, num_bytes // (4 * values))
        layers = max(1, min(num_copies(num_bytes), len(self._pool) // (programs * values)))
        programs = min(programs, len(self._pool) // values)

        def call(layer: int) -> Call:
            part = self._pool[layer * programs * values :]
            return lambda: _read[(programs,)](
                part, self._out, BLOCK=block, TURNS=turns, num_warps=warps
            )

        time_us = graph_time_us([call(layer) for layer in range(layers)], repeats=5)
        return time_us * num_bytes / (4 * programs * values)
