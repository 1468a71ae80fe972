"""Compile kernels ahead of a measurement, in processes: Triton keeps them on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from kvbits.attention.api import attend as attend_states
from kvbits.bench.kernels import (
    Cell,
    program_variants,
    random_query,
    random_states,
    schedule_of,
)
from kvbits.cache.layer import PackedLayer
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.plan import CachePlan

TOKENS = 700  # enough for a packed page under the plans of benchmarks


class CellJob(NamedTuple):
    """A cell of a kernel benchmark; with the programs that a search tries, if it is searched."""

    cell: Cell
    is_searched: bool = False


class LayerJob(NamedTuple):
    """One layer of a model under its plan."""

    plan: LayerPlan
    layer: LayerGeometry
    num_query_heads: int


def compile_ahead(jobs: Iterable[CellJob | LayerJob]) -> list[str]:
    """Run every job once on a small batch, so that Triton's cache on disk holds its kernels.

    Args:
        jobs: Cells of a kernel benchmark, or layers; equal ones run once.

    Returns:
        What failed, one line each.
    """
    unique = list(dict.fromkeys(_small(job) for job in jobs))
    processes = max(1, (os.cpu_count() or 2) * 3 // 4)
    parts = [unique[i::processes] for i in range(processes) if unique[i::processes]]
    if not parts:
        return []
    with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
        return [line for lines in pool.map(_compile, parts) for line in lines]


def layer_jobs(plans: Sequence[CachePlan]) -> list[LayerJob]:
    """The layers of plans that kernels would run."""
    return [
        LayerJob(plan, layer, cache_plan.model.num_attention_heads)
        for cache_plan in plans
        for plan, layer in zip(cache_plan.layers, cache_plan.model.layers, strict=True)
        if layer.holds_states
    ]


def _small(job: CellJob | LayerJob) -> CellJob | LayerJob:
    if isinstance(job, LayerJob):
        return job
    context = max(TOKENS, 4 * job.cell.num_queries)
    return job._replace(cell=job.cell._replace(batch=1, context=context, shortest=1.0))


def _compile(jobs: Sequence[CellJob | LayerJob]) -> list[str]:
    failures = []
    for job in jobs:
        work: Callable[[Any], None] = _run_cell if isinstance(job, CellJob) else _run_layer
        try:
            work(job)
            torch.cuda.synchronize()
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"{job}: {line[:200]}")
    return failures


def _run_cell(job: CellJob) -> None:
    from kvbits.attention.triton.decode import attend

    cell, is_searched = job
    states = random_states(cell)
    shipped = schedule_of(cell, states)
    for schedule in program_variants(shipped) if is_searched else [shipped]:
        with suppress(OutOfResources):
            attend(random_query(cell), states, 1.0, window=cell.window or None, schedule=schedule)


def _run_layer(job: LayerJob) -> None:
    """A prompt, a step, and attention over both."""
    layer = PackedLayer(job.plan, max_tokens=TOKENS + 1)
    heads = job.layer.num_key_value_heads
    for num_tokens in (TOKENS, 1):
        keys, values = (
            torch.randn(1, num_tokens, heads, width, device="cuda", dtype=torch.bfloat16)
            for width in (job.layer.key_head_dim, job.layer.value_head_dim)
        )
        states = layer.update(keys.transpose(1, 2), values.transpose(1, 2))
    query = torch.randn(1, job.num_query_heads, 1, job.layer.key_head_dim, device="cuda")
    attend_states(query.to(torch.bfloat16), states, None, 1.0, window=job.layer.sliding_window)
