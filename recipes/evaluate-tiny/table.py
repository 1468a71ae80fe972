"""Print the table of what ``evaluate.py`` found: scores, differences from 16 bits, lengths.

python recipes/evaluate-tiny/table.py runs/evaluate-tiny
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvbits.errors import RecordError
from kvbits.evaluation.comparison import compare
from kvbits.evaluation.harness_run import read_object, run_samples
from kvbits.evaluation.samples import Sample
from kvbits.evaluation.statistics import paired_difference, paired_mean_difference

FULL = "16-bits"
BENCHMARKS = ("wikitext2", "lambada", "blimp", "passkey", "recall", "arithmetic")
LOSS = "log-likelihood (token)"


class Cell(NamedTuple):
    """One benchmark on one plan.

    Attributes:
        value: Percent right, or the perplexity.
        interval: 95 % interval of the difference from 16 bits, in points; of the perplexity in
            percent; None for a single window.
        n: Examples.
    """

    value: float
    interval: tuple[float, float] | None
    n: int


class Row(NamedTuple):
    """One plan.

    Attributes:
        name: Its name.
        effective_bits: Stored bits a value.
        cells: Benchmarks that were run.
        flips: Problems of arithmetic that it alone solves, and that 16 bits alone solve.
        length_ratio: Tokens of answers to arithmetic over those at 16 bits, with 95 %.
    """

    name: str
    effective_bits: float
    cells: dict[str, Cell]
    flips: tuple[int, int] | None
    length_ratio: tuple[float, float, float] | None


def rows(out: Path) -> list[Row]:
    """Read every plan that has been measured, by effective bits; 16 bits first.

    Raises:
        RecordError: If full precision is missing.
    """
    full = {name: _samples(out / FULL / name) for name in BENCHMARKS}
    if not any(full.values()):
        raise RecordError(f"{out} must hold {FULL!r}, got none; run evaluate.py first")
    found = [row for folder in sorted(out.iterdir()) for row in _row(folder, full)]
    return sorted(found, key=lambda row: (-row.effective_bits, row.name))


def _row(folder: Path, full: dict[str, list[Sample]]) -> Iterator[Row]:
    cells, flips, ratio, manifest = {}, None, None, None
    for name in BENCHMARKS:
        samples = _samples(folder / name)
        if not samples or not full[name]:
            continue
        manifest = read_object(folder / name / "run.json")
        cells[name] = _cell(samples, full[name])
        if name == "arithmetic":
            (found,) = compare(full[name], samples)
            ratio = found.length_ratio and tuple(found.length_ratio)
            flips = (len(found.gained or ()), len(found.lost or ()))
    if manifest is not None:
        bits = manifest["effective_bits"]
        yield Row(manifest["settings"]["plan_name"], bits, cells, flips, ratio)


def _samples(folder: Path) -> list[Sample]:
    if not (folder / f"{folder.name}.results.json").exists():
        return []
    return run_samples(folder)


def _cell(samples: list[Sample], full: list[Sample]) -> Cell:
    """Examples of all parts together, each paired with itself at 16 bits."""
    compare(full, samples)  # refuses other examples, prompts or data
    metric = next(iter(samples[0].metrics))
    pairs = zip(samples, full, strict=True)
    new, old = zip(*((a.metrics[metric], b.metrics[metric]) for a, b in pairs), strict=True)
    if metric == LOSS:
        counts = [sample.weights[metric] for sample in samples]
        mean = sum(x * n for x, n in zip(new, counts, strict=True)) / sum(counts)
        _, low, high = paired_mean_difference(old, new, counts)  # of the loss
        change = (100 * math.expm1(low), 100 * math.expm1(high))
        return Cell(math.exp(-mean), None if math.isnan(low) else change, len(samples))
    _, low, high = paired_difference([x == 1 for x in new], [x == 1 for x in old])
    return Cell(100 * sum(new) / len(new), (100 * low, 100 * high), len(samples))


def markdown(found: list[Row]) -> str:
    """The table; counts of examples stand in its head."""
    counts = {
        name: {row.cells[name].n for row in found if name in row.cells} for name in BENCHMARKS
    }
    heads = {
        name: f"{name}, {'perplexity' if name == 'wikitext2' else '%'} (n = {_one(name, n)})"
        for name, n in counts.items()
        if n
    }
    columns = ["cache", "effective bits", *heads.values(), "flips", "length"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        cells = [_text(row.cells.get(name), row.effective_bits == 16) for name in heads]
        flips = "" if row.flips is None else "+{} −{}".format(*row.flips)
        length = ""
        if row.length_ratio is not None:
            length = "{:.2f} [{:.2f}, {:.2f}]".format(*row.length_ratio)
        cells = [row.name, f"{row.effective_bits:.2f}", *cells, flips, length]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one(name: str, counts: set[int]) -> int:
    if len(counts) > 1:
        raise RecordError(f"n of {name} must be the same for all plans, got {sorted(counts)}")
    return next(iter(counts))


def _text(cell: Cell | None, is_full: bool) -> str:
    if cell is None:
        return "–"
    value = f"{cell.value:.2f}" if cell.value < 1000 else f"{cell.value:.0f}"
    if is_full or cell.interval is None:
        return value
    return "{} [{:+.1f}, {:+.1f}]".format(value, *cell.interval)


def summary(found: list[Row]) -> list[dict[str, Any]]:
    """The table as JSON, to be committed beside it."""
    return [
        row._asdict() | {"cells": {n: c._asdict() for n, c in row.cells.items()}} for row in found
    ]


if __name__ == "__main__":
    read = rows(Path(sys.argv[1]))
    print(markdown(read))
    if len(sys.argv) > 2:
        text = "".join(f"{json.dumps(each)}\n" for each in summary(read))
        Path(sys.argv[2]).write_text(text)
