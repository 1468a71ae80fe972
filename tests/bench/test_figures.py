"""The page of figures: what records hold, and nothing from the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbits.bench.figures import DRAWN, write_page

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def kernel_record(name="K4V4", batch=8, context=32768, suite="per token", time_us=80.0):
    return {
        "benchmark": "kernels",
        "machine": {"gpu": "NVIDIA H200"},
        "suite": suite,
        "name": name,
        "cell": {"batch": batch, "context": context},
        "time_us": time_us,
        "roofline_share": 0.9,
    }


def decode_record(batch=8, tokens_per_second=500.0, **changes):
    record = {
        "benchmark": "decode",
        "machine": {"processor": "a processor", "cores": 2},
        "subject": "llama",
        "impl": "auto",
        "is_prompted": False,
        "variant": "K4V4",
        "batch": batch,
        "context": 32768,
        "step_ms": 9.0,
        "tokens_per_second": tokens_per_second,
    }
    return record | changes


def figures(found):
    return {figure.layout.title.text: figure for draw in DRAWN for figure in draw(found)}


def test_a_page_needs_no_network(tmp_path):
    text = write_page([kernel_record()], tmp_path / "kernels.html").read_text()
    assert "NVIDIA H200" in text
    assert "Share of the measured read bandwidth" in text
    assert '<script src="http' not in text
    assert "<link" not in text


def test_throughput_is_drawn_against_batch():
    (figure,) = figures([decode_record(), decode_record(16, 800.0)]).values()
    assert figure.layout.title.text == "llama: decoding with 32768 tokens a row"
    assert list(figure.data[0].x) == [8, 16]
    assert list(figure.data[0].y) == [500.0, 800.0]


@pytest.mark.parametrize(
    "changes",
    [{"subject": "other"}, {"impl": "compiled"}, {"is_prompted": True}, {"context": 64}],
)
def test_runs_of_different_kinds_are_not_mixed(changes):
    assert len(figures([decode_record(), decode_record(**changes)])) == 2


def test_time_is_drawn_against_context_once_there_are_several():
    assert list(figures([kernel_record()])) == ["Share of the measured read bandwidth"]
    found = [kernel_record(), kernel_record(context=65536, time_us=160.0)]
    figure = figures(found)["Decode attention of one layer, 8 rows"]
    assert list(figure.data[0].x) == [32768, 65536]


def test_a_later_record_of_the_same_point_counts():
    (figure,) = figures([decode_record(), decode_record(tokens_per_second=1.0)]).values()
    assert list(figure.data[0].y) == [1.0]


def test_largest_batches_are_bars_by_context():
    runs = [
        {"subject": "llama", "context": context, "variant": name, "largest_batch": rows}
        for context, name, rows in [
            (64, "K8V8", 5),
            (64, "K8V8", 6),
            (64, "K4V4", 9),
            (32, "K4V4", 18),
        ]
    ]
    found = figures(runs)
    assert list(found["llama: largest batch of 64 tokens"].data[0].y) == [6, 9]
    assert list(found["llama: largest batch of 32 tokens"].data[0].y) == [18]


def test_nothing_to_draw_is_no_page(tmp_path):
    assert write_page([], tmp_path / "page.html") is None
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_records_say_where_they_come_from(path):
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert {"machine", "versions", "commit", "command", "created"} <= set(record)
        assert record["command"].startswith("kvbits bench ")
        assert "/root" not in line
        assert "/tmp" not in line
