"""What kvbits says it exports exists, is documented, and its modules follow the house rules."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import kvbits

SOURCE = Path(kvbits.__file__).resolve().parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 500


def module_name(path: Path) -> str:
    parts = ["kvbits", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exported(path: Path) -> list[str]:
    """Return the literal ``__all__`` of a file, empty where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


EXPORTS = [(module_name(path), name) for path in FILES for name in exported(path)]


@pytest.mark.parametrize(("module", "name"), EXPORTS)
def test_every_exported_name_exists(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", [name for name in kvbits.__all__ if not name.startswith("_")])
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(kvbits, name))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_every_module_says_what_it_holds_and_stays_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "module docstring is missing"
    assert len(text.splitlines()) <= MAX_LINES
