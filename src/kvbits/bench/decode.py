"""Decode speed of a whole model: tokens per second, step time and peak memory by cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from kvbits.attention.api import Impl
from kvbits.bench import step_profile
from kvbits.bench.workloads import Variant, Workload, cache_bytes, fill
from kvbits.generation import Generation, generate


def measure(
    model: Any,
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    *,
    is_prompted: bool = False,
    repeats: int = 1,
    impl: Impl = "auto",
    is_profiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """One record per workload and variant; ``speedup`` is over the first variant.

    Args:
        model: A causal language model.
        variants: Caches to measure.
        workloads: Batches and contexts.
        is_prompted: Whether the context is a prompt of random tokens that the model runs, instead
            of random states that are stored.
        repeats: Interleaved runs of which the median counts; more than one on machines where
            other programs run.
        impl: See ``CachePlan.new_cache``.
        is_profiled: Whether to add a record each of what a step's time is made of; on a CUDA
            device only. They come last: once a profiler has run, launches of graphs take longer.
    """
    run = partial(_run, model, is_prompted=is_prompted, impl=impl)
    for workload in workloads:
        runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
        if impl == "compiled":  # before the clock runs
            for variant in variants:
                run(variant, workload._replace(new_tokens=2))
        for _ in range(repeats):
            for variant in variants:
                runs[variant.name].append(run(variant, workload))
        medians = [_median(runs[variant.name]) for variant in variants]
        for record in medians:
            if "step_ms" in record and "step_ms" in medians[0]:
                record["speedup"] = round(medians[0]["step_ms"] / record["step_ms"], 3)
            yield record
    for workload in workloads if is_profiled else ():
        for variant in variants:
            yield _profile(model, variant, workload, impl)


def _median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle, with the spread of all."""
    ordered = sorted(runs, key=lambda run: run.get("step_ms", 0))
    middle = dict(ordered[len(ordered) // 2])
    if len(runs) > 1 and "step_ms" in middle:
        middle["step_ms_spread"] = [ordered[0]["step_ms"], ordered[-1]["step_ms"]]
        middle["repeats"] = len(runs)
    return middle


def _run(
    model: Any,
    variant: Variant,
    workload: Workload,
    *,
    is_prompted: bool,
    impl: Impl,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "variant": variant.name,
        "batch": workload.batch,
        "context": workload.context,
        "new_tokens": workload.new_tokens,
        "is_prompted": is_prompted,
        "impl": impl,
    }
    if variant.plan is not None:
        record["effective_bits"] = round(variant.plan.effective_bits, 4)
    try:
        cache, made, seconds = _decode(model, variant, workload, is_prompted, impl)
    except torch.cuda.OutOfMemoryError:
        _release(model)
        return record | {"error": "out of memory"}
    step_ms = made.decode_seconds / made.num_steps * 1e3
    record |= {
        "step_ms": round(step_ms, 3),
        "tokens_per_second": round(workload.batch / step_ms * 1e3, 1),
        "is_captured": made.is_captured,
        "cache_bytes": cache_bytes(cache),
    }
    if is_prompted:  # everything but compiling and capturing
        steps = workload.new_tokens - 1
        whole = made.prefill_seconds + steps * step_ms / 1e3
        record["prefill_seconds"] = round(made.prefill_seconds, 4)
        record["generated_per_second"] = round(workload.batch * workload.new_tokens / whole, 1)
    if model.device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
    record["wall_seconds"] = round(seconds, 2)
    del cache
    _release(model)
    return record


def _profile(model: Any, variant: Variant, workload: Workload, impl: Impl) -> dict[str, Any]:
    batch, context, _ = workload
    record: dict[str, Any] = {"variant": variant.name, "batch": batch, "context": context}
    try:
        cache = variant.new_cache(model, context + step_profile.STEPS, impl)
        fill(model, cache, batch, context)
        record["kernel_ms"] = step_profile.kernel_ms(model, cache, batch)
    except torch.cuda.OutOfMemoryError:
        record["error"] = "out of memory"
    _release(model)
    return record


def _decode(
    model: Any,
    variant: Variant,
    workload: Workload,
    is_prompted: bool,
    impl: Impl,
) -> tuple[Any, Generation, float]:
    started = time.perf_counter()
    batch, context, new_tokens = workload
    is_cuda = model.device.type == "cuda"
    # On a CPU there is nothing to capture, and exact layers are the stock layers.
    room = context + new_tokens if is_cuda else None
    cache = variant.new_cache(model, room, impl)
    width = context
    if not is_prompted:
        fill(model, cache, batch, context)
        width = 1
    generator = torch.Generator(model.device).manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(0, vocabulary, (batch, width), generator=generator, device=model.device)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    made = generate(model, prompt, cache, max_new_tokens=new_tokens)
    return cache, made, time.perf_counter() - started


def _release(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
