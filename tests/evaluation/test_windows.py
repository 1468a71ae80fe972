"""Perplexity as KVQuant counts it: against its formula written out, and its draws."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from kvbits.errors import CalibrationError
from kvbits.evaluation.benchmarks import build_benchmark
from kvbits.evaluation.benchmarks.running import RunSettings, make_items, run_benchmark
from kvbits.evaluation.benchmarks.source import FolderSource
from kvbits.evaluation.windows import cut_windows, joined_ids, sampled_ids
from kvbits.plan import CachePlan

RAW = " \n = A title = \n \n The first text , of words .\n \n And a second one , no longer .\n"
ROWS = ["", " = A title = \n", "", " The first text , of words .\n", ""]
ROWS += [" And a second one , no longer .\n"]


def flags(windows):
    return [[part.is_counted for part in parts for _ in part.ids] for parts in windows]


def ids(windows):
    return [[token for part in parts for token in part.ids] for parts in windows]


def test_windows_follow_each_other_and_the_rest_is_left_out():
    windows = cut_windows(range(11), 4)
    assert ids(windows) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert flags(windows) == [[False, True, True, True]] * 2


def test_with_a_stride_every_token_but_the_first_counts_once():
    windows = cut_windows(range(10), 4, 2)
    counted = [
        token
        for tokens, row in zip(ids(windows), flags(windows), strict=True)
        for token, is_counted in zip(tokens, row, strict=True)
        if is_counted
    ]
    assert ids(windows) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert counted == list(range(1, 10))


def test_texts_are_joined_before_they_are_tokenized(tokenizer):
    assert joined_ids(tokenizer, ["ab", "", "c"], "\n\n") == tokenizer("ab\n\n\n\nc")["input_ids"]


def test_c4_is_drawn_as_kvquant_draws_it(tokenizer):
    """The oracle is its loop, with Python's global generator."""
    make = random.Random(5)
    texts = ["x" * make.randint(1, 60) for _ in range(50)]
    random.seed(0)
    expected = []
    for _ in range(8):
        while True:
            drawn = tokenizer(texts[random.randint(0, len(texts) - 1)])["input_ids"]
            if len(drawn) >= 30:
                break
        start = 0 if len(drawn) - 31 <= 0 else random.randint(0, len(drawn) - 31)
        expected += drawn[start : start + 30]
    assert sampled_ids(tokenizer, texts, 30, count=8) == expected
    with pytest.raises(CalibrationError, match="documents of at least 300 tokens, got 0"):
        sampled_ids(tokenizer, texts, 300, count=1)


@pytest.mark.parametrize(
    ("window", "stride", "error", "message"),
    [
        (1, None, ValueError, "window must be at least 2"),
        (4, 5, ValueError, "stride between 1 and window, got 4 and 5"),
        (20, None, CalibrationError, "text must have at least 20 tokens, got 10"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(window, stride, error, message):
    with pytest.raises(error, match=message):
        cut_windows(range(10), window, stride)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "wikitext2_test.raw").write_bytes(RAW.replace("\n", "\r\n").encode())
    lines = [json.dumps({"text": f"{word} " * 12}) for word in ("one", "two", "three")]
    (tmp_path / "c4_validation.jsonl").write_text("\n".join(lines) + "\n")
    return FolderSource(tmp_path)


def score(name, data, tiny, plan=None, limit=None, **settings):
    model, tokenizer = tiny
    benchmark = build_benchmark(name, **settings)
    run = RunSettings(limit=limit)
    items = make_items(benchmark, data, tokenizer, run)
    outcome = run_benchmark(benchmark, items, model, tokenizer, plan, run)
    return benchmark.summary(outcome.samples), outcome.samples


def test_wikitext_perplexity_is_kvquants_formula(data, tiny):
    """exp(sum of w * mean loss / (n * w)), from a plain forward pass of every window."""
    model, tokenizer = tiny
    window = 16
    tokens = tokenizer("\n\n".join(ROWS), return_tensors="pt")["input_ids"]
    n = tokens.numel() // window
    total = 0.0
    for i in range(n):
        part = tokens[:, i * window : (i + 1) * window]
        with torch.no_grad():
            logits = model(part).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:])
        total += float(loss) * window
    expected = math.exp(total / (n * window))
    found, samples = score("wikitext2", data, tiny, window=window)
    assert n == len(samples) == 5
    # float32 logits, summed in another order
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    means = torch.tensor([sample.metrics["log-likelihood (token)"] for sample in samples])
    error = found["perplexity"] * float(means.std(correction=1)) / math.sqrt(n)
    assert found["standard error of perplexity"] == pytest.approx(error, rel=1e-6)


def test_perplexity_goes_through_the_packed_cache(data, tiny):
    exact, _ = score("wikitext2", data, tiny, window=32)
    plan = CachePlan.uniform(tiny[0].config, 2, 2)
    packed, _ = score("wikitext2", data, tiny, plan, window=32)
    assert packed["perplexity"] != pytest.approx(exact["perplexity"], rel=1e-4)


def test_c4_counts_as_many_windows_as_asked(data, tiny):
    found, samples = score("c4", data, tiny, window=20, windows=4)
    assert len(samples) == 4
    assert all(sample.weights["log-likelihood (token)"] == 19 for sample in samples)
    assert found["perplexity"] > 1


def test_a_missing_raw_file_says_that_it_is_plain_text(tmp_path, tiny):
    with pytest.raises(
        ValueError, match=r"must hold wikitext2_test.raw, .* as plain text with one row"
    ):
        score("wikitext2", FolderSource(tmp_path), tiny)


def test_a_window_beyond_the_models_context_is_refused(tmp_path, tiny):
    (tmp_path / "wikitext2_test.raw").write_text(" The old lamp stood near the bridge . \n" * 30)
    with pytest.raises(ValueError, match=r"a window must have at most 512 tokens, .* got 600"):
        score("wikitext2", FolderSource(tmp_path), tiny, window=600)
