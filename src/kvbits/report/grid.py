"""Grids of length and depth as heat maps on one page, beside the same numbers as tables.

They are read from the ``NAME.results.json`` of ``kvbits score``, whose groups are cells named
``4096 tokens, depth 0.25``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from kvbits.errors import RecordError
from kvbits.report import html, numbers
from kvbits.report.heatmaps import HEAT_MARGIN, MIN_HEIGHT, ROW_HEIGHT
from kvbits.report.tables import Table, render_table
from kvbits.report.theme import finish

RESULTS = ".results.json"
_CELL = re.compile(r"(\d+) tokens, depth (\d\.\d\d)")
_WORDS = (
    "Percent of answers right, or of what was asked for found, by tokens of prompt and answer and "
    "by where it lies: depth 0 is the beginning, depth 1 the end."
)


class Grid(NamedTuple):
    """One metric of one run, by length and depth.

    Attributes:
        task: Name of the task.
        plan: The plan in one line.
        metric: Name of the metric.
        lengths: Tokens, rising.
        depths: Places, rising.
        values: Mean of every cell, by depth and then length; None where there is none.
        n: Examples of a cell, at least.
        mean: Over all examples.
    """

    task: str
    plan: str
    metric: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    n: int
    mean: float

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.task}: {self.plan}"


def read_grids(folder: Path) -> list[Grid]:
    """Read the grids of a run of ``kvbits score``.

    Raises:
        RecordError: If there are none, or a file is damaged.
    """
    files = sorted(folder.glob(f"*{RESULTS}")) if folder.is_dir() else []
    found = [grid for path in files for grid in grids_of(_read(path))]
    if not found:
        raise RecordError(
            f"a run must hold a grid of lengths and depths, got {str(folder)!r}; make one with "
            "kvbits score passkey MODEL -o DIR"
        )
    return found


def grids_of(results: dict[str, Any]) -> list[Grid]:
    """The grids in the results of a run; none if its groups are not cells."""
    try:
        return [
            _grid(results, task, groups)
            for task, groups in results["groups"].items()
            if groups and all(map(_CELL.fullmatch, groups))
        ]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise RecordError(f"results must be those of kvbits score, got none of {error}") from error


def _grid(results: dict[str, Any], task: str, groups: dict[str, dict[str, Any]]) -> Grid:
    cells: dict[tuple[int, float], dict[str, Any]] = {}
    for name, scores in groups.items():
        length, depth = _CELL.findall(name)[0]
        cells[int(length), float(depth)] = scores
    key = next(name for name in results["results"][task] if not name.endswith("_stderr,none"))
    lengths = tuple(sorted({length for length, _ in cells}))
    depths = tuple(sorted({depth for _, depth in cells}))
    values = tuple(
        tuple(cells.get((length, depth), {}).get(key) for length in lengths) for depth in depths
    )
    return Grid(
        task=task,
        plan=str(results["plan"]),
        metric=key.partition(",")[0],
        lengths=lengths,
        depths=depths,
        values=values,
        n=min(int(scores["n"]) for scores in cells.values()),
        mean=float(results["results"][task][key]),
    )


def table(grid: Grid) -> Table:
    """A grid as text, a row a depth."""
    header = ("depth", *(f"{numbers.count(length)} tokens" for length in grid.lengths))
    rows = tuple(
        (f"{depth:.2f}", *("" if value is None else f"{100 * value:.0f}" for value in row))
        for depth, row in zip(grid.depths, grid.values, strict=True)
    )
    caption = f"{grid.title}; {grid.metric}, %, n = {grid.n} a cell, mean {100 * grid.mean:.1f}"
    return Table(header, rows, caption=caption)


def figure(grid: Grid) -> Any:
    """A grid as a heat map; one colour scale for all, from 0 to 100 percent."""
    percents = [[None if v is None else 100 * v for v in row] for row in grid.values]
    made = go.Figure(
        go.Heatmap(
            x=[numbers.count(length) for length in grid.lengths],
            y=[f"{depth:.2f}" for depth in grid.depths],
            z=percents,
            zmin=0,
            zmax=100,
            colorscale="Cividis",
            text=[["" if v is None else f"{v:.0f}" for v in row] for row in percents],
            texttemplate="%{text}",
            textfont={"size": 11},
            hovertemplate="%{x} tokens, depth %{y}: %{z:.1f} %<extra></extra>",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "%", "side": "right"}, "thickness": 12},
        )
    )
    made.update_xaxes(title_text="tokens", type="category", showgrid=False)
    made.update_yaxes(title_text="depth", type="category", autorange="reversed", showgrid=False)
    finish(made, max(MIN_HEIGHT, HEAT_MARGIN + ROW_HEIGHT * len(grid.depths)))
    return made


def render(grids: Sequence[Grid]) -> str:
    """The page of some grids, complete in itself."""
    sections = [
        html.section(
            grid.title,
            html.figure(figure(grid), f"grid-{index}", label=grid.title),
            render_table(table(grid), "compact"),
        )
        for index, grid in enumerate(grids)
    ]
    return html.page("Recall by length and depth", html.paragraph(_WORDS), sections)


def write_page(grids: Iterable[Grid], path: Path) -> Path:
    """Write the page of some grids; an earlier one is replaced once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return html.write(render(list(grids)), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} must be readable JSON, got {error}") from error
    if not isinstance(found, dict) or "groups" not in found:
        return {"groups": {}}  # of lm-evaluation-harness, which has no cells
    return found
