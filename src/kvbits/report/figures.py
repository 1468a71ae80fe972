"""The front, the bits of a plan, its memory: figures of plans.

Values arrive ready from ``collect`` and ``compare``; here they get a place and a colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from kvbits.report import numbers
from kvbits.report.collect import GIVEN_ORIGIN, SEARCHED_ORIGINS, Point, Run
from kvbits.report.html import Key
from kvbits.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    VIOLET,
    finish,
    log_axis,
)

FRONT_HEIGHT, BITS_HEIGHT, MEMORY_HEIGHT = 340, 270, 330
LAYER_WIDTH = 26  # pixels that two bars with their numbers need


class Style(NamedTuple):
    """How plans of one origin are drawn; ``glyph`` is the marker in a legend."""

    text: str
    colour: str
    symbol: str
    glyph: str


STYLES = {
    "exact": Style("searched, exact", BLUE, "circle", "●"),
    "exact+": Style("searched, exact+", BLUE, "diamond", "◆"),
    "moead": Style("searched, MOEA/D", PURPLE, "hexagon", "⬢"),
    "nsga2": Style("searched, NSGA-II", PURPLE, "pentagon", "⬟"),
    "tpe": Style("searched, TPE", PURPLE, "star", "★"),
    "best uniform": Style("best uniform", BLUE, "circle", "●"),
    "best ladder": Style("best ladder", BLUE, "circle", "●"),
    "best random": Style("best random", BLUE, "circle", "●"),
    "uniform": Style("uniform", ORANGE, "square", "■"),
    "ladder": Style("ladder", GREEN, "triangle-up", "▲"),
    "random": Style("random", GREY, "x-thin", "✕"),
    GIVEN_ORIGIN: Style("given rival", VIOLET, "star-diamond", "✦"),
}
CHOSEN = Style("chosen plan", VERMILION, "circle-open", "◯")
MODES = dict.fromkeys(SEARCHED_ORIGINS, "lines+markers") | {"uniform": "markers+text"}


def front_figures(run: Run) -> list[tuple[str, Any]]:
    """Draw KL against effective bits for every domain, with the baselines."""
    return [(domain, _front_figure(run, domain)) for domain in run.domains]


def front_keys(run: Run) -> list[Key]:
    """What the markers of ``front_figures`` mean."""
    drawn = {point.origin for point in run.points if point.measured_kl}
    keys = [Key(s.glyph, s.colour, s.text) for origin, s in STYLES.items() if origin in drawn]
    expected = next((p for p in run.points if p.is_searched and p.predicted_kl), None)
    if expected is not None:
        colour = STYLES[expected.origin].colour
        keys.append(Key("┄", colour, "expected from calibration data"))
    if run.chosen is not None:
        keys.append(Key(CHOSEN.glyph, CHOSEN.colour, CHOSEN.text))
    if run.long_context_budget is not None:
        keys.append(Key("╎", GREY, "budget"))
    return keys


def _front_figure(run: Run, domain: str) -> Any:
    figure = go.Figure()
    for origin in STYLES:
        points = [point for point in run.points if point.origin == origin]
        add_predicted(figure, points, domain, STYLES[origin])
        add_measured(figure, run, points, domain, STYLES[origin])
    if run.long_context_budget is not None:
        figure.add_vline(
            x=run.long_context_budget, line={"color": GREY, "width": 1, "dash": "dash"}
        )
    if run.chosen is not None:
        add_ring(figure, run, run.chosen, domain, CHOSEN.colour)
    return finish_front(figure)


def finish_front(figure: Any) -> Any:
    """Give a figure the axes of a front."""
    finish(figure, FRONT_HEIGHT)
    figure.update_xaxes(title_text="effective bits per value", dtick=1)
    figure.update_yaxes(**log_axis("forward KL, nats per token"))
    return figure


def add_measured(
    figure: Any, run: Run, points: Sequence[Point], domain: str, style: Style
) -> None:
    """Draw the measured ones of a run's points with their standard errors."""
    points = [p for p in points if domain in p.measured_kl and p.measured_kl[domain].value > 0]
    if not points:
        return
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
        textfont={"size": 10},
        cliponaxis=False,
        line={"color": style.colour, "width": 1.5},
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 8,
            "line": {"width": 1.5 if style.symbol == "x-thin" else 0.5, "color": style.colour},
        },
        text=[point.labels[0] if point.labels else "" for point in points],
        customdata=[hover(run, point, domain) for point in points],
        hovertemplate="%{customdata}<extra></extra>",
        name=style.text,
    )
    figure.add_trace(trace)


def hover(run: Run, point: Point, domain: str) -> str:
    """Everything recorded about a point, a line each."""
    measured = point.measured_kl[domain]
    at_context = ""
    if point.effective_bits_at_context is not None and run.context:
        at_context = (
            f", {numbers.bits(point.effective_bits_at_context)} at "
            f"{numbers.count(run.context)} tokens"
        )
    lines = [
        f"<b>{point.name}</b>{', chosen' if point.is_chosen else ''}",
        f"{numbers.bits(point.effective_bits)} effective bits{at_context}",
        f"KL {domain} {numbers.with_error(*measured)} nats",
    ]
    lines += [
        f"{name} {numbers.percent(task.accuracy)} of {numbers.count(task.n)}"
        for name, task in point.tasks.items()
    ]
    return "<br>".join([*lines, *textwrap.wrap(point.summary.rpartition("; ")[0], 46)])


def add_predicted(figure: Any, points: Sequence[Point], domain: str, style: Style) -> None:
    """Draw what the sum of isolated sensitivities said; rules were not predicted to be good."""
    points = [p for p in points if p.is_searched and p.predicted_kl.get(domain, 0) > 0]
    if not points:
        return
    trace = go.Scatter(
        x=[point.effective_bits for point in points],
        y=[point.predicted_kl[domain] for point in points],
        mode="lines",
        line={"color": style.colour, "width": 1.2, "dash": "dot"},
        text=[point.name for point in points],
        hovertemplate="%{text}, predicted<br>%{x:.2f} bits, %{y:.3g} nats<extra></extra>",
        name=f"{style.text}, predicted",
    )
    figure.add_trace(trace)


def add_ring(figure: Any, run: Run, point: Point, domain: str, colour: str) -> None:
    """Mark the chosen plan; the dot in its ring answers before the points it lies on."""
    if domain not in point.measured_kl:
        return
    trace = go.Scatter(
        x=[point.effective_bits] * 2,
        y=[point.measured_kl[domain].value] * 2,
        mode="markers",
        marker={
            "symbol": [CHOSEN.symbol, "circle"],
            "size": [16, 5],
            "opacity": 1,
            "color": colour,
            "line": {"width": [2.5, 0], "color": colour},
        },
        customdata=[hover(run, point, domain)] * 2,
        hovertemplate="%{customdata}<extra></extra>",
        name=CHOSEN.text,
    )
    figure.add_trace(trace)


SIDES = (("keys", BLUE), ("values", ORANGE))
SIDE_KEYS = [Key("■", colour, name) for name, colour in SIDES]


def bits_figure(point: Point) -> Any:
    """Draw the key and value width of every layer of one plan."""
    layers = list(range(len(point.pairs)))
    figure = go.Figure()
    for side, (name, colour) in enumerate(SIDES):
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
    finish(figure, BITS_HEIGHT)
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.05)
    figure.update_xaxes(title_text="layer", dtick=1, showgrid=False)
    figure.update_yaxes(title_text="bits per code", tickvals=[2, 4, 8, 16], rangemode="tozero")
    return figure


def bits_width(num_layers: int) -> int:
    """Pixels a figure with a pair of bars per layer needs."""
    return 80 + LAYER_WIDTH * num_layers


def memory_figure(run: Run) -> Any:
    """Draw the bytes of the plan's cache against its length, beside those of 16 bits."""
    rows = run.memory
    context = [row.context for row in rows]
    figure = go.Figure()
    for name, colour, values in (
        ("16 bits", GREY, [row.bytes_16bit for row in rows]),
        ("chosen plan", VERMILION, [row.bytes for row in rows]),
    ):
        share = [row.bytes / row.bytes_16bit for row in rows]
        text = [
            f"{name}<br>{numbers.count(row.context)} tokens: {numbers.size(value)}"
            f"<br>plan / 16 bits: {part:.3f}, {numbers.bits(row.effective_bits)} effective bits"
            for row, value, part in zip(rows, values, share, strict=True)
        ]
        figure.add_trace(
            go.Scatter(
                x=context,
                y=values,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 6},
                text=text,
                hovertemplate="%{text}<extra></extra>",
                name=name,
            )
        )
    finish(figure, MEMORY_HEIGHT)
    if (memory := run.study.get("settings", {}).get("memory")) is not None:
        figure.add_hline(y=memory, line={"color": GREY, "width": 1, "dash": "dash"})
    lengths = [value for value in context if math.log2(value).is_integer()]
    figure.update_xaxes(
        title_text="tokens a row",
        type="log",
        tickvals=lengths[::2],
        ticktext=[_short(value) for value in lengths[::2]],
    )
    powers = range(
        math.floor(math.log10(min(row.bytes for row in rows))),
        math.ceil(math.log10(max(row.bytes_16bit for row in rows))) + 1,
    )
    figure.update_yaxes(
        title_text="bytes of the cache",
        type="log",
        tickvals=[10.0**power for power in powers],
        ticktext=[numbers.size(10**power).replace(".0", "") for power in powers],
    )
    return figure


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


MEMORY_KEYS = [Key("●", VERMILION, "chosen plan"), Key("●", GREY, "16 bits")]
