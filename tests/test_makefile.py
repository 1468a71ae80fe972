"""``make test`` runs every check, and a red check makes a red make."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A make that runs the tests must not hand its own flags to the ones started here.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands(target: str, *arguments: str) -> list[str]:
    """Return what make would run for a target whose environment is up to date."""
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", target, *arguments],
        cwd=ROOT,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_make_test_runs_every_check():
    found = commands("test")
    for part in ("ruff check", "ruff format --check", "bin/mypy", "-m pytest"):
        assert any(part in line for line in found), part


@pytest.mark.parametrize("target", ["test", "test-minimum", "test-wheel"])
def test_no_check_can_fail_unseen(target):
    """A pipe, a semicolon or `|| true` would swallow the exit code of what stands before it."""
    names = ("ruff", "mypy", "pytest", "wheel_check")
    checks = [line for line in commands(target) if any(name in line for name in names)]
    assert checks
    for line in checks:
        assert not {"|", "||", ";", "&"} & set(line.split()), line


def test_a_red_check_is_a_red_make(tmp_path):
    """Planted: a linter that finds something stops make before the tests."""
    (tmp_path / "bin").mkdir()
    for tool, code in (("ruff", 1), ("mypy", 0), ("python", 0)):
        path = tmp_path / "bin" / tool
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(0o755)
    arguments = ["make", "-o", f"{tmp_path}/.installed", "test", f"VENV={tmp_path}"]

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, cwd=ROOT, env=CLEAN, capture_output=True, text=True)

    red = make()
    assert red.returncode != 0
    (tmp_path / "bin" / "ruff").write_text("#!/bin/sh\nexit 0\n")
    green = make()
    assert green.returncode == 0, green.stderr


def test_continuous_integration_runs_make_test_only():
    text = (ROOT / ".ci" / "run").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "exec make test"
    assert lines[0] == "set -eu"
