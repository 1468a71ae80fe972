"""Storages of every kind; PostgreSQL is a server of its own, on a socket in a temporary folder."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _binary(name: str) -> str:
    found = shutil.which(name) or next(
        iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None
    )
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


def _somebody() -> str | None:
    """Somebody else than root, whom PostgreSQL refuses; None where this is not root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of an empty database."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    initdb, server, user = _binary("initdb"), _binary("postgres"), _somebody()
    folder = Path(tempfile.mkdtemp(prefix="kvbits-pg-"))  # short: a socket's path must be
    null = subprocess.DEVNULL
    quiet = {"stdout": null, "stderr": null, "cwd": folder, "user": user}
    if user:
        shutil.chown(folder, user)
        quiet |= {"group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    options = ["-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run([initdb, "-D", folder / "data", *options], check=True, **quiet)
    settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    settings += ["-c", "fsync=off", "-c", "shared_buffers=16MB"]
    process = subprocess.Popen([server, "-D", folder / "data", *settings], **quiet)
    try:
        _wait_until_it_answers(folder)
        yield f"postgresql://tester@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)  # does not wait for open connections
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(folder: Path) -> None:
    import psycopg

    for _ in range(200):
        try:
            psycopg.connect(f"host={folder} user=tester dbname=postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise RuntimeError("PostgreSQL did not answer")


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new storage."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres")
    return f"{request.param}:{tmp_path / 'shared'}"


@pytest.fixture(scope="session", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What databases import is imported before tests fork, not in every process again."""
    from kvbits.tuning.scale.storage import open_storage

    open_storage(f"sqlite:{tmp_path_factory.mktemp('first') / 'storage'}")
