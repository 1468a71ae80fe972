"""Programs run in a container, which a script of this test stands in for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvbits.evaluation.benchmarks.execution import DockerExecutor

DOCKER = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
open({{log!r}}, "a").write(" ".join(arguments) + "\\n")
if "broken" in arguments:
    sys.stderr.write("no such image")
    sys.exit(125)
done = subprocess.run([sys.executable, "-I", "-"], input=sys.stdin.read(), text=True)
sys.exit(done.returncode)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``docker`` that runs what it is given, and writes down how it was called."""
    path, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(DOCKER.format(log=str(path)))
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return path


def test_a_program_passes_if_it_reaches_its_end(log):
    run = DockerExecutor("docker:python:3.12")
    assert run("assert 1 + 1 == 2\nprint('noise')")
    assert not run("assert 1 + 1 == 3")
    assert not run("import sys; sys.exit(0)")  # leaving before the test is no success
    assert not run("def f(:")


def test_a_container_has_no_network_and_no_rights(log):
    DockerExecutor("docker:python:3.12").check()
    called = log.read_text()
    for flag in ("--network=none", "--cap-drop=ALL", "--read-only", "--memory=2g", "--rm"):
        assert flag in called.split()
    assert "python:3.12 timeout --signal=KILL" in called


def test_what_is_no_container_is_refused(log, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"--execute-in must be an image .* got no such image"):
        DockerExecutor("docker:broken").check()
    for place in ("python:3.12", "docker:", "docker:-v/:/x", "docker:a b"):
        with pytest.raises(ValueError, match="--execute-in must be docker:IMAGE, got"):
            DockerExecutor(place)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"where docker is installed, .* to write answers only"):
        DockerExecutor("docker:python:3.12")
