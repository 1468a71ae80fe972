"""The page of figures: what records hold, and nothing from the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbits.bench.figures import DRAWN, write_page

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def records(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def titles(found):
    return [figure.layout.title.text for draw in DRAWN for figure in draw(found)]


def test_kernel_records_are_drawn(tmp_path):
    page = write_page(records("kernels.jsonl"), tmp_path / "kernels.html")
    text = page.read_text()
    assert "NVIDIA H200" in text
    assert "Share of the measured read bandwidth" in text
    assert '<script src="http' not in text
    assert "<link" not in text


def test_decode_records_are_drawn_as_throughput_against_batch():
    assert titles(records("decode.jsonl")) == ["Decoding with 32768 tokens a row"]


def test_time_is_drawn_against_context_once_there_are_several():
    (record,) = (r for r in records("kernels.jsonl") if r["name"] == "K8V8" and _is(r, 8, 32768))
    assert titles([record]) == ["Share of the measured read bandwidth"]
    longer = record | {"cell": record["cell"] | {"context": 65536}}
    assert titles([record, longer])[0] == "Decode attention of one layer, 8 rows"


def test_a_later_record_of_the_same_point_counts():
    (first, *_) = records("decode.jsonl")
    later = first | {"tokens_per_second": 1.0}
    (figure,) = (figure for draw in DRAWN for figure in draw([first, later]))
    assert list(figure.data[0].y) == [1.0]


def test_nothing_to_draw_is_no_page(tmp_path):
    assert write_page([], tmp_path / "page.html") is None
    assert not (tmp_path / "page.html").exists()


def _is(record, batch, context):
    return (record["cell"]["batch"], record["cell"]["context"]) == (batch, context)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_records_say_where_they_come_from(path):
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert {"machine", "versions", "commit", "command", "created"} <= set(record)
        assert record["command"].startswith("kvbits bench ")
        assert "/root" not in line
        assert "/tmp" not in line
