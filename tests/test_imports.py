"""Imports point one way, and starting up stays light.

The order is the picture in docs/design.md. A module may import its own package and anything to
its right; ``report`` reads record files only, so it sees nothing but ``errors`` and the plain
arithmetic of ``evaluation/statistics.py``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kvbits

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kvbits"

# Lowest first: a part may import the parts of a lower rank.
RANKS = {
    "errors": 0,
    "codecs": 1,
    "geometry": 2,
    "layer_plan": 3,
    "memory": 4,
    "attention": 5,
    "cache": 6,
    "plan": 7,
    "calibration": 8,
    "methods": 9,
    "evaluation": 10,
    "export": 11,
    "generation": 11,
    "tuning": 11,
    "report": 11,
    "bench": 12,
    "replay": 12,
    "cli": 13,
    "testing": 14,  # shipped helpers for tests: may import anything, nothing imports them
}
# The door and the version are not part of the order: everything may read them.
OUTSIDE_THE_ORDER = {"__init__", "_version"}

# geometry.py asks transformers how it types the layers of a config, methods/rotary.py for the
# frequencies of its rotary embedding, and nothing else.
MAY_IMPORT_TRANSFORMERS = (
    "geometry.py",
    "cache/hf.py",
    "cache/saving.py",
    "attention/hf.py",
    "calibration/",
    "methods/rotary.py",
    "evaluation/",
    "tuning/",
    "bench/",
    "replay/model.py",
    "cli/",
    "testing/",
)
REPORT_MAY_IMPORT = ("kvbits.errors", "kvbits.evaluation.statistics")
HEAVY = ("torch", "transformers", "optuna", "scipy", "sklearn", "plotly", "numpy", "pydantic")


class Import(NamedTuple):
    """One imported module, absolute, and where it stands."""

    module: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path.relative_to(SOURCE)}:{self.line} imports {self.module}"


def absolute_name(node: ast.ImportFrom, package: tuple[str, ...]) -> str:
    """Resolve ``from ..x import y`` against the package the file is in."""
    if node.level == 0:
        return node.module or ""
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def parse_imports(path: Path, text: str) -> Iterator[Import]:
    package = ("kvbits", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, path, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = absolute_name(node, package)
            yield Import(module, path, node.lineno)
            if module == "kvbits":  # from kvbits import plan
                for alias in node.names:
                    target = kvbits._EXPORTS.get(alias.name, f"kvbits.{alias.name}")
                    yield Import(target, path, node.lineno)


def all_imports() -> list[Import]:
    files = sorted(SOURCE.rglob("*.py"))
    assert files, f"no sources under {SOURCE}"
    return [item for path in files for item in parse_imports(path, path.read_text())]


def part_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def target_part(module: str) -> str | None:
    """Return the part of kvbits a module name points into; None for other libraries."""
    names = module.split(".")
    if names[0] != "kvbits" or len(names) == 1:
        return None
    if names[1] in RANKS:
        return names[1]
    return None if names[1].startswith("_") else names[1]


def violations(imports: list[Import]) -> list[str]:
    found = []
    for item in imports:
        source, target = part_of(item.path), target_part(item.module)
        if target is None or source in OUTSIDE_THE_ORDER or source == target:
            continue
        if source == "report":
            allowed = item.module in REPORT_MAY_IMPORT
        else:
            allowed = target in RANKS and RANKS[target] < RANKS[source]
        if not allowed:
            found.append(str(item))
    return found


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(path) for path in SOURCE.rglob("*.py")} - OUTSIDE_THE_ORDER
    assert parts <= set(RANKS), f"give these a rank in tests/test_imports.py: {parts - set(RANKS)}"


def test_imports_point_one_way():
    assert violations(all_imports()) == []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("codecs/x.py", "from kvbits.plan import CachePlan"),
        ("codecs/x.py", "from ..cache.layer import CacheLayer"),
        ("attention/x.py", "import kvbits.cache.layer"),
        ("report/x.py", "from kvbits.evaluation.records import Record"),
        ("plan.py", "def f():\n    from kvbits.tuning import study"),
        ("memory.py", "from kvbits import plan"),
        ("memory.py", "from kvbits import CachePlan"),
    ],
)
def test_a_planted_wrong_import_is_found(where, text):
    """The check itself works: relative, lazy and plain forms are all seen."""
    assert violations(list(parse_imports(SOURCE / where, text)))


def test_transformers_stays_behind_its_seams():
    offenders = [
        str(item)
        for item in all_imports()
        if item.module.split(".")[0] == "transformers"
        and not item.path.relative_to(SOURCE).as_posix().startswith(MAY_IMPORT_TRANSFORMERS)
    ]
    assert offenders == []


def heavy_modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return which heavy libraries it loaded."""
    report = "import sys; print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.rsplit("LOADED", 1)[1].split()
    assert "kvbits" in loaded
    return set(loaded) & set(HEAVY)


def test_importing_kvbits_loads_nothing_heavy():
    assert heavy_modules_after("import kvbits") == set()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["tune", "--help"], ["eval", "--help"], ["score", "--help"]],
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "from kvbits.cli import main\nimport sys\n"
        f"sys.argv = ['kvbits', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code, exit.code"
    )
    assert heavy_modules_after(code) - {"pydantic"} == set()  # newer typer itself loads pydantic


def test_a_report_needs_no_model_side():
    """A run made elsewhere is reported without torch."""
    code = "import kvbits.report.page, kvbits.report.runs_page"
    assert heavy_modules_after(code) - {"numpy", "plotly"} == set()  # plotly loads numpy


def test_heavy_libraries_are_detected():
    assert "numpy" in heavy_modules_after("import kvbits, numpy")
