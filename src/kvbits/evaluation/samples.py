"""What became of every example of a task: the records behind a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvbits.evaluation.jsonl import parse, read_json_lines
from kvbits.plan.files import write_text

MAX_RESPONSE_CHARACTERS = 20_000


class Sample(BaseModel):
    """One example of a task, scored.

    Args:
        task: Name of the task.
        filter: The harness's name for how the answer was read; one example may be read in several.
        doc_id: Number of the example in its split.
        doc_hash: Hash of the example, so that another one of that number is told apart.
        prompt_hash: Hash of the prompt, few-shot examples included.
        metrics: Its score by every metric; of perplexities, the mean log-likelihood behind it.
        weights: By metric: words or bytes behind such a mean.
        response: What was answered, where something was generated.
        response_tokens: Tokens of the whole answer, as the model's tokenizer counts its text.
        group: Part of the task it belongs to, such as a subject.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: str = Field(min_length=1)
    filter: str
    doc_id: int = Field(ge=0)
    doc_hash: str
    prompt_hash: str
    metrics: dict[str, float]
    weights: dict[str, float] = Field(default_factory=dict)
    response: str | None = None
    response_tokens: int | None = Field(default=None, ge=0)
    group: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others of a run."""
        return self.task, self.filter, self.doc_id


def from_harness(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    count_tokens: Callable[[str], int] | None = None,
) -> list[Sample]:
    """Read the samples that lm-evaluation-harness logs, by task.

    Args:
        samples: What it logged.
        count_tokens: Counts the tokens of answers; without it they are not recorded.
    """
    return [
        _sample(task, entry, count_tokens)
        for task, entries in samples.items()
        for entry in entries
    ]


def _sample(
    task: str, entry: Mapping[str, Any], count_tokens: Callable[[str], int] | None
) -> Sample:
    metrics, weights = {}, {}
    for name in entry["metrics"]:
        value = entry[name]
        if isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_finite, value)):
            total, weight = map(float, value)
            if weight > 0:  # perplexities: what is logged is a log-likelihood and a count
                name = f"log-likelihood ({name})"
                metrics[name], weights[name] = total / weight, weight
        elif _is_finite(value):
            metrics[name] = float(value)
    answers = entry["filtered_resps"]
    text = answers[0] if len(answers) == 1 and isinstance(answers[0], str) else None
    return Sample(
        task=task,
        filter=str(entry["filter"]),
        doc_id=int(entry["doc_id"]),
        doc_hash=str(entry["doc_hash"]),
        prompt_hash=str(entry["prompt_hash"]),
        metrics=metrics,
        weights=weights,
        response=None if text is None else text[:MAX_RESPONSE_CHARACTERS],
        response_tokens=_response_tokens(entry, count_tokens),
    )


def _response_tokens(
    entry: Mapping[str, Any], count_tokens: Callable[[str], int] | None
) -> int | None:
    """Tokens of what was generated, before any filter; None for log-likelihoods."""
    answers = entry.get("resps") or [[]]
    whole = answers[0][0] if len(answers) == 1 and len(answers[0]) == 1 else None
    return count_tokens(whole) if count_tokens is not None and isinstance(whole, str) else None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples, one a line, whole or not at all."""
    write_text(path, "".join(f"{sample.model_dump_json()}\n" for sample in samples))


def read_samples(path: Path) -> list[Sample]:
    """Read samples strictly.

    Raises:
        RecordError: If a line is not a sample.
    """
    return [
        parse(Sample, value, f"{path}:{i}")
        for i, value in enumerate(read_json_lines(path), start=1)
    ]
