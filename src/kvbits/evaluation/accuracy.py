"""Accuracy on generated tasks: greedy generation through the cache, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvbits.calibration.placement import input_device
from kvbits.evaluation.corpora import encode_document
from kvbits.evaluation.statistics import Difference, proportion
from kvbits.evaluation.statistics import paired_difference as paired_outcomes
from kvbits.evaluation.stream import attention_for, cache_nbytes, new_cache
from kvbits.evaluation.tasks import Split, Task

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Accuracy(NamedTuple):
    """Outcome of a task.

    Attributes:
        task: its name.
        n: number of problems.
        correct: outcome of each problem, in the order in which they were generated.
        accuracy: share of correct ones.
        standard_error: binomial standard error of the share.
        seconds: wall time of the generation.
        cache_bytes: bytes of a full batch's cache, at most.
    """

    task: str
    n: int
    correct: tuple[bool, ...]
    accuracy: float
    standard_error: float
    seconds: float
    cache_bytes: int


class _StopString(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its completion holds the stop string."""

    def __init__(self, tokenizer: Any, stop: str, prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        # a token holds at least one byte, so the newest end of the string lies within these
        self.num_tokens = len(stop.encode()) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :][:, -self.num_tokens :]
        ends = [self.stop in text for text in self.tokenizer.batch_decode(new)]
        return torch.tensor(ends, device=input_ids.device)


def run_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    plan: CachePlan | None = None,
    batch_size: int = 64,
    quantize_prefill: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Accuracy:
    """Let a model solve ``n`` generated problems by greedy decoding through a plan's cache.

    The same arguments give the same problems and answers. Batches are made of prompts of similar
    length; another ``batch_size`` may round differently, so compare plans at the same one.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        task: the problems, and the judge of the answers.
        n: number of problems.
        seed: seed of the problems.
        split: split of the problems.
        plan: the cache plan; None means full precision.
        batch_size: problems generated at once.
        quantize_prefill: let the prompt, too, see decoded states; off as in deployment.
        progress: called with the number of problems done.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    started = time.perf_counter()
    examples = task.generate(n, seed=seed, split=split)
    prompts = [encode_document(tokenizer, example.prompt) for example in examples]
    correct, most_bytes = [False] * n, 0
    with attention_for(model, plan), _own_defaults(model):
        for rows in _batches(prompts, batch_size):
            cache = new_cache(model, plan, quantize_prefill=quantize_prefill)
            texts = _generate(model, tokenizer, task, [prompts[row] for row in rows], cache)
            for row, text in zip(rows, texts, strict=True):
                correct[row] = task.is_correct(text, examples[row])
            most_bytes = max(most_bytes, cache_nbytes(cache))
            if progress is not None:
                progress(len(rows))
    seconds = time.perf_counter() - started
    return Accuracy(task.name, n, tuple(correct), *proportion(correct), seconds, most_bytes)


def paired_difference(a: Accuracy, b: Accuracy) -> Difference:
    """Return ``a``'s accuracy minus ``b``'s on the same problems, with its 95 % interval."""
    if a.task != b.task:
        raise ValueError(f"a and b must be of the same task, got {a.task!r} and {b.task!r}")
    return paired_outcomes(a.correct, b.correct)


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield problem numbers, longest prompts first, so that memory is greatest at the start."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _generate(
    model: Any, tokenizer: Any, task: Task, prompts: Sequence[Sequence[int]], cache: Any
) -> list[str]:
    """Complete left-padded prompts greedily; texts are cut after the first stop string."""
    width = max(map(len, prompts))
    padding = _padding_token(model, tokenizer)
    ids = torch.full((len(prompts), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            ids.to(input_device(model)),
            attention_mask=mask.to(input_device(model)),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            pad_token_id=padding,
            eos_token_id=_end_tokens(model, tokenizer),
            stopping_criteria=StoppingCriteriaList([_StopString(tokenizer, task.stop, width)]),
        )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [_until(text, task.stop) for text in texts]


@contextmanager
def _own_defaults(model: Any) -> Iterator[None]:
    """Set the model's generation config aside: Qwen's, for one, penalises repetition."""
    former = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=former.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = former


def _padding_token(model: Any, tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, model.config.get_text_config().pad_token_id):
        if token is not None and token >= 0:
            return int(token)
    return 0


def _end_tokens(model: Any, tokenizer: Any) -> Any:
    own = model.generation_config.eos_token_id
    return tokenizer.eos_token_id if own is None else own


def _until(text: str, stop: str) -> str:
    head, found, _ = text.partition(stop)
    return head + found


__all__ = ["Accuracy", "Difference", "paired_difference", "run_task"]
