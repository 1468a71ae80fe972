"""Records survive kills and concurrent writers, and are refused where they are not records."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from kvbits.errors import RecordError
from kvbits.evaluation.accuracy import Accuracy
from kvbits.evaluation.divergence import measure, reference_logits
from kvbits.evaluation.jsonl import append_json_line, read_json_lines
from kvbits.evaluation.perplexity import perplexity
from kvbits.evaluation.records import (
    accuracy_record,
    append_record,
    divergence_record,
    perplexity_record,
    read_records,
)
from kvbits.plan import CachePlan


@pytest.fixture(scope="module")
def record(model, token_set):
    plan = CachePlan.uniform(model.config, 4, 2, "kivi")
    result = measure(model, plan, token_set, reference_logits(model, token_set))
    return divergence_record(result, token_set, plan, model)


def test_records_come_back_as_they_were_written(tmp_path, record):
    path = tmp_path / "runs" / "verify.jsonl"
    append_record(path, record)
    append_record(path, record)
    assert read_records(path) == [record, record]
    assert len(path.read_text().splitlines()) == 2


def test_a_record_says_what_was_measured_and_how(record, token_set, model):
    assert record.kind == "divergence"
    assert record.checksum == token_set.checksum
    assert (record.n, record.num_tokens) == (3, token_set.num_tokens)
    assert record.plan.pairs == ((4, 2),) * 3
    assert (record.plan.mode, record.plan.method) == ("kivi", "uniform")
    plan = CachePlan.uniform(model.config, 4, 2, "kivi")
    assert record.effective_bits == plan.effective_bits
    assert record.versions["torch"] == torch.__version__
    assert {"kvbits", "python", "transformers", "device", "dtype"} <= set(record.versions)
    assert record.seconds > 0
    assert record.cache_bytes > 0
    assert record.created.endswith("+00:00")


def test_full_precision_and_single_documents_can_be_recorded(model, token_set):
    one = token_set._replace(input_ids=token_set.input_ids[:1], counted=token_set.counted[:1])
    record = perplexity_record(perplexity(model, one), one, None, model)
    assert record.plan is None
    assert record.effective_bits is None
    assert record.standard_error is None  # one document has none; JSON has no nan


def test_accuracy_is_recorded_with_its_seed(model):
    result = Accuracy("arithmetic", 2, (True, False), 0.5, 0.35, 1.0, 10)
    record = accuracy_record(result, None, model, seed=3, split="test")
    assert (record.data, record.seed, record.split, record.n) == ("arithmetic", 3, "test", 2)


def test_no_path_of_this_machine_enters_a_record(tiny, token_set):
    model = tiny[0]
    assert "/" in model.config._name_or_path
    result = Accuracy("arithmetic", 1, (True,), 1.0, 0.0, 1.0, 10)
    plan = CachePlan.uniform(model.config, 4, 4)
    line = accuracy_record(result, plan, model, seed=0, split="test").model_dump_json()
    assert str(model.config._name_or_path).rsplit("/", 1)[0] not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise must be valid, got extra inputs"),
        ({"value": "0.5"}, "value must be valid, got input should be a valid number"),
        ({"n": 0}, "n must be valid, got input should be greater than or equal to 1"),
        ({"schema_version": 2}, "schema_version must be valid, got input should be 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, record, change, message):
    path = tmp_path / "verify.jsonl"
    append_json_line(path, record.model_dump(mode="json") | change)
    with pytest.raises(RecordError, match=message):
        read_records(path)


def test_a_missing_file_holds_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    with pytest.warns(UserWarning, match="ends in a torn line of 7 bytes"):
        assert read_json_lines(path) == [{"a": 1}]


def test_appending_cuts_a_torn_line_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with pytest.warns(UserWarning, match="torn line"):
        append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(RecordError, match=r"lines.jsonl:2 must be a JSON object"):
        read_json_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(RecordError, match=r"lines.jsonl:1 must be a JSON object, got b'\[1\]'"):
        read_json_lines(path)


def test_nan_is_refused_and_writes_nothing(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_line(path, {"a": float("nan")})
    assert not path.exists()


WRITER = """
import sys
from kvbits.evaluation.jsonl import append_json_line
name, count = sys.argv[2], int(sys.argv[3])
for i in range(count):
    append_json_line(sys.argv[1], {"name": name, "i": i, "filler": "x" * 5000})
"""


def start_writer(path, name, count):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)])


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    writer = start_writer(path, "a", 10**9)
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    lines = path.read_text().splitlines()
    assert len(lines) > 10
    assert [json.loads(line)["i"] for line in lines] == list(range(len(lines)))


def test_two_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    writers = [start_writer(path, name, 30) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = read_json_lines(path)
    for name in "ab":
        assert [line["i"] for line in lines if line["name"] == name] == list(range(30))
