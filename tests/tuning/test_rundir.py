from __future__ import annotations

import pytest

from kvbits.errors import RecordError
from kvbits.tuning.rundir import RunDir


def test_records_come_back_as_appended(tmp_path):
    run = RunDir(tmp_path / "new" / "run")
    run.append("a.jsonl", {"x": 0.1})
    run.append("a.jsonl", {"x": 1e-300})
    assert run.records("a.jsonl") == [{"x": 0.1}, {"x": 1e-300}]
    assert run.records("none.jsonl") == []


def test_torn_last_line_is_cut_and_the_next_append_is_whole(tmp_path):
    run = RunDir(tmp_path)
    run.append("a.jsonl", {"x": 1})
    with run.file("a.jsonl").open("a") as handle:
        handle.write('{"x": 2')
    assert run.records("a.jsonl") == [{"x": 1}]
    run.append("a.jsonl", {"x": 3})
    assert run.records("a.jsonl") == [{"x": 1}, {"x": 3}]


def test_damage_before_the_last_line_is_refused(tmp_path):
    run = RunDir(tmp_path)
    run.file("a.jsonl").write_text('{"x": 1}\n{"x"\n{"x": 3}\n')
    with pytest.raises(RecordError, match=r"one JSON object a line, got .* in line 2; delete"):
        run.records("a.jsonl")


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDir(tmp_path).append("a.jsonl", {"x": float("nan")})


def test_identity_is_kept_and_versions_may_differ(tmp_path):
    run = RunDir(tmp_path)
    run.check_identity({"settings": {"bits": 4.0}, "versions": {"torch": "1"}})
    run.check_identity({"settings": {"bits": 4.0}, "versions": {"torch": "2"}})
    assert run.read_json("study.json")["versions"] == {"torch": "1"}


def test_other_settings_are_refused_by_name(tmp_path):
    run = RunDir(tmp_path)
    run.check_identity({"settings": {"bits": 4.0, "seed": 0}})
    with pytest.raises(
        RecordError, match=r"another settings bits \(4.0 there, 5.0 now\); choose another"
    ):
        run.check_identity({"settings": {"bits": 5.0, "seed": 0}})


def test_another_model_is_refused(tmp_path):
    run = RunDir(tmp_path)
    run.check_identity({"weights": "aa"})
    with pytest.raises(RecordError, match=r"another weights \('aa' there, 'bb' now\)"):
        run.check_identity({"weights": "bb"})


def test_documents_are_replaced_whole(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_json("front.json") is None
    run.write_json("front.json", {"a": 1})
    run.write_json("front.json", {"a": 2})
    assert run.read_json("front.json") == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_damaged_document_is_refused(tmp_path):
    (tmp_path / "study.json").write_text("[1")
    with pytest.raises(RecordError, match="must hold one JSON object"):
        RunDir(tmp_path).read_json("study.json")


def test_two_runs_cannot_share_a_directory(tmp_path):
    with (
        RunDir(tmp_path).lock(),
        pytest.raises(RecordError, match="must not be in use"),
        RunDir(tmp_path).lock(),
    ):
        pass
    with RunDir(tmp_path).lock():
        assert (tmp_path / ".lock").exists()
