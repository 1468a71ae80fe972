"""Running a benchmark: batches through the cache, a record of every item, and resumption."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvbits.evaluation.benchmarks.answering import Engine
from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Item,
    Response,
    Setup,
)
from kvbits.evaluation.benchmarks.prompts import Prompter, kind_of, size_of
from kvbits.evaluation.benchmarks.source import Source
from kvbits.evaluation.generating import own_defaults
from kvbits.evaluation.harness_run import RESULTS, SAMPLES
from kvbits.evaluation.jsonl import append_json_line
from kvbits.evaluation.samples import Sample, read_samples, write_samples
from kvbits.plan.files import write_text

if TYPE_CHECKING:
    from kvbits.plan import CachePlan

PARTIAL, ANSWERS = ".partial.jsonl", ".answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a benchmark is run; the same for all of them.

    Args:
        shots: Examples before each question.
        chat_template: Wrap prompts as the tokenizer says.
        chat_settings: What to tell the template, such as ``enable_thinking``.
        multi_turn: With a chat template, examples as turns.
        limit: Items of each group at most; None is all.
        batch_size: Items answered at once.
        max_length: Tokens of a prompt at most; None is what the model's context leaves.
        seed: Seed of everything random.
        quantize_prefill: Whether prompts of generation, too, see decoded states.

    Raises:
        ValueError: If one is out of range.
    """

    shots: int = 0
    chat_template: bool = False
    chat_settings: Mapping[str, Any] = field(default_factory=dict)
    multi_turn: bool = False
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0
    quantize_prefill: bool = False

    def __post_init__(self) -> None:
        least = {"shots": 0, "limit": 1, "batch_size": 1, "max_length": 2}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")


class Outcome(NamedTuple):
    """What a run found.

    Attributes:
        samples: One record an item, in the order of the items.
        submissions: Answers in the form of the benchmark's own scorer, if it has one.
        cache_bytes: Bytes of a batch's cache, at most.
        seconds: Wall time of this run; less than all of it if it resumed.
    """

    samples: list[Sample]
    submissions: list[dict[str, Any]]
    cache_bytes: int
    seconds: float


def make_items(
    benchmark: Benchmark, source: Source, tokenizer: Any, settings: RunSettings
) -> list[Item]:
    """The items of a run, at most ``limit`` of each group.

    Raises:
        ValueError: If there are none, or data is missing.
    """
    setup = Setup(
        source=source,
        tokenizer=tokenizer,
        shots=settings.shots,
        seed=settings.seed,
        is_chat=settings.chat_template,
    )
    found = list(_limited(benchmark.items(setup), settings.limit))
    if not found:
        raise ValueError(f"{benchmark.name} must have at least one item, got none")
    return found


def run_benchmark(
    benchmark: Benchmark,
    items: Sequence[Item],
    model: Any,
    tokenizer: Any,
    plan: CachePlan | None,
    settings: RunSettings,
    *,
    folder: Path | None = None,
    execute: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Ask a model every item, with a new cache for every batch.

    Batches hold items of similar length and depend on nothing but items and ``batch_size``; a run
    that was killed goes on after its last whole batch.

    Args:
        benchmark: What judges.
        items: What `make_items` made.
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        plan: The cache plan; None is full precision.
        settings: How to run.
        folder: Where finished items are kept; None keeps nothing.
        execute: Runs a program of the benchmark and says whether it ended well.
        progress: Called with the number of items done.

    Raises:
        ValueError: If a prompt is too long.
    """
    started = time.perf_counter()
    prompter = make_prompter(model, tokenizer, settings)
    partial = None if folder is None else folder / f"{benchmark.name}{PARTIAL}"
    samples = _read_partial(partial)
    engine = Engine(model, tokenizer, plan, prompter, settings.quantize_prefill)
    with own_defaults(model):
        for batch in _batches(items, settings.batch_size):
            missing = [item for item in batch if item.doc_id not in samples]
            responses = engine.answer(batch) if missing else []
            for item, response in zip(batch, responses, strict=bool(missing)):
                if item.doc_id in samples:
                    continue
                sample = _judged(benchmark, item, response, prompter, execute)
                if partial is not None:
                    append_json_line(partial, sample.model_dump())
                samples[item.doc_id] = sample
            if progress is not None:
                progress(len(batch))
    ordered = [samples[item.doc_id] for item in items]
    texts = [sample.response or "" for sample in ordered]
    made = [benchmark.submission(item, text) for item, text in zip(items, texts, strict=True)]
    submissions = [each for each in made if each is not None]
    return Outcome(ordered, submissions, engine.cache_bytes, time.perf_counter() - started)


def finish(
    folder: Path, benchmark: Benchmark, outcome: Outcome, results: Mapping[str, Any]
) -> None:
    """Keep what a run found; the results, which say that it is whole, are written last.

    Args:
        folder: Folder of the run.
        benchmark: The benchmark.
        outcome: What was found.
        results: What ``results.results`` made of it.
    """
    name = benchmark.name
    write_samples(folder / f"{name}{SAMPLES}", outcome.samples)
    if outcome.submissions:
        lines = "".join(f"{json.dumps(each)}\n" for each in outcome.submissions)
        write_text(folder / f"{name}{ANSWERS}", lines)
    write_text(folder / f"{name}{RESULTS}", json.dumps(results, indent=2) + "\n")
    (folder / f"{name}{PARTIAL}").unlink(missing_ok=True)


def make_prompter(model: Any, tokenizer: Any, settings: RunSettings) -> Prompter:
    """What turns prompts of a run into tokens of its model."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Prompter(
        tokenizer=tokenizer,
        chat_template=settings.chat_template,
        chat_settings=settings.chat_settings,
        multi_turn=settings.multi_turn,
        context_length=longest,
        max_length=settings.max_length,
    )


def _judged(
    benchmark: Benchmark,
    item: Item,
    response: Response,
    prompter: Prompter,
    execute: Callable[[str], bool] | None,
) -> Sample:
    metrics, weights = benchmark.score(item, response)
    text = response if isinstance(response, str) else None
    program = benchmark.program(item, text) if execute and text is not None else None
    if execute and program is not None:
        metrics = metrics | {"passed": float(execute(program))}
    return Sample(
        task=item.task or benchmark.name,
        filter="none",
        doc_id=item.doc_id,
        doc_hash=hashlib.sha256(json.dumps(item.doc, sort_keys=True).encode()).hexdigest(),
        prompt_hash=prompter.prompt_hash(item.request),
        metrics=metrics,
        weights=weights,
        response=text,
        response_tokens=None if text is None else prompter.count_tokens(text),
        group=item.group,
    )


def _limited(items: Iterable[Item], limit: int | None) -> Iterable[Item]:
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        seen[item.task, item.group] += 1
        if limit is None or seen[item.task, item.group] <= limit:
            yield item


def _batches(items: Sequence[Item], batch_size: int) -> Iterable[list[Item]]:
    """Batches of one kind, longest first, so that memory is greatest at the start."""
    kinds: dict[Any, list[Item]] = {}
    for item in items:
        kinds.setdefault(kind_of(item.request), []).append(item)
    for kind in kinds.values():
        kind.sort(key=lambda item: (-size_of(item.request), item.doc_id))
        for start in range(0, len(kind), batch_size):
            yield kind[start : start + batch_size]


def _read_partial(path: Path | None) -> dict[int, Sample]:
    found = [] if path is None or not path.exists() else read_samples(path)
    return {sample.doc_id: sample for sample in found}


def settings_of(benchmark: Benchmark, settings: RunSettings, source: Source) -> dict[str, Any]:
    """What a run was asked for, as JSON, with the checksums of the data it read."""
    own = benchmark.model_dump(mode="json")
    return {"benchmark": benchmark.name, "own": own, "data": source.checksums} | asdict(settings)
