"""Figures of benchmark records, on one page that needs no network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html

from kvbits.plan.files import write_text

# Okabe and Ito's colours, told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98", "#1f2430")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvbits benchmarks</title></head>
<body style="font-family: system-ui, sans-serif; max-width: 1000px; margin: 2em auto">
<h1>kvbits benchmarks</h1>
<p>{machine}</p>
{figures}
</body></html>
"""

Record = dict[str, Any]


def write_page(records: Sequence[Record], path: Path) -> Path | None:
    """Draw what the records hold; None, and no file, if there is nothing to draw."""
    figures = [figure for draw in DRAWN for figure in draw(records)]
    if not figures:
        return None
    parts = [
        to_html(figure, full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(figures)
    ]
    machine = records[-1].get("machine", {})
    name = machine.get("gpu") or f"{machine.get('processor')}, {machine.get('cores')} cores"
    write_text(path, PAGE.format(machine=name, figures="\n".join(parts)))
    return path


def _time_against_context(records: Sequence[Record]) -> Iterable[go.Figure]:
    cells = [r for r in records if r.get("suite") in {"contexts", "per token", "exact"}]
    cells = [r for r in cells if r["cell"]["batch"] == 8]
    series = _series(cells, lambda r: r["name"], lambda r: (r["cell"]["context"], r["time_us"]))
    if max(map(len, series.values()), default=0) > 1:
        title = "Decode attention of one layer, 8 rows"
        yield _lines(series, title, "tokens of a row", "microseconds")


def _roofline(records: Sequence[Record]) -> Iterable[go.Figure]:
    cells = [r for r in records if r.get("suite") == "per token"]
    if not cells:
        return
    figure = go.Figure()
    series = _series(
        cells,
        lambda r: f"{r['cell']['batch']} × {r['cell']['context']}",
        lambda r: (r["name"], 100 * r["roofline_share"]),
    )
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        names, shares = zip(*points, strict=True)
        figure.add_trace(go.Bar(x=names, y=shares, name=name, marker={"color": colour}))
    figure.update_layout(barmode="group")
    yield _finished(figure, "Share of the measured read bandwidth", "", "%")


def _throughput(records: Sequence[Record]) -> Iterable[go.Figure]:
    runs = [r for r in records if r.get("benchmark") == "decode" and "step_ms" in r]
    kinds = ("subject", "impl", "is_prompted", "context")
    for kind, alike in _by(runs, lambda r: tuple(r.get(name) for name in kinds)).items():
        series = _series(
            alike, lambda r: r["variant"], lambda r: (r["batch"], r["tokens_per_second"])
        )
        subject, impl, is_prompted, context = kind
        title = f"{subject}: decoding with {context} tokens a row"
        title += " behind a prompt" if is_prompted else ""
        title += f", {impl}" if impl not in {None, "auto"} else ""
        yield _lines(series, title, "rows", "tokens per second", axis="linear")


def _largest_batch(records: Sequence[Record]) -> Iterable[go.Figure]:
    runs = [r for r in records if "largest_batch" in r]
    for (subject, context), alike in _by(runs, lambda r: (r["subject"], r["context"])).items():
        points = _series(alike, lambda _: "", lambda r: (r["variant"], r["largest_batch"]))[""]
        names, batches = zip(*points, strict=True)
        figure = go.Figure(go.Bar(x=names, y=batches, marker={"color": COLOURS[0]}))
        yield _finished(figure, f"{subject}: largest batch of {context} tokens", "", "rows")


DRAWN = (_time_against_context, _roofline, _throughput, _largest_batch)


def _by(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        found[key(record)].append(record)
    return found


def _series(
    records: Iterable[Record],
    name: Callable[[Record], str],
    point: Callable[[Record], tuple[Any, float]],
) -> dict[str, list[tuple[Any, float]]]:
    """Points by series; of two records of one point the later counts."""
    found: dict[str, dict[Any, float]] = defaultdict(dict)
    for record in records:
        x, y = point(record)
        found[name(record)][x] = y
    return {key: list(points.items()) for key, points in found.items()}


def _lines(
    series: dict[str, list[tuple[Any, float]]], title: str, x: str, y: str, axis: str = "log"
) -> go.Figure:
    figure = go.Figure()
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        trace = go.Scatter(x=xs, y=ys, name=name, mode="lines+markers", line={"color": colour})
        figure.add_trace(trace)
    figure.update_xaxes(type=axis)
    figure.update_yaxes(type=axis)
    return _finished(figure, title, x, y)


def _finished(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(template="plotly_white", title=title, height=420)
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure
