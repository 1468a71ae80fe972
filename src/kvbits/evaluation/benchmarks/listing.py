"""What ``kvbits score --list`` and the documentation say of a benchmark."""

from __future__ import annotations

import json
from typing import Any

from kvbits.evaluation.benchmarks.base import Benchmark
from kvbits.evaluation.benchmarks.source import DataFile


def facts(kind: type[Benchmark]) -> dict[str, Any]:
    """Name, origin, data files with their schema, and settings with their defaults."""
    benchmark = kind()
    return {
        "name": kind.name,
        "description": kind.description,
        "origin": kind.origin,
        "shots": kind.default_shots,
        "files": [_file_facts(file) for file in benchmark.files],
        "example_files": [_file_facts(file) for file in benchmark.example_files],
        "settings": benchmark.model_dump(mode="json"),
    }


def _file_facts(file: DataFile[Any]) -> dict[str, str]:
    return {"name": file.name, "schema": file.schema, "place": file.place}


def written(settings: dict[str, Any]) -> list[str]:
    """Settings as ``--set`` takes them."""
    return [f"{name}={_written(value)}" for name, value in settings.items()]


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    is_plain = isinstance(value, str) and value.isprintable()
    return value if is_plain else json.dumps(value)


def markdown_table() -> str:
    """The table of docs/evaluation.md."""
    from kvbits.evaluation.benchmarks import BENCHMARKS

    lines = [
        "| benchmark | what it asks | shots | data files | settings |",
        "|---|---|---|---|---|",
    ]
    for kind in BENCHMARKS.values():
        row = facts(kind)
        names = [f"`{file['name']}`" for file in row["files"]]
        files = ", ".join(names[:1]) + (f" and {len(names) - 1} more" if names[1:] else "")
        settings = ", ".join(f"`{each}`" for each in written(row["settings"]))
        asks = f"{row['description']} ({row['origin']})"
        cells = f"`{row['name']}`", asks, str(row["shots"]), files or "generated", settings
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
