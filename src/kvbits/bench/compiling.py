"""Compile the kernels of many cells at once, in processes, before anything is timed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence

from kvbits.attention.triton.schedule import Schedule
from kvbits.bench.kernels import Cell

Job = tuple[Cell, Schedule | None]


def compile_ahead(jobs: Sequence[Job], *, processes: int | None = None) -> list[str]:
    """Run every job once on a small batch, so that Triton's cache on disk holds its kernels.

    Args:
        jobs: Cells and how to launch them; None: as shipped.
        processes: Processes; default: three quarters of the cores.

    Returns:
        What failed, one line each.
    """
    processes = processes or max(1, (os.cpu_count() or 2) * 3 // 4)
    parts = [list(jobs[i::processes]) for i in range(processes) if jobs[i::processes]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(parts)) as pool:
        return [line for lines in pool.map(_compile, parts) for line in lines]


def _compile(jobs: Sequence[Job]) -> list[str]:
    from kvbits.attention.triton.decode import attend
    from kvbits.bench.kernels import random_query, random_states

    failures = []
    for cell, schedule in jobs:
        small = cell._replace(batch=1, context=max(512, 4 * cell.key_group) + cell.residual_length)
        try:
            attend(
                random_query(small),
                random_states(small),
                1.0,
                window=small.window or None,
                schedule=schedule and schedule._replace(splits=2),
            )
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"{cell.name} {schedule}: {line[:200]}")
    return failures
