"""The snippets of README, CONTRIBUTING and docs/ run, and the commands they name exist.

Python blocks of one file run in order in one namespace, from a scratch folder in which ``models``
points at the repository's. A block under ``<!-- not run: reason -->`` is only compiled.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MODEL = ROOT / "models" / "kvbits-tiny"
FENCE = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n\n?)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
COMMAND = re.compile(r"^\s*(?:\$ )?(kvbits (?:[^\\\n]|\\\n)*)", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block of a document."""

    path: Path
    line: int
    language: str
    code: str
    is_run: bool


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text()
    return [
        Block(
            path,
            text.count("\n", 0, match.start("code")) + 1,
            match["language"],
            match["code"],
            match["skip"] is None,
        )
        for match in FENCE.finditer(text)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


WITH_PYTHON = [p for p in FILES if any(b.language == "python" for b in blocks_of(p))]
COMMANDS = [
    pytest.param(command.replace("\\\n", " ").split("#")[0].strip(), id=f"{name_of(b.path)}:{i}")
    for path in FILES
    for b in blocks_of(path)
    if b.language in {"bash", "console", "sh"}
    for i, command in enumerate(COMMAND.findall(b.code), start=b.line)
]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    blocks = [block for block in blocks_of(path) if block.language == "python"]
    compiled = [
        (block, compile("\n" * block.line + block.code, str(path), "exec")) for block in blocks
    ]
    assert compiled
    if not MODEL.exists():
        pytest.skip("models/kvbits-tiny is not in this checkout")
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "models", tmp_path / "models")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block, code in compiled:
        if block.is_run:
            exec(code, namespace)


def doctested_modules() -> list[str]:
    source = ROOT / "src"
    paths = [path for path in sorted(source.rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(path.relative_to(source).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", doctested_modules())
def test_doctests_hold(name):
    results = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_options(command):
    """Parse, do not run: a renamed option must not survive in the README."""
    from typer.main import get_command

    from kvbits.cli import app

    _, *arguments = shlex.split(command)
    group = get_command(app)
    context = group.make_context("kvbits", list(arguments), resilient_parsing=True)
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        return
    subcommand = group.get_command(context, words[0])
    assert subcommand is not None, f"no such command: {words[0]}"
    rest = arguments[arguments.index(words[0]) + 1 :]
    if hasattr(subcommand, "get_command"):  # such as bench, which has commands of its own
        name, *rest = rest
        subcommand = subcommand.get_command(context, name)
        assert subcommand is not None, f"no such command: {words[0]} {name}"
    known = {flag for parameter in subcommand.params for flag in parameter.opts} | {"--help"}
    used = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert used <= known, f"no such option: {used - known}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links_point_at_files_that_exist(path):
    missing = [
        link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()
    ]
    assert missing == []


def test_readme_names_the_two_commands_first():
    """A newcomer finds ``make tune`` and ``make test`` before anything else that is typed."""
    typed = [b.code for b in blocks_of(ROOT / "README.md") if b.language == "bash"]
    assert typed
    assert "make tune" in typed[0]
    assert "make test" in typed[0]
