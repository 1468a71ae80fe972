"""Running: batches equal single items, a killed run goes on, results say what they depend on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Rank,
    Read,
    Scores,
    Setup,
)
from kvbits.evaluation.benchmarks.results import means, results
from kvbits.evaluation.benchmarks.running import (
    RunSettings,
    finish,
    make_items,
    run_benchmark,
    settings_of,
)
from kvbits.evaluation.benchmarks.source import FolderSource
from kvbits.evaluation.likelihood import likelihoods
from kvbits.evaluation.samples import Sample, read_samples
from kvbits.evaluation.token_set import Segment, encode_document
from kvbits.plan import CachePlan

TEXTS = ["a", "some longer prompt", "key: value; key:", "0123456789" * 6, "b" * 25, "what?"]


class Mixed(Benchmark):
    """Every kind of request; a score is what the response is long or likely."""

    name: ClassVar = "mixed"
    description: ClassVar = "for tests"
    origin: ClassVar = "here"
    files: ClassVar = ()

    def items(self, setup: Setup) -> Iterable[Item]:
        for number, text in enumerate(TEXTS):
            ids = encode_document(setup.tokenizer, text + text)
            requests = [
                Generate(Prompt(text), 16, ("Z",)),
                Generate(Prompt(text), 8),
                Rank(Prompt(text), (" yes", " no way")),
                Read((Segment(ids[:2], False), Segment(ids[2:], True))),
            ]
            for kind, request in enumerate(requests):
                yield Item(
                    doc_id=10 * number + kind,
                    request=request,
                    doc={"text": text},
                    group=type(request).__name__,
                )

    def score(self, item: Item, response: Any) -> Scores:
        if isinstance(response, str):
            return Scores({"length": float(len(response))})
        return Scores(
            {"logprob": sum(each.logprob for each in response)},
            {"logprob": float(sum(each.num_tokens for each in response))},
        )


def run(tiny: Any, tmp_path: Any, plan: Any = None, **settings: Any) -> list[Sample]:
    model, tokenizer = tiny
    chosen = RunSettings(**settings)
    items = make_items(Mixed(), FolderSource(tmp_path), tokenizer, chosen)
    return run_benchmark(Mixed(), items, model, tokenizer, plan, chosen).samples


def assert_same(first: list[Sample], second: list[Sample]) -> None:
    assert [s.key for s in first] == [s.key for s in second]
    for a, b in zip(first, second, strict=True):
        assert a.response == b.response
        # sums of up to 120 float32 log-probabilities of other batch shapes
        assert a.metrics == pytest.approx(b.metrics, abs=1e-3)


@pytest.mark.parametrize("bits", [None, 4])
def test_batches_equal_single_items(tiny, tmp_path, bits):
    plan = None if bits is None else CachePlan.uniform(tiny[0].config, bits, bits)
    single = run(tiny, tmp_path, plan, batch_size=1)
    assert len({sample.response for sample in single}) > 4
    for batch_size in (2, 24):
        assert_same(run(tiny, tmp_path, plan, batch_size=batch_size), single)


def test_few_bits_change_answers_and_likelihoods_and_16_change_neither(tiny, tmp_path):
    config = tiny[0].config
    full = run(tiny, tmp_path)
    assert run(tiny, tmp_path, CachePlan.uniform(config, 16, 16)) == full
    packed = run(tiny, tmp_path, CachePlan.uniform(config, 2, 2))
    for kind in ("Generate", "Rank", "Read"):
        pairs = [(a, b) for a, b in zip(full, packed, strict=True) if a.group == kind]
        assert any(a != b for a, b in pairs), kind


def test_likelihoods_are_those_of_one_pass_over_the_text(tiny):
    model, tokenizer = tiny
    documents = [encode_document(tokenizer, text) for text in TEXTS[1:4]]
    segments = [[Segment(ids[:3], False), Segment(ids[3:], True)] for ids in documents]
    found, nbytes = likelihoods(model, tokenizer, segments)
    assert nbytes > 0
    for ids, one in zip(documents, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
        targets = torch.tensor(ids[3:])
        assert one.num_tokens == len(ids) - 3
        # float32 sums in another order
        assert one.logprob == pytest.approx(
            logits.gather(1, targets[:, None]).sum().item(), abs=1e-3
        )
        assert one.is_greedy == bool((logits.argmax(-1) == targets).all())


def test_single_tokens_after_one_text_are_scored_in_one_pass(tiny, monkeypatch):
    """Four letters of a choice cost one prompt; each has the likelihood it has alone."""
    model, tokenizer = tiny
    prompts = [encode_document(tokenizer, text) for text in TEXTS[:3]]
    documents = [
        [Segment(ids, False), Segment([token], True)] for ids in prompts for token in (5, 77, 130)
    ]
    documents.insert(4, [Segment(prompts[0], False), Segment([5, 6], True)])
    alone = [likelihoods(model, tokenizer, [document])[0][0] for document in documents]
    rows = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        functools.wraps(forward)(
            lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k)
        ),
    )
    together, _ = likelihoods(model, tokenizer, documents)
    assert sum(rows) == 4  # three prompts, and the one of two tokens
    for one, other in zip(together, alone, strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.is_greedy == other.is_greedy
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)  # other batch shapes


def test_a_killed_run_goes_on_and_comes_to_the_same(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    settings = RunSettings(batch_size=3)
    items = make_items(Mixed(), FolderSource(tmp_path), tokenizer, settings)
    whole = run_benchmark(Mixed(), items, model, tokenizer, None, settings)
    done: list[int] = []

    def stop_after_ten(count: int) -> None:
        done.append(count)
        if sum(done) >= 10:
            raise KeyboardInterrupt

    arguments = (Mixed(), items, model, tokenizer, None, settings)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(*arguments, folder=tmp_path, progress=stop_after_ten)
    partial = tmp_path / "mixed.partial.jsonl"
    text = partial.read_text()
    assert len(text.splitlines()) == sum(done)
    partial.write_text(text[:-20])  # the machine stopped while it wrote

    asked = []
    scored = Mixed.score
    monkeypatch.setattr(
        Mixed, "score", lambda self, item, got: asked.append(item) or scored(self, item, got)
    )
    with pytest.warns(UserWarning, match="torn line"):
        outcome = run_benchmark(*arguments, folder=tmp_path)
    assert len(asked) == len(items) - sum(done) + 1
    assert outcome.samples == whole.samples
    finish(tmp_path, Mixed(), outcome, {"results": {}})
    assert (tmp_path / "mixed.results.json").read_text() == '{\n  "results": {}\n}\n'
    assert read_samples(tmp_path / "mixed.samples.jsonl") == whole.samples
    assert not partial.exists()


def test_limits_count_by_group(tiny, tmp_path):
    samples = run(tiny, tmp_path, limit=2, batch_size=8)
    assert [sample.doc_id for sample in samples] == [0, 1, 2, 3, 12, 13]


def test_answers_end_before_the_stop_string(tiny, tmp_path):
    """Random models say odd bytes; any two characters of an answer make a stop string."""
    model, tokenizer = tiny
    settings = RunSettings(batch_size=1)
    item = make_items(Mixed(), FolderSource(tmp_path), tokenizer, settings)[1]
    (whole,) = run_benchmark(Mixed(), [item], model, tokenizer, None, settings).samples
    text = whole.response
    stop = text[3:5]
    assert len(stop) == 2
    request = item.request._replace(stop=("never said", stop))
    item = dataclasses.replace(item, request=request)
    (cut,) = run_benchmark(Mixed(), [item], model, tokenizer, None, settings).samples
    assert cut.response == text[: text.index(stop)]


def test_means_are_weighted_and_have_standard_errors():
    def sample(number: int, metrics: dict[str, float], weight: float = 1.0) -> Sample:
        return Sample(
            task="t",
            filter="none",
            doc_id=number,
            doc_hash="d",
            prompt_hash="p",
            metrics=metrics,
            weights=dict.fromkeys(metrics, weight),
        )

    plain = [sample(i, {"acc": float(i < 3)}) for i in range(4)]
    found = means(plain)
    assert found["acc,none"] == 0.75
    # standard deviation over n - 1 = 3 of (1, 1, 1, 0), by the root of 4
    assert found["acc_stderr,none"] == pytest.approx(0.25)
    weighted = means([sample(0, {"score": 1.0}, 3.0), sample(1, {"score": 0.0}, 1.0)])
    assert weighted["score,none"] == 0.75
    assert means(plain[:1])["acc_stderr,none"] is None


def test_results_name_plan_data_and_prompts(tiny, tmp_path):
    model, tokenizer = tiny
    settings = RunSettings(limit=1)
    items = make_items(Mixed(), FolderSource(tmp_path), tokenizer, settings)
    outcome = run_benchmark(Mixed(), items, model, tokenizer, None, settings)
    manifest = {"settings": settings_of(Mixed(), settings, FolderSource(tmp_path))}
    found = results(Mixed(), outcome, manifest)
    assert found["settings"]["limit"] == 1
    assert found["n-samples"] == {"mixed": {"effective": 3}}
    assert set(found["groups"]["mixed"]) == {"Generate", "Rank", "Read"}
    assert found["groups"]["mixed"]["Read"]["n"] == 1
    assert len(found["prompts_sha256"]) == 64
    assert found["cache_bytes"] > 0
    assert math.isfinite(found["results"]["mixed"]["logprob,none"])


@pytest.mark.parametrize(
    ("name", "value"), [("shots", -1), ("limit", 0), ("batch_size", 0), ("max_length", 1)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        RunSettings(**{name: value})
