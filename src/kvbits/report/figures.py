"""The three figures of the page, as plotly figures.

Values arrive ready from ``collect`` and ``compare``; here they get a place and a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvbits.report import numbers
from kvbits.report.collect import SEARCHED_ORIGINS, Point, Run
from kvbits.report.compare import Grid, log10_or_none, sensitivity_grids

# Okabe and Ito's colours, told apart by readers with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY, INK, RULE = "#CC79A7", "#8a8f98", "#1f2430", "#e3e6eb"
STYLE = {
    "exact": ("searched, exact", BLUE, "circle"),
    "exact+": ("searched, exact+", BLUE, "diamond"),
    "moead": ("searched, MOEA/D", PURPLE, "hexagon"),
    "nsga2": ("searched, NSGA-II", PURPLE, "pentagon"),
    "tpe": ("searched, TPE", PURPLE, "star"),
    "best uniform": ("best uniform", BLUE, "circle"),
    "best ladder": ("best ladder", BLUE, "circle"),
    "best random": ("best random", BLUE, "circle"),
    "uniform": ("uniform", ORANGE, "square"),
    "ladder": ("ladder", GREEN, "triangle-up"),
    "random": ("random", GREY, "x-thin"),
}
MODES = dict.fromkeys(SEARCHED_ORIGINS, "lines+markers") | {"uniform": "markers+text"}
# Plotly sizes a page by height; widths follow the browser.
FRONT_HEIGHT, BITS_HEIGHT, ROW_HEIGHT, HEAT_MARGIN = 470, 300, 24, 120
MIN_HEAT_HEIGHT = 280  # the colour bar needs room for its labels


def front_figure(run: Run) -> Any:
    """Draw KL against effective bits, one panel per domain, with the baselines."""
    domains = run.domains
    figure = make_subplots(
        rows=1, cols=len(domains), subplot_titles=domains, horizontal_spacing=0.07
    )
    for column, domain in enumerate(domains, start=1):
        for origin in STYLE:
            points = [point for point in run.points if point.origin == origin]
            _add_measured(figure, points, domain, column)
            _add_predicted(figure, points, domain, column)
        _add_chosen(figure, run, domain, column)
    figure.update_xaxes(title_text="effective bits per value", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, minor_showgrid=False)
    figure.update_yaxes(title_text="forward KL, nats per token", col=1)
    finish(figure, FRONT_HEIGHT, top=100)
    figure.update_layout(legend={"orientation": "h", "y": 1.14, "yanchor": "bottom", "x": 0})
    return figure


def _add_measured(figure: Any, points: Sequence[Point], domain: str, column: int) -> None:
    points = [p for p in points if domain in p.measured_kl and p.measured_kl[domain].value > 0]
    if not points:
        return
    label, colour, symbol = STYLE[points[0].origin]
    width = 1.5 if symbol == "x-thin" else 0.5
    trace = go.Scatter(
        x=[point.effective_bits for point in points],
        y=[point.measured_kl[domain].value for point in points],
        error_y={
            "array": [point.measured_kl[domain].standard_error for point in points],
            "thickness": 1,
            "width": 2,
        },
        mode=MODES.get(points[0].origin, "markers"),
        textposition="top right",
        textfont={"size": 10, "color": GREY},
        cliponaxis=False,
        line={"color": colour, "width": 1.5},
        marker={
            "color": colour,
            "symbol": symbol,
            "size": 7,
            "line": {"width": width, "color": colour},
        },
        text=[_short_name(point) for point in points],
        customdata=[point.name for point in points],
        hovertemplate="%{customdata}<br>%{x:.2f} bits, %{y:.3g} nats<extra></extra>",
        name=label,
        legendgroup=label,
        showlegend=column == 1,
    )
    figure.add_trace(trace, row=1, col=column)


def _short_name(point: Point) -> str:
    """K4V2 for a uniform plan: the rest of its name stands in the legend."""
    return point.labels[0] if point.labels else ""


def _add_predicted(figure: Any, points: Sequence[Point], domain: str, column: int) -> None:
    """Draw what the sum of isolated sensitivities said; rules were not predicted to be good."""
    points = [p for p in points if p.is_searched and p.predicted_kl.get(domain, 0) > 0]
    if not points:
        return
    label, colour, _ = STYLE[points[0].origin]
    trace = go.Scatter(
        x=[point.effective_bits for point in points],
        y=[point.predicted_kl[domain] for point in points],
        mode="lines",
        line={"color": colour, "width": 1.2, "dash": "dot"},
        text=[point.name for point in points],
        hovertemplate="%{text}, predicted<br>%{x:.2f} bits, %{y:.3g} nats<extra></extra>",
        name=f"{label}, predicted",
        legendgroup=f"{label}, predicted",
        showlegend=column == 1,
    )
    figure.add_trace(trace, row=1, col=column)


def _add_chosen(figure: Any, run: Run, domain: str, column: int) -> None:
    if run.budget_bits is not None:
        line = {"color": INK, "width": 1, "dash": "dash"}
        figure.add_vline(x=run.budget_bits, line=line, row=1, col=column)
    point = run.chosen
    if point is None or domain not in point.measured_kl:
        return
    trace = go.Scatter(
        x=[point.effective_bits],
        y=[point.measured_kl[domain].value],
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": 15,
            "color": VERMILION,
            "line": {"width": 2.5, "color": VERMILION},
        },
        hovertemplate=f"{point.name}, chosen<extra></extra>",
        name="chosen plan",
        legendgroup="chosen",
        showlegend=column == 1,
    )
    figure.add_trace(trace, row=1, col=column)


def sensitivity_figure(run: Run) -> Any:
    """Draw the sensitivities as layer x (side, width) heat maps on one colour scale."""
    grids = sensitivity_grids(run.sensitivity)
    figure = make_subplots(
        rows=1,
        cols=len(grids),
        subplot_titles=[grid.domain for grid in grids],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    logs = [[[log10_or_none(value) for value in row] for row in grid.rows] for grid in grids]
    seen = [value for rows in logs for row in rows for value in row if value is not None]
    low, high = (min(seen), max(seen)) if seen else (-1.0, 0.0)
    for column, (grid, rows) in enumerate(zip(grids, logs, strict=True), start=1):
        figure.add_trace(_heat_map(grid, rows, low, high), row=1, col=column)
    figure.update_yaxes(autorange="reversed", dtick=1, showgrid=False)
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_xaxes(showgrid=False, type="category")
    num_layers = len(grids[0].layers) if grids else 0
    finish(figure, max(MIN_HEAT_HEIGHT, HEAT_MARGIN + ROW_HEIGHT * num_layers))
    return figure


def _heat_map(grid: Grid, logs: list[list[float | None]], low: float, high: float) -> Any:
    return go.Heatmap(
        x=list(grid.columns),
        y=list(grid.layers),
        z=logs,
        zmin=low,
        zmax=high,
        colorscale="YlOrBr",
        text=[["" if v is None else numbers.short(v) for v in row] for row in grid.rows],
        customdata=[
            ["" if v is None else numbers.significant(v) for v in row] for row in grid.rows
        ],
        texttemplate="%{text}",
        textfont={"size": 10},
        hovertemplate="layer %{y}, %{x}: %{customdata} nats<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "KL, nats", "side": "right"},
            "tickprefix": "10<sup>",
            "ticksuffix": "</sup>",
            "dtick": 1 if high - low < 6 else 2,
            "thickness": 12,
            "outlinewidth": 0,
        },
    )


def bits_figure(point: Point) -> Any:
    """Draw the key and value width of every layer of one plan."""
    layers = list(range(len(point.pairs)))
    figure = go.Figure()
    for side, (name, colour) in enumerate((("keys", BLUE), ("values", ORANGE))):
        widths = [pair[side] for pair in point.pairs]
        figure.add_trace(
            go.Bar(
                x=layers,
                y=widths,
                text=widths,
                textposition="outside",
                textfont={"size": 11},
                cliponaxis=False,
                name=name,
                marker={"color": colour},
                customdata=point.labels,
                hovertemplate=f"layer %{{x}}: {name} %{{y}} bits, %{{customdata}}<extra></extra>",
            )
        )
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.05)
    figure.update_xaxes(title_text="layer", dtick=1, showgrid=False)
    figure.update_yaxes(title_text="bits per code", tickvals=[2, 4, 8, 16], rangemode="tozero")
    finish(figure, BITS_HEIGHT)
    figure.update_layout(legend={"orientation": "h", "y": 1.05, "yanchor": "bottom", "x": 0})
    return figure


def finish(figure: Any, height: int, top: int = 50) -> None:
    """Give every figure the same plain look."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 62, "r": 16, "t": top, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        hoverlabel={"bgcolor": "white"},
    )
    figure.update_xaxes(gridcolor=RULE, zeroline=False, title_standoff=8)
    figure.update_yaxes(gridcolor=RULE, zeroline=False, title_standoff=8)
