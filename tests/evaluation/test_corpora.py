"""Token sets: what is read, where it is cut, and which tokens count."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from kvbits.errors import CalibrationError
from kvbits.evaluation.corpora import (
    SetSize,
    default_sets,
    encode_document,
    merge_sets,
    recall_set,
    task_set,
    text_set,
)
from kvbits.evaluation.tasks import ArithmeticChain, KeyValueRecall
from kvbits.evaluation.texts import bundled_texts, dataset_texts, read_texts

SMALL = SetSize(
    text_documents=2,
    text_tokens=64,
    reasoning_documents=2,
    recall_documents=3,
    recall_tokens=120,
)


def counted_text(token_set, tokenizer, row):
    return tokenizer.decode(token_set.input_ids[row][token_set.counted[row]])


def test_text_is_cut_into_windows_that_begin_with_bos(tokenizer):
    found = text_set(tokenizer, ["abcdefgh", "xyz"], max_tokens=4)
    assert found.input_ids.tolist() == [
        encode_document(tokenizer, "abc"),
        encode_document(tokenizer, "xyz"),
        encode_document(tokenizer, "def"),
        [*encode_document(tokenizer, "gh"), 0],
    ]
    assert found.counted.sum(1).tolist() == [3, 3, 3, 2]
    assert not found.counted[:, 0].any()


def test_few_windows_come_from_many_texts(tokenizer):
    found = text_set(tokenizer, ["a" * 30, "b" * 30, "c" * 30], max_tokens=11, documents=3)
    assert [counted_text(found, tokenizer, row) for row in range(3)] == [
        "a" * 10,
        "b" * 10,
        "c" * 10,
    ]


def test_only_completions_of_a_task_count(tokenizer):
    task = ArithmeticChain()
    found = task_set(tokenizer, task, 3, seed=5, split="valid", domain="reasoning")
    examples = task.generate(3, seed=5, split="valid")
    for row, example in enumerate(examples):
        assert counted_text(found, tokenizer, row) == example.completion
        ids = found.input_ids[row].tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]).startswith(example.prompt + example.completion)
    assert (found.domain, found.num_documents) == ("reasoning", 3)


def test_every_answer_on_a_recall_context_counts(tokenizer):
    found = recall_set(
        tokenizer, KeyValueRecall(num_pairs=6), 2, seed=0, split="valid", questions=4
    )
    for row in range(2):
        text = tokenizer.decode(found.input_ids[row], skip_special_tokens=True)
        pairs = json.loads(text[text.index("{") : text.index("}") + 1])
        asked = [part.split('"')[0] for part in text.split('Key: "')[1:]]
        assert len(set(asked)) == 4
        expected = "".join(f' "{pairs[key]}"' for key in asked)
        assert counted_text(found, tokenizer, row) == expected


def test_a_single_question_is_the_task_itself(tokenizer):
    task = KeyValueRecall(num_pairs=4)
    one = recall_set(tokenizer, task, 2, seed=3, split="test")
    plain = task_set(tokenizer, task, 2, seed=3, split="test")
    assert one.checksum == plain.checksum


def test_default_sets_cover_three_domains(tokenizer):
    texts = ["one two three " * 20, "four five six " * 20]
    sets = default_sets(tokenizer, "calibration", size=SMALL, text=texts)
    assert [item.domain for item in sets] == ["text", "reasoning", "recall"]
    assert [item.num_documents for item in sets] == [2, 2, 3]
    assert all(item.split == "calibration" for item in sets)


def test_calibration_and_heldout_tasks_share_no_document(tokenizer):
    texts = ["one two three " * 20, "four five six " * 20]
    both = [default_sets(tokenizer, s, size=SMALL, text=texts) for s in ("calibration", "heldout")]
    for calibration, heldout in zip(both[0][1:], both[1][1:], strict=True):
        prompts = [
            {tokenizer.decode(row, skip_special_tokens=True) for row in item.input_ids}
            for item in (calibration, heldout)
        ]
        assert not prompts[0] & prompts[1]


def test_the_same_seed_gives_the_same_set_and_another_another(tokenizer):
    made = [
        default_sets(tokenizer, size=SMALL, text=["abc " * 90], seed=seed)[1].checksum
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


def test_the_checksum_covers_ids_counts_and_shape(tokenizer):
    found = text_set(tokenizer, ["abcdef"])
    ids, counted = found.input_ids.clone(), found.counted.clone()
    ids[0, 2] += 1
    counted[0, 2] = False
    others = [
        found._replace(input_ids=ids),
        found._replace(counted=counted),
        found._replace(
            input_ids=found.input_ids.reshape(-1, 1), counted=found.counted.reshape(-1, 1)
        ),
    ]
    assert len({found.checksum, *(other.checksum for other in others)}) == 4


def test_sets_of_other_widths_are_merged(tokenizer):
    short, long = text_set(tokenizer, ["abc"]), text_set(tokenizer, ["abcdefgh"])
    found = merge_sets([short, long], name="both", domain="text")
    assert found.input_ids.shape == (2, 9)
    assert found.counted.sum(1).tolist() == [3, 8]
    assert torch.equal(found.input_ids[1], long.input_ids[0])


def test_files_and_folders_are_read_by_path(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "third\u2028line"}\n\n{"text": "fourth"}\n')
    (tmp_path / "a.txt").write_text("first\n\n<|endoftext|>\n\nsecond\n<|endoftext|>\n")
    (tmp_path / "notes.md").write_text("not read")
    assert read_texts(tmp_path) == ["first", "second", "third\u2028line", "fourth"]
    assert read_texts(tmp_path / "b.jsonl") == ["third\u2028line", "fourth"]
    found = text_set(tokenizer, path=tmp_path / "a.txt")
    assert [counted_text(found, tokenizer, row) for row in range(2)] == ["first", "second"]


def test_datasets_are_read_by_name(monkeypatch):
    """A stand-in for the package, which needs a network, records what it is asked for."""
    asked = []

    class Rows(dict):
        column_names = ("text",)

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return Rows(text=["one", " ", "two"])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert dataset_texts("wikitext:wikitext-2-raw-v1") == ["one", "two"]
    assert dataset_texts("some/set::train") == ["one", "two"]
    assert asked == [("wikitext", "wikitext-2-raw-v1", "test"), ("some/set", None, "train")]
    monkeypatch.setattr(Rows, "column_names", ("prompt",))
    with pytest.raises(ValueError, match="must have a column 'text'"):
        dataset_texts("some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install .kvbits\[datasets\]"):
        dataset_texts("some/set")


def test_text_of_the_callers_replaces_the_bundled_sample(tokenizer, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("word " * 100)
    found = default_sets(tokenizer, "heldout", size=SMALL, text=path)[0]
    assert (found.name, found.split) == ("mine", "heldout")


def test_unusable_texts_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be an existing file or folder"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="path must hold at least one document"):
        read_texts(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(
        CalibrationError, match=r'bad.jsonl:2 must be a JSON object with the key "t'
    ):
        read_texts(tmp_path)
    with pytest.raises(CalibrationError, match=r"fill 5 windows .* got 1 in text; give more"):
        text_set(tokenizer, ["short"], documents=5)
    with pytest.raises(CalibrationError, match=r"selfsample_none\.jsonl is missing"):
        bundled_texts("none")


def test_bad_arguments_are_refused(tokenizer):
    with pytest.raises(ValueError, match="texts must be given if and only if path is not"):
        text_set(tokenizer)
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        text_set(tokenizer, ["abc"], max_tokens=1)
    with pytest.raises(ValueError, match="split must be one of calibration, heldout, got 'test'"):
        default_sets(tokenizer, "test")
