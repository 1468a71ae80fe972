"""``kvbits tune --workers`` and ``--storage``; the slow ones start real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvbits.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(item) for item in arguments])


@pytest.fixture
def asked(monkeypatch):
    """What the command would tune with, team included, in place of tuning."""
    from kvbits.tuning import study

    calls = []

    def pretend(model, tokenizer, settings, run_dir, progress, *, team=None, **rivals):
        calls.append((settings, team))

    monkeypatch.setattr(study, "tune", pretend)
    return calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage", "mysql://me:secret@db/x"], "storage must be journal:PATH, sqlite:PATH or"),
        (["--storage", "journal:/nowhere/study"], "storage must name a file in an existing"),
        (["--study", "mine"], "--study must be given with --storage"),
        (["--parallel", "4"], "parallel must be given with strategy moead, nsga2 or tpe"),
    ],
)
def test_storages_that_cannot_be_are_refused_in_one_line(
    tiny_model_dir, tmp_path, arguments, message
):
    result = run("tune", tiny_model_dir, *arguments, "-o", tmp_path / "run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert "secret" not in line
    assert not (tmp_path / "run").exists()


def test_workers_and_storages_make_a_team_and_batches(asked, tiny_model_dir, tmp_path):
    from kvbits.tuning.scale import Shared

    address = f"journal:{tmp_path / 'shared'}"
    for more in (
        ["--workers", 3],
        ["--storage", address],
        ["--workers", 2, "--strategy", "nsga2"],
        ["--storage", address, "--strategy", "moead", "--parallel", 7],
        ["--strategy", "tpe"],
    ):
        run("tune", tiny_model_dir, "-o", tmp_path / "run", *more)
    assert [isinstance(team, Shared) for _, team in asked] == [True] * 4 + [False]
    assert [settings.parallel for settings, _ in asked] == [1, 1, 20, 7, 1]
    handler = signal.getsignal(signal.SIGTERM)
    assert handler == signal.SIG_DFL


def test_study_that_goes_on_keeps_its_batches(asked, tiny_model_dir, tmp_path):
    (tmp_path / "study.json").write_text('{"settings": {"parallel": 6}}')
    for more in ([], ["--workers", 2], ["--parallel", 3]):
        run("tune", tiny_model_dir, "--strategy", "moead", "-o", tmp_path, *more)
    assert [settings.parallel for settings, _ in asked] == [6, 6, 3]


def test_a_named_gpu_or_all_of_them_in_turn(monkeypatch):
    from kvbits.cli.models import devices_of

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of(3, "auto") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_of(2, "cuda:1") == ["cuda:1", "cuda:1"]
    assert devices_of(1, "auto") == ["auto"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_of(2, "auto") == ["auto", "auto"]


def start(model: Path, folder: Path, *more: object) -> subprocess.Popen[str]:
    settings = ["--bits", 5, "--strategy", "random", "--trials", 40, "-n", 0, "--widths", "4,2"]
    command = [sys.executable, "-c", "from kvbits.cli import main; main()", "tune", model]
    command += [*settings, "--workers", 2, "-o", folder, *more]
    return subprocess.Popen(
        [str(item) for item in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_lines(path: Path, count: int) -> None:
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not come to {count} lines")


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in _command(child)]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_until_gone(pids: list[int]) -> None:
    for _ in range(1200):
        if not any("spawn_main" in _command(str(pid)) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"workers outlived the command: {pids}")


@pytest.mark.slow
def test_command_is_interrupted_killed_and_ends_as_if_nothing_had_been(tiny_model_dir, tmp_path):
    """Ctrl-C, then kill -9 of a worker, then of the command; the same command ends the study."""
    folder = tmp_path / "run"
    first = start(tiny_model_dir, folder)
    wait_for_lines(folder / "sensitivity.jsonl", 5)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "the same command continues from there" in said.splitlines()[-1]
    assert "Traceback" not in said

    second = start(tiny_model_dir, folder)
    wait_for_lines(folder / "search.jsonl", 5)
    workers = children_of(second.pid)
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    wait_for_lines(folder / "search.jsonl", 12)
    workers = children_of(second.pid)
    os.kill(second.pid, signal.SIGKILL)
    second.communicate(timeout=120)
    wait_until_gone(workers)

    last = start(tiny_model_dir, folder)
    _, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    assert not (folder / "workers").exists()
    alone = start(tiny_model_dir, tmp_path / "alone", "--workers", 1)
    alone.communicate(timeout=600)
    for name in ("plan.json", "front.json"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
