"""Run by ``make test-wheel`` in an environment that has only the installed wheel.

Not a pytest module: pytest is not installed there, on purpose.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import kvbits

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_SUFFIXES = {".txt", ".jsonl", ".json"}


def check() -> None:
    """Import every module, read the packaged data, and start the command."""
    package = Path(kvbits.__file__).parent
    assert REPOSITORY / "src" not in package.parents, f"not the wheel: {package}"
    for module in pkgutil.walk_packages(kvbits.__path__, "kvbits."):
        importlib.import_module(module.name)
    in_wheel = {p.relative_to(package) for p in package.rglob("*") if p.suffix in DATA_SUFFIXES}
    source = REPOSITORY / "src" / "kvbits"
    in_tree = {p.relative_to(source) for p in source.rglob("*") if p.suffix in DATA_SUFFIXES}
    assert in_wheel == in_tree, f"data files differ: {in_wheel ^ in_tree}"
    command = Path(sys.executable).with_name("kvbits")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert kvbits.__version__ in done.stdout, done.stdout
    print(f"the wheel works: {package}, {len(in_wheel)} data files")


if __name__ == "__main__":
    check()
