"""Figures of measurements along something: positions, domains, trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from kvbits.report import numbers
from kvbits.report.collect import Run
from kvbits.report.compare import chosen_trial, in_budget, rivals_in_budget
from kvbits.report.figures import STYLES, Style
from kvbits.report.html import Key
from kvbits.report.stages import Position, Trial
from kvbits.report.theme import BLUE, GREY, VERMILION, finish, log_axis

POSITION_HEIGHT, DOMAIN_HEIGHT, SEARCH_HEIGHT = 300, 330, 320
# Nothing is packed yet where a document is shorter than the exact window; what is left there is
# the rounding of float32, which a logarithmic axis would show as ten empty decades.
NOISE_NATS = 1e-9
CHOSEN = Style("chosen plan", VERMILION, "circle", "●")


def plans_to_show(run: Run) -> list[tuple[str, tuple[str, ...], Style]]:
    """The chosen plan and the best rival of each kind within the budget, by name."""
    shown = [(p.name, p.labels, STYLES[p.origin]) for p in rivals_in_budget(run)]
    if run.chosen is not None:
        shown.append((run.chosen.name, run.chosen.labels, CHOSEN))
    return shown


def plan_keys(run: Run) -> list[Key]:
    """What the colours of positions and domains mean."""
    return [Key(s.glyph, s.colour, f"{s.text}: {name}") for name, _, s in plans_to_show(run)][::-1]


def position_figures(run: Run) -> list[tuple[str, Any]]:
    """Draw KL against the tokens in front of a prediction, a figure per domain."""
    shown = plans_to_show(run)
    return positions_by_domain(
        run.domains, [(run, labels, name, style) for name, labels, style in shown]
    )


def positions_by_domain(
    domains: Sequence[str], plans: Sequence[tuple[Run, tuple[str, ...], str, Style]]
) -> list[tuple[str, Any]]:
    """Draw plans, of one run or of several; ``CHOSEN`` and runs' own styles get error bars."""
    found = []
    for domain in domains:
        figure = go.Figure()
        for run, labels, name, style in plans:
            record = run.verified.get((labels, domain))
            if record is not None and record.positions:
                figure.add_trace(_position_trace(name, record.positions, style))
        if figure.data:
            finish(figure, POSITION_HEIGHT)
            figure.update_xaxes(title_text="tokens in front", type="log", **_powers_of_two(figure))
            drawn = [value for trace in figure.data for value in trace.y]
            figure.update_yaxes(**log_axis("forward KL, nats", drawn))
            found.append((domain, figure))
    return found


def _position_trace(name: str, positions: Sequence[Position], style: Style) -> Any:
    shown = [row for row in positions if row.kl.value > NOISE_NATS]
    is_main = style not in STYLES.values()
    return go.Scatter(
        x=[_middle(row) for row in shown],
        y=[row.kl.value for row in shown],
        error_y={"array": [row.kl.standard_error for row in shown], "thickness": 1, "width": 2}
        if is_main
        else None,
        mode="lines+markers",
        opacity=1 if is_main else 0.75,
        line={"color": style.colour, "width": 2.2 if is_main else 1.2},
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 7 if is_main else 5,
            "line": {"width": 1.2 if style.symbol == "x-thin" else 0, "color": style.colour},
        },
        customdata=[
            f"<b>{name}</b><br>{row.start} to {row.stop - 1} tokens in front<br>"
            f"{numbers.with_error(*row.kl)} nats, {numbers.count(row.num_tokens)} predictions"
            for row in shown
        ],
        hovertemplate="%{customdata}<extra></extra>",
        name=name,
    )


def _middle(row: Position) -> float:
    """The geometric middle of a bin; the first begins at one token."""
    return float((max(1, row.start) * (row.stop - 1)) ** 0.5)


def _powers_of_two(figure: Any) -> dict[str, Any]:
    drawn = [math.log2(value) for trace in figure.data for value in trace.x]
    if not drawn:
        return {}
    powers = range(math.floor(min(drawn)), math.ceil(max(drawn)) + 1)
    values = [2**power for power in powers[:: max(1, len(powers) // 6)]]
    return {
        "tickvals": values,
        "ticktext": [str(value) for value in values],
        "range": [0.3010 * (min(drawn) - 0.35), 0.3010 * (max(drawn) + 0.35)],
    }


def domains_figure(run: Run) -> Any:
    """Draw the KL of every domain: expected, measured on calibration data, and held out."""
    figure = go.Figure()
    if run.chosen is None:
        return figure
    for name, labels, style in plans_to_show(run):
        rows = [
            (d, run.verified[labels, d].kl) for d in run.domains if (labels, d) in run.verified
        ]
        figure.add_trace(_domain_trace(name, rows, style, "held-out data"))
    predicted = [(d, v) for d, v in run.chosen.predicted_kl.items() if v > 0]
    trial = chosen_trial(run)
    for label, symbol, values in (
        ("predicted", "line-ew", predicted),
        ("calibration data", "circle-open", list(trial.items())),
    ):
        style = Style(label, VERMILION, symbol, "")
        rows_without_error = [(domain, (value, None)) for domain, value in values]
        figure.add_trace(_domain_trace(run.chosen.name, rows_without_error, style, label))
    finish(figure, DOMAIN_HEIGHT)
    figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(**log_axis("forward KL, nats per token"))
    return figure


def _domain_trace(name: str, rows: Sequence[tuple[str, Any]], style: Style, where: str) -> Any:
    rows = [(domain, kl) for domain, kl in rows if kl[0] > 0]
    return go.Scatter(
        x=[domain for domain, _ in rows],
        y=[kl[0] for _, kl in rows],
        error_y={"array": [kl[1] for _, kl in rows], "thickness": 1.2, "width": 3}
        if rows and rows[0][1][1] is not None
        else None,
        mode="markers",
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 10,
            "line": {
                "width": 2.5 if style.symbol in ("line-ew", "x-thin", "circle-open") else 0,
                "color": style.colour,
            },
        },
        offsetgroup=f"{name} {where}",
        customdata=[_domain_hover(name, where, kl) for _, kl in rows],
        hovertemplate="%{customdata}<extra></extra>",
        name=f"{name}, {where}",
    )


def _domain_hover(name: str, where: str, kl: Any) -> str:
    value = numbers.significant(kl[0]) if kl[1] is None else numbers.with_error(*kl)
    return f"<b>{name}</b>, {where}<br>{value} nats"


def search_figures(run: Run) -> list[tuple[str, Any]]:
    """Draw the best loss so far by trial, and where the trials went."""
    if not run.trials:
        return []
    return [("best plan so far", _progress(run)), ("plans measured", _explored(run))]


def _progress(run: Run) -> Any:
    trials, fits = run.trials, in_budget(run)
    best = list(
        accumulate(
            (t.loss if fit else float("inf") for t, fit in zip(trials, fits, strict=True)), min
        )
    )
    figure = go.Figure()
    for is_fitting, colour, symbol in ((False, GREY, "circle-open"), (True, BLUE, "circle")):
        rows = [(i, t) for i, t in enumerate(trials, start=1) if fits[i - 1] == is_fitting]
        if rows:
            figure.add_trace(
                go.Scatter(
                    x=[i for i, _ in rows],
                    y=[t.loss for _, t in rows],
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 6},
                    customdata=[_trial_hover(i, t) for i, t in rows],
                    hovertemplate="%{customdata}<extra></extra>",
                    name="within the budget" if is_fitting else "beyond it",
                )
            )
    steps = [(i, loss) for i, loss in enumerate(best, start=1) if loss < float("inf")]
    figure.add_trace(
        go.Scatter(
            x=[i for i, _ in steps],
            y=[loss for _, loss in steps],
            mode="lines",
            line={"color": VERMILION, "width": 2, "shape": "hv"},
            hoverinfo="skip",
            name="best so far",
        )
    )
    figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dot"})
    finish(figure, SEARCH_HEIGHT)
    figure.update_xaxes(title_text="trial", rangemode="tozero", tickformat="d")
    if len(trials) <= 12:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(title_text="loss", type="log", nticks=6)
    return figure


def _explored(run: Run) -> Any:
    trials = run.trials
    figure = go.Figure(
        go.Scatter(
            x=[t.effective_bits for t in trials],
            y=[t.loss for t in trials],
            mode="markers",
            marker={
                "color": list(range(1, len(trials) + 1)),
                "colorscale": [[0, "#b9cfe4"], [1, "#0b4f85"]],
                "size": 7,
                "line": {"width": 0.5, "color": GREY},
                "showscale": len(trials) > 1,
                "colorbar": {
                    "title": {"text": "trial", "side": "right", "font": {"size": 13}},
                    "thickness": 10,
                    "outlinewidth": 0,
                    "tickformat": "d",
                    "nticks": min(6, len(trials)),
                },
            },
            customdata=[_trial_hover(i, t) for i, t in enumerate(trials, start=1)],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    if run.budget_bits is not None:
        figure.add_vline(x=run.budget_bits, line={"color": GREY, "width": 1, "dash": "dash"})
    finish(figure, SEARCH_HEIGHT)
    figure.update_xaxes(title_text="effective bits per value")
    figure.update_yaxes(title_text="loss", type="log", nticks=6)
    return figure


def _trial_hover(number: int, trial: Trial) -> str:
    return (
        f"<b>trial {number}</b>, {trial.stage}<br>{numbers.bits(trial.effective_bits)} bits, "
        f"loss {numbers.significant(trial.loss)} (predicted "
        f"{numbers.significant(trial.predicted_loss)})"
    )


SEARCH_KEYS = [
    Key("●", BLUE, "within the budget"),
    Key("○", GREY, "beyond it"),
    Key("━", VERMILION, "best so far"),
]
