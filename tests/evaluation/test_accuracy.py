"""Batched greedy generation gives what one problem at a time gives, whatever the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvbits.attention.hf import is_enabled
from kvbits.evaluation.accuracy import Accuracy, paired_difference, run_task
from kvbits.evaluation.corpora import encode_document
from kvbits.evaluation.tasks import Example, KeyValueRecall
from kvbits.plan import CachePlan

PROMPTS = ["a", "some longer prompt", "key: value; key:", "0123456789" * 4, "b" * 25]


@dataclass
class Recorder:
    """A task of fixed prompts that notes every completion it is asked to judge."""

    expected: dict[str, str] = field(default_factory=dict)
    stop: str = "\n"
    name: str = "recorder"
    max_new_tokens: int = 24
    seen: dict[str, str] = field(default_factory=dict)

    def generate(self, n: int, *, seed: int, split: str) -> list[Example]:
        return [
            Example(prompt=prompt, answer="", completion="", task=self.name)
            for prompt in PROMPTS[:n]
        ]

    def is_correct(self, completion: str, example: Example) -> bool:
        self.seen[example.prompt] = completion
        return completion == self.expected.get(example.prompt)


def greedy_without_cache(model: Any, tokenizer: Any, prompt: str, task: Recorder) -> str:
    """Recompute everything for every token: no cache, no batch, no generate()."""
    ids = torch.tensor([encode_document(tokenizer, prompt)])
    start = ids.shape[1]
    while ids.shape[1] < start + task.max_new_tokens:
        with torch.no_grad():
            token = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        if token.item() == tokenizer.eos_token_id or task.stop in text:
            break
    head, found, _ = text.partition(task.stop)
    return head + found


@pytest.fixture(scope="module")
def expected(tiny):
    model, tokenizer = tiny
    return {
        prompt: greedy_without_cache(model, tokenizer, prompt, Recorder()) for prompt in PROMPTS
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_left_padded_batches_equal_single_problems(tiny, expected, batch_size):
    """Prompts of 2 to 41 tokens: padding that attends, or a wrong position, changes the text."""
    assert len(set(expected.values())) > 1
    task = Recorder(expected)
    found = run_task(*tiny, task, n=5, batch_size=batch_size)
    assert task.seen == expected
    assert found.correct == (True,) * 5


@pytest.mark.parametrize("batch_size", [2, 5])
def test_packed_batches_equal_single_problems(tiny, batch_size):
    model, tokenizer = tiny
    plan = CachePlan.uniform(model.config, 4, 4)
    single, batched = Recorder(), Recorder()
    run_task(model, tokenizer, single, n=5, batch_size=1, plan=plan)
    run_task(model, tokenizer, batched, n=5, batch_size=batch_size, plan=plan)
    assert batched.seen == single.seen


def test_few_bits_change_the_completions(tiny, expected):
    """Generation reads the packed cache: a model as small as this loses its thread at 2 bits."""
    model, tokenizer = tiny
    task = Recorder(expected)
    plan = CachePlan.uniform(model.config, 2, 2)
    run_task(model, tokenizer, task, n=5, plan=plan, quantize_prefill=True)
    assert task.seen != expected
    assert not is_enabled(model)


def test_generation_ends_at_the_stop_string(tiny, expected):
    """The stop string may span tokens; what follows it in the batch is cut."""
    prompt = PROMPTS[1]
    text = expected[prompt]
    stop = text[3:6]
    assert len(stop) == 3
    task = Recorder(stop=stop)
    run_task(*tiny, task, n=5)
    assert task.seen[prompt] == text[: text.index(stop)] + stop


def test_defaults_of_the_model_do_not_matter(tiny, expected, monkeypatch):
    model, tokenizer = tiny
    config = model.generation_config
    for name, value in {
        "do_sample": True,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "num_beams": 3,
        "min_new_tokens": 20,
        "max_length": 10,
        "cache_implementation": "static",
    }.items():
        monkeypatch.setattr(config, name, value)
    task = Recorder(expected)
    assert run_task(model, tokenizer, task, n=5).accuracy == 1.0


def test_results_stand_in_the_order_of_the_problems(tiny, expected):
    """Batches are sorted by length; outcomes are not."""
    known = {prompt: expected[prompt] for prompt in (PROMPTS[0], PROMPTS[3])}
    found = run_task(*tiny, Recorder(known), n=5, batch_size=2)
    assert found.correct == (True, False, False, True, False)
    assert (found.n, found.accuracy) == (5, 0.4)


def test_a_generated_task_runs_and_repeats(tiny):
    model, tokenizer = tiny
    plan = CachePlan.uniform(model.config, 8, 2)
    done: list[int] = []
    runs = [
        run_task(
            model,
            tokenizer,
            KeyValueRecall(num_pairs=3),
            n=3,
            seed=1,
            plan=plan,
            batch_size=2,
            progress=done.append,
        )
        for _ in range(2)
    ]
    assert runs[0]._replace(seconds=0) == runs[1]._replace(seconds=0)
    assert runs[0].cache_bytes > 0
    assert sum(done) == 6


def test_packed_caches_are_smaller(tiny):
    model, tokenizer = tiny
    plan = CachePlan.uniform(model.config, 2, 2)
    sizes = [
        run_task(model, tokenizer, KeyValueRecall(num_pairs=8), n=2, plan=each).cache_bytes
        for each in (None, plan)
    ]
    assert sizes[1] < sizes[0] / 4  # float32 states against 2 bits and parameters, in whole pages


def test_accuracies_of_two_plans_are_paired():
    a = Accuracy("t", 4, (True, True, True, False), 0.75, 0.2, 1.0, 1)
    b = Accuracy("t", 4, (True, False, True, False), 0.5, 0.25, 1.0, 1)
    assert paired_difference(a, b).difference == 0.25
    with pytest.raises(ValueError, match="a and b must be of the same task, got 't' and 'u'"):
        paired_difference(a, b._replace(task="u"))


def test_no_problems_are_refused(tiny):
    with pytest.raises(ValueError, match=r"n and batch_size must be at least 1, got 0 and \d+"):
        run_task(*tiny, Recorder(), n=0)
