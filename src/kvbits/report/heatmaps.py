"""Heat maps by layer: sensitivities of one side at one width, and errors of whole pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import plotly.graph_objects as go

from kvbits.report import numbers
from kvbits.report.collect import Point, Run
from kvbits.report.compare import (
    Grid,
    log10_or_none,
    pair_grid,
    sensitivity_grids,
    split_by_pruning,
)
from kvbits.report.theme import finish

ROW_HEIGHT, HEAT_MARGIN, MIN_HEIGHT = 24, 96, 260  # the colour bar needs room for its labels
COLUMN_WIDTH, SIDE_WIDTH = 32, 150  # a cell's number; the labels and the colour bar
CHARACTER_WIDTH = 9
LEVEL_CHARACTERS = 6  # longer names of columns, such as those with a method, stand upright
COLOURS = "YlOrBr"


def sensitivity_figures(run: Run) -> list[tuple[str, Any]]:
    """Draw the sensitivities as layer x (side, width), domains on one colour scale."""
    grids = sensitivity_grids(run.sensitivity)
    low, high = _range(grids)
    return [(grid.domain, _heat_map(grid, low, high, "KL, nats")) for grid in grids]


def pairs_figure(run: Run) -> Any | None:
    """Draw the output error of every layer and pair; what pruning dropped is faint."""
    grid = pair_grid(run)
    if grid is None:
        return None
    low, high = _range([grid])
    kept, dropped = split_by_pruning(run, grid)
    figure = _heat_map(kept, low, high, "output error, e_o")
    if run.pruned is not None:
        names = group_names(run)
        labels = [f"{layer} · {names.get(layer, '')}" for layer in grid.layers]
        figure.data[0].update(y=labels)
        figure.add_trace(_pruned_cells(labels, dropped))
        figure.update_yaxes(title_text="layer · group")
    return figure


def group_names(run: Run) -> dict[str, str]:
    """Return a letter for the group of every layer: A, B, and after Z, AA."""
    groups = run.pruned.groups if run.pruned else ()
    return {layer: _letters(index) for index, group in enumerate(groups) for layer in group}


def _letters(index: int) -> str:
    first, last = divmod(index, 26)
    return ("" if first == 0 else chr(64 + first)) + chr(65 + last)


def _pruned_cells(labels: Sequence[str], grid: Grid) -> Any:
    """Faint cells without numbers; hovering tells them."""
    return go.Heatmap(
        x=list(grid.columns),
        y=labels,
        z=[[None if value is None else 1 for value in row] for row in grid.rows],
        colorscale=[[0, "#80858f"], [1, "#80858f"]],
        opacity=0.22,
        showscale=False,
        customdata=_texts(grid, numbers.significant),
        hovertemplate="layer %{y}, %{x}: %{customdata}, pruned<extra></extra>",
        xgap=1,
        ygap=1,
    )


def _texts(grid: Grid, write: Callable[[float], str]) -> list[list[str]]:
    return [["" if value is None else write(value) for value in row] for row in grid.rows]


def heat_width(columns: Collection[str]) -> int:
    """Pixels a heat map needs for the numbers in its cells and the names under them."""
    longest = max(map(len, columns))
    is_level = longest <= LEVEL_CHARACTERS
    return SIDE_WIDTH + len(columns) * (
        max(COLUMN_WIDTH, CHARACTER_WIDTH * longest + 6) if is_level else COLUMN_WIDTH
    )


def _range(grids: Sequence[Grid]) -> tuple[float, float]:
    logs = [log10_or_none(value) for grid in grids for row in grid.rows for value in row]
    seen = [value for value in logs if value is not None]
    return (min(seen), max(seen)) if seen else (-1.0, 0.0)


def _heat_map(grid: Grid, low: float, high: float, title: str) -> Any:
    trace = go.Heatmap(
        x=list(grid.columns),
        y=list(grid.layers),
        z=[[log10_or_none(value) for value in row] for row in grid.rows],
        zmin=low,
        zmax=high,
        colorscale=COLOURS,
        text=_texts(grid, numbers.short),
        customdata=_texts(grid, numbers.significant),
        texttemplate="%{text}",
        textfont={"size": 10},
        hovertemplate="layer %{y}, %{x}: %{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": title, "side": "right", "font": {"size": 13}},
            "tickprefix": "10<sup>",
            "ticksuffix": "</sup>",
            "dtick": 1 if high - low < 6 else 2,
            "thickness": 10,
            "outlinewidth": 0,
        },
    )
    figure = go.Figure(trace)
    longest = max(map(len, grid.columns))
    is_level = longest <= LEVEL_CHARACTERS
    below = 0 if is_level else (CHARACTER_WIDTH - 1) * longest
    finish(figure, max(MIN_HEIGHT, HEAT_MARGIN + ROW_HEIGHT * len(grid.layers)) + below)
    figure.update_layout(margin_b=50 + below)
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        type="category",
        dtick=1,
        title_text="layer",
        ticklabelstandoff=5,
    )
    figure.update_xaxes(showgrid=False, type="category", tickangle=0 if is_level else -90)
    return figure


def plans_figure(plans: Sequence[tuple[str, Point]]) -> Any:
    """Draw the widths of several plans: a row for keys and one for values of each."""
    rows = [
        (f"{name} · {side}", [pair[index] for pair in point.pairs])
        for name, point in plans
        for index, side in enumerate(("K", "V"))
    ]
    most = max(len(widths) for _, widths in rows)
    trace = go.Heatmap(
        x=[str(layer) for layer in range(most)],
        y=[label for label, _ in rows],
        z=[[log10_or_none(width) for width in widths] for _, widths in rows],
        zmin=0,
        zmax=log10_or_none(16),
        colorscale="Blues",
        text=[[f"{width:g}" for width in widths] for _, widths in rows],
        texttemplate="%{text}",
        textfont={"size": 12},
        hovertemplate="%{y}, layer %{x}: %{text} bits<extra></extra>",
        xgap=1,
        ygap=1,
        showscale=False,
    )
    figure = go.Figure(trace)
    finish(figure, 80 + 28 * len(rows))
    figure.update_yaxes(
        autorange="reversed", showgrid=False, type="category", dtick=1, ticklabelstandoff=5
    )
    figure.update_xaxes(showgrid=False, type="category", title_text="layer", tickangle=0)
    return figure
