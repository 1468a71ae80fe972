"""The slices: six examples each, of the sizes the page promises, and nothing else passes."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvbits
from kvbits.errors import RecordError
from kvbits.evaluation.token_set import encode_document
from kvbits.replay.scoring import score
from kvbits.replay.slices import SLICES, load_slice, parse_slice

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(kvbits.__file__).parent / "replay" / "slices_data"
TOKENS = {
    "longbench_slice": (900, 1500),
    "needle_slice": (500, 1300),
    "reasoning_slice": (150, 300),
}


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_has_six_examples_of_the_promised_size(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "kvbits-tiny")
    found = load_slice(name)
    assert len({example.example_id for example in found.examples}) == 6
    low, high = TOKENS[name]
    for example in found.examples:
        assert low <= len(encode_document(tokenizer, example.prompt)) <= high
        assert example.licence == "Apache-2.0"
        assert example.answers
        assert score(example, f" {example.answers[0]}\n") == 100
        assert score(example, "") == 0


def test_answers_stand_in_the_text_they_are_asked_from():
    for name in ("longbench_slice", "needle_slice"):
        for example in load_slice(name).examples:
            assert example.answers[0] in example.prompt


def test_depths_and_lengths_of_pass_keys_differ():
    places = {}
    for example in load_slice("needle_slice").examples:
        text = example.prompt
        length, depth = example.example_id.split("-")
        places[length, float(depth)] = text.index("The pass key is") / len(text)
    assert len(places) == 6
    for (_, depth), place in places.items():
        assert place == pytest.approx(depth, abs=0.1)


def test_changed_text_is_refused():
    data = (DATA / "needle_slice.json").read_bytes()
    with pytest.raises(RecordError, match="needle_slice must have the SHA-256"):
        parse_slice("needle_slice", data + b" ")
    with pytest.raises(ValueError, match="--slice must be one of longbench_slice"):
        load_slice("hotpot")


@pytest.mark.parametrize(
    ("family", "answer", "text", "expected"),
    [
        ("multi_paragraph_qa", "the Heron", "Heron\nand more", 100),
        ("multi_paragraph_qa", "Perpetua Oakes", "It was Perpetua.", 40),
        ("paragraph_retrieval", "Paragraph 6", " 6 or 7", 50),
        ("passkey", "48213", "is 48213.", 100),
        ("passkey", "48213", "is 4821", 0),
        ("stem_word_problem", "20", "18 - 6 = 12\n240 / 12 = 20.0", 100),
        ("stem_word_problem", "1420", "so \\boxed{1,420}, not 3", 100),
        ("stem_word_problem", "20", "none", 0),
    ],
)
def test_scores_follow_the_family(family, answer, text, expected):
    example = load_slice("needle_slice").examples[0]
    changed = example._replace(source_family=family, answers=(answer, "99999"))
    assert score(changed, text) == pytest.approx(expected)
