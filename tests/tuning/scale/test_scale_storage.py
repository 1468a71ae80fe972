from __future__ import annotations

import sys

import pytest

from kvbits.errors import StorageError
from kvbits.tuning.scale import process, threads_of
from kvbits.tuning.scale.storage import check_address, open_storage, shown


@pytest.mark.parametrize(
    "address",
    ["mysql://root:secret@db/x", "shared.db", "", "journal:", "redis:x", "postgresql:secret"],
)
def test_address_of_another_form_is_refused_without_its_password(address):
    with pytest.raises(ValueError, match=r"storage must be journal:PATH, sqlite:PATH") as caught:
        open_storage(address)
    assert "secret" not in str(caught.value)


def test_folder_that_does_not_exist_is_named(tmp_path):
    for scheme in ("journal", "sqlite"):
        with pytest.raises(StorageError, match=r"in an existing folder, got .*nowhere"):
            open_storage(f"{scheme}:{tmp_path / 'nowhere' / 'study'}")
    with pytest.raises(StorageError, match="in an existing folder"):
        open_storage(f"sqlite:{tmp_path}")


@pytest.mark.parametrize("scheme", ["journal", "sqlite"])
def test_file_of_another_kind_is_refused_and_left_alone(scheme, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("this is no study\nat all, and long enough to be told apart\n" * 9)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="storage must be"):
        open_storage(f"{scheme}:{path}")
    assert path.read_bytes() == before


def test_server_that_does_not_answer_is_named_without_its_password(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    address = f"postgresql://me:secret@/db?host={tmp_path}"
    with pytest.raises(StorageError, match=r"opened, got postgresql://me:\*\*\*@/db") as caught:
        open_storage(address)
    assert "secret" not in str(caught.value)


def test_missing_driver_is_named_with_its_remedy(monkeypatch):
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"psycopg must be .*pip install 'kvbits\[postgres\]'"):
        check_address("postgresql://db/x")


def test_missing_optuna_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"several workers or a storage.*kvbits\[tune\]"):
        check_address("journal:x")


def test_addresses_are_shown_without_passwords():
    assert shown("postgresql://me:s3:cr@t@host/db") == "postgresql://me:***@host/db"
    assert shown("postgresql://me@host/db") == "postgresql://me@host/db"
    assert shown("postgresql://host/db?password=secret") == "postgresql://host/db"
    assert shown("journal:/a/b") == "journal:/a/b"


def test_process_is_told_from_one_that_ended_and_one_elsewhere():
    name = process.process_name()
    machine, pid, start = name.rsplit("/", 2)
    assert process.is_gone(name) is False
    assert process.is_gone(f"{machine}/{pid}/{int(start) + 1}") is True
    assert process.is_gone(f"{machine}/999999999/1") is True
    assert process.is_gone(f"other/{pid}/{start}") is None


def test_workers_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of(["cpu"] * 4) == 2
    assert threads_of(["cpu"] * 99) == 1
    assert threads_of(["cpu"]) is threads_of(["cuda:0", "cuda:1"]) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_of(["cpu"] * 4) is None
