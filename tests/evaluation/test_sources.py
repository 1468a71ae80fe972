"""Calibration data by name: what counts, who answers, and that splits share nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.errors import CalibrationError
from kvbits.evaluation.chat import answered, as_segments, read_turns
from kvbits.evaluation.corpora import SetSize
from kvbits.evaluation.sources import Wanted, counting_all, parse_source, source_sets
from kvbits.evaluation.texts import dataset_texts

SIZE = SetSize(text_documents=2, text_tokens=24, reasoning_documents=2, recall_documents=2,
               recall_tokens=64, chat_documents=2)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def sets(tokenizer, *sources, split="calibration", model=None, count="answers"):
    return source_sets(sources, Wanted(tokenizer, model, split, SIZE, 0, 6), count)


def text_of(tokenizer, token_set, row, counted=None):
    ids = token_set.documents[row]
    if counted is not None:
        ids = ids[token_set.counted[row, : len(ids)] == counted]
    return tokenizer.decode(ids)


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_every_built_in_domain_has_two_halves_that_share_no_document(tokenizer, model):
    names = ("text", "reasoning", "recall", "code", "chat")
    halves = [
        sets(tokenizer, *names, split=split, model=model) for split in ("calibration", "heldout")
    ]
    for name, one, other in zip(names, *halves, strict=True):
        assert (one.domain, one.split, other.split) == (name, "calibration", "heldout")
        first, second = ({tuple(d.tolist()) for d in each.documents} for each in (one, other))
        assert first
        assert not first & second


def test_documents_of_a_file_are_split_by_what_they_say(tokenizer, tmp_path):
    """The order in the file, and repeated documents, change nothing."""
    texts = [f"Document {number} says {number * 'so '}much." for number in range(6)]
    found = []
    for order in (texts, [*texts[::-1], *texts]):
        path = write_lines(tmp_path / "notes.jsonl", [{"text": text} for text in order])
        found.append([sets(tokenizer, f"notes={path}", split=s)[0].documents
                      for s in ("calibration", "heldout")])  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert [d.tolist() for d in a] == [d.tolist() for d in b]


def test_a_single_document_is_cut_in_two(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"{number} sheep went by." for number in range(40)))
    one, other = (sets(tokenizer, f"book={path}", split=s)[0] for s in ("calibration", "heldout"))
    assert one.num_documents == other.num_documents == 2


def test_own_prompts_are_answered_by_the_model_itself(tokenizer, model, tmp_path):
    path = write_lines(tmp_path / "asked.jsonl", [{"prompt": f"Question {n}?"} for n in range(4)])
    (made,) = sets(tokenizer, f"mine={path}", model=model)
    assert (made.domain, made.num_documents) == ("mine", 2)
    ids = tokenizer(text_of(tokenizer, made, 0, counted=False), return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False)
    said = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text_of(tokenizer, made, 0, counted=True) == (said.strip() or ".")


def test_without_a_model_open_questions_are_refused(tokenizer, tmp_path):
    path = write_lines(tmp_path / "asked.jsonl", [{"prompt": "a?"}, {"prompt": "b?"}])
    with pytest.raises(CalibrationError, match="must end with an answer where no model is given"):
        sets(tokenizer, f"mine={path}")


def test_conversations_follow_the_chat_template_and_answers_count(tokenizer):
    templated = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    templated.chat_template = TEMPLATE
    turns = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and"}, {"role": "assistant", "content": "no"},
    ]  # fmt: skip
    segments = as_segments(templated, turns)
    said = [(templated.decode(s.ids), s.is_counted) for s in segments]
    # what a template writes after an answer opens the next question
    assert said == [
        ("<user>hi</s><assistant>", False), ("yes", True),
        ("</s><user>and</s><assistant>", False), ("no", True),
    ]  # fmt: skip


def test_given_answers_are_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a?", "answer": "b"}])
    turns = read_turns(path)
    assert answered(None, None, turns, 4) == turns
    assert turns[0][1] == {"role": "assistant", "content": "b"}


def test_counting_all_counts_questions_too(tokenizer):
    answers, everything = (
        sets(tokenizer, "sums=task:arithmetic", count=count)[0] for count in ("answers", "all")
    )
    assert torch.equal(answers.input_ids, everything.input_ids)
    assert everything.num_tokens > answers.num_tokens
    assert not everything.counted[:, 0].any()
    assert all(
        len(a) == len(b) for a, b in zip(answers.documents, everything.documents, strict=True)
    )
    assert torch.equal(counting_all(everything).counted, everything.counted)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("poetry", "calibration without a source must be among text, .* got 'poetry'"),
        ("poetry=", "must be DOMAIN or DOMAIN=SOURCE, got 'poetry='"),
        ("poetry=no/such/file.txt", "must name a file, a folder, hf:NAME or task:NAME"),
        ("poetry=task:rhymes", "task must be among arithmetic"),
    ],
)
def test_sources_that_cannot_be_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        parse_source(source)


def test_domains_must_differ(tokenizer):
    with pytest.raises(ValueError, match="must have every domain once, got text, text"):
        sets(tokenizer, "text", "text")


def test_mixed_lines_and_single_conversations_are_refused(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a?"}, {"text": "b"}])
    with pytest.raises(CalibrationError, match=r"a\.jsonl:2 must be an object with"):
        read_turns(path)
    path = write_lines(tmp_path / "b.jsonl", [{"prompt": "a?", "answer": "b"}])
    with pytest.raises(CalibrationError, match="must hold two different conversations"):
        sets(tokenizer, f"mine={path}")


def test_a_dataset_out_of_reach_is_one_sentence():
    pytest.importorskip("datasets", reason="needs the extra `datasets`")
    with pytest.raises(ValueError, match="dataset must be on this machine or within reach of it"):
        dataset_texts("kvbits-tests/does-not-exist")
