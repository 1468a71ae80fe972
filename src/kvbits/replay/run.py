"""Replay of a whole slice: examples one by one or in several processes, files, progress."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvbits.evaluation.records import library_versions
from kvbits.plan import CachePlan
from kvbits.plan.files import write_text
from kvbits.replay.harness import ExampleResult, Workload, replay_example
from kvbits.replay.metrics import summarise
from kvbits.replay.model import cache_of, check_model, next_logits
from kvbits.replay.packed import Agreement, run_packed
from kvbits.replay.scoring import score

Progress = Callable[[], None]
LoadModel = Callable[[], tuple[Any, Any]]  # model and tokenizer; of a module, so that it pickles


class Outcome(NamedTuple):
    """A replayed slice.

    Attributes:
        workload: What was replayed.
        examples: Its examples, in order.
        metrics: See ``metrics.summarise``; ``task_score`` (0 to 100) too where text was free.
        agreement: With the packed cache, where it was asked for.
    """

    workload: Workload
    examples: tuple[ExampleResult, ...]
    metrics: dict[str, float]
    agreement: Agreement | None


def replay_slice(
    workload: Workload,
    *,
    packed: bool = False,
    num_workers: int = 1,
    load_model: LoadModel | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Replay every example of a slice.

    Args:
        workload: Model, slice and policy.
        packed: Whether to run the decisions on the packed cache too.
        num_workers: Processes that replay examples; results do not depend on it.
        load_model: Loads the model in each of them; needed for more than one.
        progress: Called after every example.

    Raises:
        PolicyError: If a hook fails.
        PlanError: If the policy is a plan, and not one for this model.
        UnsupportedModelError: If the model's cache cannot be replayed.
    """
    check_model(workload.model)
    if workload.policy.endswith(".json"):
        CachePlan.load(workload.policy).check(workload.model.config)
    found = []
    with _results(workload, num_workers, load_model) as results:
        for result in results:
            found.append(result)
            if progress is not None:
                progress()
    metrics = summarise(found, workload.budget_bits)
    if workload.mode == "free":
        pairs = zip(workload.slice.examples, found, strict=True)
        scores = [score(example, result.text) for example, result in pairs]
        metrics["task_score"] = sum(scores) / len(scores)
    agreement = run_packed(workload, found) if packed else None
    return Outcome(workload, tuple(found), metrics, agreement)


@contextmanager
def _results(
    workload: Workload, num_workers: int, load_model: LoadModel | None
) -> Iterator[Iterator[ExampleResult]]:
    if num_workers == 1:
        _warm_up(workload)
        yield (replay_example(workload, example) for example in workload.slice.examples)
        return
    if load_model is None:
        raise ValueError(f"load_model must be given for {num_workers} workers, got None")
    light = workload._replace(model=None, tokenizer=None)
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(light, load_model, torch.get_num_threads()),
    ) as pool:
        # As many threads as here: how sums are split decides their last digits.
        yield pool.map(_replay_index, range(len(workload.slice.examples)))


_here: dict[str, Workload] = {}  # of a worker process


def _start_worker(light: Workload, load_model: LoadModel, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    model, tokenizer = load_model()
    _here["workload"] = light._replace(model=model, tokenizer=tokenizer)
    _warm_up(_here["workload"])


def _replay_index(index: int) -> ExampleResult:
    workload = _here["workload"]
    return replay_example(workload, workload.slice.examples[index])


@torch.no_grad()
def _warm_up(workload: Workload) -> None:
    """One prompt and one step that are not timed."""
    cache = cache_of([])
    for ids in (workload.ids(workload.slice.examples[0]), [0]):
        next_logits(workload.model, ids, cache)


# ----- files


def record_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a replay: metrics, and what is needed to repeat it."""
    workload = outcome.workload
    return {
        "workload": workload.slice.name,
        "slice_sha256": workload.slice.sha256,
        "policy": policy_name(workload.policy),
        "policy_sha256": policy_digest(workload.policy),
        "model": workload.model_id,
        "mode": workload.mode,
        "budget_bits": workload.budget_bits,
        "seed": workload.seed,
        "metrics": outcome.metrics,
        "packed": None if outcome.agreement is None else outcome.agreement._asdict(),
        "versions": library_versions() | {"device": workload.model.device.type},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def trace_of(outcome: Outcome) -> dict[str, Any]:
    """Every decision and what came of it, step by step."""
    return record_of(outcome) | {
        "examples": [
            {
                "example_id": each.example_id,
                "prompt_tokens": each.prompt_tokens,
                "text": each.text,
                "plan": [settings._asdict() for settings in each.settings],
                "steps": [
                    step._asdict() | {"tensors": [tensor._asdict() for tensor in step.tensors]}
                    for step in each.steps
                ],
            }
            for each in outcome.examples
        ]
    }


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write ``<workload>_trace.json`` and ``<workload>_metrics.json``, keys sorted."""
    name = outcome.workload.slice.name
    for kind, content in (("trace", trace_of(outcome)), ("metrics", record_of(outcome))):
        text = json.dumps(content, sort_keys=True, indent=1, allow_nan=False)
        write_text(folder / f"{name}_{kind}.json", text + "\n")


def policy_name(source: str) -> str:
    """A policy in records: its file without the folder, or its built-in name."""
    return source.rsplit("/", 1)[-1]


def policy_digest(source: str) -> str | None:
    """SHA-256 of a policy's file; None for one of the package, which its version names."""
    path = Path(source.partition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
