"""Benchmarks of generated tasks: what they ask, and how answers are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbits.evaluation.benchmarks import build_benchmark
from kvbits.evaluation.benchmarks.prompts import Prompter
from kvbits.evaluation.benchmarks.running import RunSettings, make_items, run_benchmark
from kvbits.evaluation.benchmarks.source import FolderSource
from kvbits.evaluation.token_set import encode_document

SMALL = {
    "passkey": {"lengths": [256, 512], "depths": 3, "n": 2},
    "needle": {"lengths": [512], "depths": 3, "n": 2},
    "ruler": {"lengths": [1400], "tasks": ["niah_multikey_1", "vt", "fwe", "qa_2"], "n": 2},
    "recall": {"length": 300, "n": 2},
    "arithmetic": {"n": 3},
}


def items_of(name, tokenizer, **settings):
    benchmark = build_benchmark(name, **(SMALL[name] | settings))
    return benchmark, make_items(
        benchmark, FolderSource(Path(__file__).parent), tokenizer, RunSettings()
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_prompt_as_text_is_the_generators_and_its_answer_is_right(name, tokenizer):
    benchmark, items = items_of(name, tokenizer)
    prompter = Prompter(tokenizer=tokenizer)
    assert len({item.doc_id for item in items}) == len(items)
    for item in items:
        assert prompter.text(item.request.prompt) == item.doc["prompt"]
        assert set(benchmark.score(item, item.doc["completion"]).metrics.values()) == {1.0}
        assert set(benchmark.score(item, " nothing").metrics.values()) == {0.0}


@pytest.mark.parametrize(("name", "tokens"), [("passkey", 12), ("needle", 128)])
def test_grids_hold_every_cell_and_prompts_keep_to_their_length(name, tokens, tokenizer):
    settings = {"lengths": [2048, 4096], "depths": 2, "n": 1}
    _, items = items_of(name, tokenizer, **settings)
    cells = [
        f"{length} tokens, depth {depth}" for length in (2048, 4096) for depth in ("0.00", "1.00")
    ]
    assert [item.group for item in items] == cells
    for item in items:
        length = int(item.group.split()[0])
        total = len(encode_document(tokenizer, item.doc["prompt"])) + tokens
        # prose is whole sentences, of at most 130 bytes, which are the tokens of this tokenizer
        assert length - 200 < total <= length + (100 if name == "passkey" else 0)


def test_in_a_chat_the_beginning_of_the_answer_follows_the_question(tokenizer):
    _, items = items_of("passkey", tokenizer)
    prompt = items[0].request.prompt
    assert prompt.question.endswith("What is the pass key?")
    assert prompt.lead == " The pass key is"
    assert items_of("recall", tokenizer)[1][0].request.prompt.lead == ""


def test_answers_of_a_real_run_are_recorded_by_length(tiny):
    model, tokenizer = tiny
    benchmark, items = items_of("passkey", tokenizer, lengths=[256], depths=2, n=1)
    outcome = run_benchmark(benchmark, items, model, tokenizer, None, RunSettings(batch_size=2))
    assert [sample.group for sample in outcome.samples] == [item.group for item in items]
    assert {sample.metrics["acc"] for sample in outcome.samples} == {0.0}  # its weights are random


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ruler", {"tasks": ["niah"]}, "ruler task must be one of"),
        ("passkey", {"lengths": []}, "lengths"),
        ("passkey", {"lengths": "512,some"}, "lengths"),
        ("recall", {"tasks": "key_value,other"}, "tasks must be among"),
        ("passkey", {"depths": 1}, "depths"),
        ("passkey", {"templates": "other"}, "templates"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_benchmark(name, **settings)


def test_several_values_may_be_one_text_with_commas():
    assert build_benchmark("passkey", lengths="512,1024").lengths == (512, 1024)
    assert build_benchmark("passkey", lengths=512).lengths == (512,)
    assert build_benchmark("ruler", tasks="vt, cwe").tasks == ("vt", "cwe")
