"""What ``kvbits score --list`` and the documentation say of a benchmark."""

from __future__ import annotations

from typing import Any

from kvbits.evaluation.benchmarks.base import Benchmark


def facts(kind: type[Benchmark]) -> dict[str, Any]:
    """Name, origin, data files with their schema, and settings with their defaults."""
    benchmark = kind()
    return {
        "name": kind.name,
        "description": kind.description,
        "origin": kind.origin,
        "shots": kind.default_shots,
        "files": [
            {"name": file.name, "schema": file.schema, "place": file.place}
            for file in benchmark.files
        ],
        "settings": benchmark.model_dump(mode="json"),
    }
