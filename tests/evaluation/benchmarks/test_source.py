"""Data files: strict in what is needed, easy about the rest."""

from __future__ import annotations

import hashlib
import sys

import pytest
from pydantic import AliasChoices, Field

from kvbits.errors import RecordError
from kvbits.evaluation.benchmarks.source import (
    DataFile,
    FolderSource,
    Hub,
    HubSource,
    Row,
    open_source,
)


class Pair(Row):
    a: int
    b: str = Field(validation_alias=AliasChoices("b", "other"))
    c: str = ""


FILE = DataFile("pairs.jsonl", Pair, Hub("some/pairs", "test", "all"), "the attic")


def test_rows_are_read_by_any_of_their_keys_and_others_are_ignored(tmp_path):
    text = '{"a": 1, "b": "x", "z": null}\n\n{"a": 2, "other": "y", "c": "w"}'  # no line break
    (tmp_path / "pairs.jsonl").write_text(text)
    source = open_source(tmp_path)
    assert source.read(FILE) == [Pair(a=1, b="x"), Pair(a=2, b="y", c="w")]
    assert source.checksums == {"pairs.jsonl": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a": "1", "b": "x"}\n',
            r"pairs.jsonl:1 a must be valid, got input should be a valid int",
        ),
        ('{"a": 1, "b": "x"}\n{"a": 1}\n', r"pairs.jsonl:2 b must be valid, got field required"),
        ("[1]\n", r"pairs.jsonl:1 must be a JSON object"),
        ("{\n", r"pairs.jsonl:1 must be a JSON object"),
        ("", r"pairs.jsonl must hold at least one line, got none"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, message):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(RecordError, match=message):
        FolderSource(tmp_path).read(FILE)


def test_rows_may_lie_in_a_list_of_one_object(tmp_path):
    file = DataFile("pairs.json", Pair, key="example")
    (tmp_path / "pairs.json").write_text('{"example": [{"a": 1, "b": "x"}], "keywords": "y"}')
    assert FolderSource(tmp_path).read(file) == [Pair(a=1, b="x")]
    for text in ("[]", "{", '{"rows": []}'):
        (tmp_path / "pairs.json").write_text(text)
        with pytest.raises(RecordError, match="must be a JSON object with 'example'"):
            FolderSource(tmp_path).read(file)
    (tmp_path / "pairs.json").write_text('{"example": 3}')
    with pytest.raises(RecordError, match="example must be a list, got int"):
        FolderSource(tmp_path).read(file)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    message = (
        r"--data must hold pairs.jsonl, got '.*' without it; take some/pairs, configuration all, "
        r"split test on the Hugging Face hub or the attic, as one JSON object a line with a, b, "
        r"\[c\]"
    )
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path).read(FILE)
    with pytest.raises(ValueError, match="--data must be a folder"):
        FolderSource(tmp_path / "none")


def test_without_a_folder_the_hub_is_asked_by_name(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(path, config, *, split):
            asked.append((path, config, split))
            return [{"a": 1, "b": "x", "extra": object()}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    source = open_source(None)
    assert source.read(FILE) == [Pair(a=1, b="x")]
    assert asked == [("some/pairs", "all", "test")]
    assert set(source.checksums) == {"pairs.jsonl"}


def test_the_hub_fails_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"pip install 'kvbits\[data\]', or put pairs.jsonl into a folder"
    ):
        HubSource().read(FILE)
    with pytest.raises(ValueError, match=r"x.jsonl must be read from a folder, got no --data"):
        HubSource().read(DataFile("x.jsonl", Pair, origin="the attic"))

    class Datasets:
        @staticmethod
        def load_dataset(path, config, *, split):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(
        ValueError, match=r"some/pairs, .* must be reachable .* got no network; or"
    ):
        HubSource().read(FILE)
