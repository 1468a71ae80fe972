"""One page about several runs: fronts overlaid, plans side by side, numbers in one table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from kvbits.report import account, curves, figures, heatmaps, html, numbers, tables
from kvbits.report.figures import STYLES, Style
from kvbits.report.html import Key, Section, details, paragraph, section
from kvbits.report.runs import (
    NamedRun,
    against_rivals,
    chosen_difference,
    collect_runs,
    differs_in_data,
    shared_domains,
)
from kvbits.report.stages import Measurement
from kvbits.report.tables import Table, render_table
from kvbits.report.theme import RUN_COLOURS

SYMBOLS = (("circle", "●"), ("diamond", "◆"), ("hexagon", "⬢"), ("star", "★"), ("pentagon", "⬟"))
CHARACTER_WIDTH = 8  # pixels of a label's character


def write_comparison(paths: Sequence[Path | str], target: Path | str) -> Path:
    """Write the page of several finished runs of one model.

    Args:
        paths: run folders that ``kvbits tune`` wrote, two or more; differences are from the first.
        target: the file to write.

    Raises:
        RecordError: The runs cannot stand on one page; see ``collect_runs``.
    """
    return html.write(render_comparison(collect_runs(paths)), Path(target))


def render_comparison(runs: Sequence[NamedRun]) -> str:
    """Return the page of runs from ``collect_runs``."""
    different = differs_in_data(runs)
    lead = ""
    if different:
        text = (
            f"The runs were verified on different held-out data in {', '.join(different)}: "
            "numbers of those domains stand in one table but are not paired or divided."
        )
        lead = paragraph(text, "warning")
    return html.page(
        f"{len(runs)} runs of {account.model_name(runs[0].run)}",
        lead,
        [
            _chosen_plans(runs),
            _fronts(runs),
            _differences(runs),
            _equal_bits(runs),
            _bits(runs),
            _positions(runs),
            _provenance(runs),
        ],
    )


def styles(runs: Sequence[NamedRun]) -> list[Style]:
    """A colour and a marker for every run."""
    found = []
    for index, each in enumerate(runs):
        symbol, glyph = SYMBOLS[index % len(SYMBOLS)]
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        found.append(Style(each.name, colour, symbol, glyph))
    return found


def _keys(runs: Sequence[NamedRun]) -> list[Key]:
    return [Key(style.glyph, style.colour, style.text) for style in styles(runs)]


def chosen(runs: Sequence[NamedRun]) -> Table:
    """The size and the verified KLs of every run's plan."""
    domains = shared_domains(runs)
    header = ("run", "search", "bits", "at context", "cache", *(f"KL {d}" for d in domains))
    return Table(header, tuple(_chosen_row(each, domains) for each in runs))


def _chosen_row(each: NamedRun, domains: Sequence[str]) -> tuple[str, ...]:
    run, point = each.run, each.chosen
    settings = run.study.get("settings", {})
    search = [settings.get("strategy"), settings.get("objective"), run.mode]
    at_context = ""
    if point.effective_bits_at_context is not None and run.context:
        at_context = (
            f"{numbers.bits(point.effective_bits_at_context)} at {numbers.count(run.context)}"
        )
    cells = [each.name, ", ".join(str(word) for word in search if word)]
    cells += [numbers.bits(point.effective_bits), at_context]
    cells.append(numbers.size(run.bought["bytes"]) if run.bought else "")
    for domain in domains:
        measured = point.measured_kl.get(domain)
        cells.append("" if measured is None else numbers.with_error(*measured))
    return tuple(cells)


def chosen_tasks(runs: Sequence[NamedRun]) -> Table:
    """The verified accuracy of every run's plan, of those that answered problems."""
    names = tuple(dict.fromkeys(task for each in runs for task in each.chosen.tasks))
    header = ["run"]
    for name in names:
        header += [name, "n", "difference [95 %]"]
    rows = []
    for each in runs:
        if each.chosen.tasks:
            cells = [each.name]
            for name in names:
                task = each.chosen.tasks.get(name)
                accuracy, difference = tables.task_cells(task)
                cells += [accuracy, "" if task is None else numbers.count(task.n), difference]
            rows.append(tuple(cells))
    return Table(tuple(header), tuple(rows))


def _chosen_plans(runs: Sequence[NamedRun]) -> Section | None:
    tasks = chosen_tasks(runs)
    note = paragraph("Exact match; the difference is from the full-precision cache, in points.")
    return section(
        "Chosen plans",
        paragraph("Forward KL on held-out data, in nats per token."),
        render_table(chosen(runs)),
        note + render_table(tasks) if tasks.rows else "",
        short="Plans",
    )


def front_figures(runs: Sequence[NamedRun]) -> list[tuple[str, Any]]:
    """Draw the searched plans of every run over each other, and the first run's uniform plans."""
    found = []
    for domain in shared_domains(runs):
        figure = go.Figure()
        uniform = [point for point in runs[0].run.points if point.origin == "uniform"]
        figures.add_measured(figure, runs[0].run, uniform, domain, STYLES["uniform"])
        for each, style in zip(runs, styles(runs), strict=True):
            searched = [point for point in each.run.points if point.is_searched]
            figures.add_predicted(figure, searched, domain, style)
            figures.add_measured(figure, each.run, searched, domain, style)
            figures.add_ring(figure, each.run, each.chosen, domain, style.colour)
        found.append((domain, figures.finish_front(figure)))
    return found


def _fronts(runs: Sequence[NamedRun]) -> Section | None:
    uniform = STYLES["uniform"]
    return section(
        "Quality against size",
        paragraph(
            "Lower left is better. Markers are measured on held-out data, with one standard "
            "error; dotted lines are expected from calibration data; rings are the chosen plans."
        ),
        html.legend([*_keys(runs), Key(uniform.glyph, uniform.colour, "uniform")]),
        html.panels(front_figures(runs), "front", label="KL against effective bits of all runs"),
        short="Fronts",
    )


def differences(runs: Sequence[NamedRun]) -> Table:
    """KL of every chosen plan minus that of the first run's, paired by document."""
    domains = shared_domains(runs)
    rows = []
    for each in runs[1:]:
        found = [chosen_difference(runs[0], each, domain) for domain in domains]
        cells = ["" if gap is None else numbers.signed_with_error(*gap) for gap in found]
        gap = each.chosen.effective_bits - runs[0].chosen.effective_bits
        rows.append((each.name, f"{gap:+.2f}".replace("-", "−"), *cells))
    return Table(("run", "bits", *(f"KL difference, {d}" for d in domains)), tuple(rows))


def _differences(runs: Sequence[NamedRun]) -> Section | None:
    return section(
        f"Chosen plans against that of {runs[0].name}",
        paragraph(
            f"KL of each run's plan minus that of {runs[0].name} over the same documents; ± is "
            "the paired standard error. Below zero the run did better. Mind the difference in "
            "bits: the next table compares at equal ones."
        ),
        render_table(differences(runs)),
        short="Differences",
    )


def equal_bits(runs: Sequence[NamedRun], domain: str) -> Table:
    """KL of searched plans divided by that of rivals of equal size, a column per run."""
    rows = []
    for item in against_rivals(runs):
        if item.domain != domain:
            continue
        cells = [
            "" if ratio is None or partner is None else _ratio_cell(ratio, partner.effective_bits)
            for ratio, partner in zip(item.ratios, item.partners, strict=True)
        ]
        origin = tables.ORIGINS.get(item.rival.origin, item.rival.origin)
        rows.append((item.rival.name, origin, numbers.bits(item.rival.effective_bits), *cells))
    names = (each.name for each in runs)
    return Table(("rival", "from", "bits", *names), tuple(rows), caption=domain)


def _ratio_cell(ratio: Measurement, bits: float) -> str:
    return f"{tables.ratio_cell(ratio)} at {numbers.bits(bits)}"


def _equal_bits(runs: Sequence[NamedRun]) -> Section | None:
    by_domain = [equal_bits(runs, domain) for domain in shared_domains(runs)]
    found = [table for table in by_domain if table.rows]
    if not found:
        return None
    return section(
        "At equal effective bits",
        paragraph(
            "Every rival that any run verified, beside each run's largest searched plan that is "
            "at most 0.05 bits larger and 0.2 smaller: its KL divided by the rival's, with the "
            "paired standard error, and its bits. Below 1 the search did better."
        ),
        *map(render_table, found),
        short="Equal bits",
    )


def _bits(runs: Sequence[NamedRun]) -> Section | None:
    plans = [(each.name, each.chosen) for each in runs]
    layers = max(len(point.pairs) for _, point in plans)
    label = CHARACTER_WIDTH * (max(len(name) for name, _ in plans) + 4)
    rows = tuple(
        (f"{name}, {side}", *(f"{pair[index]:g}" for pair in point.pairs))
        for name, point in plans
        for index, side in enumerate(("keys", "values"))
    )
    table = Table(("layer", *map(str, range(layers))), rows)
    return section(
        "Bits per layer",
        html.figure(
            heatmaps.plans_figure(plans),
            "bits",
            label="Bits of keys and values by layer and run",
            min_width=label + 30 * layers,
        ),
        details("The same numbers as a table", render_table(table, "compact")),
        short="Bits",
    )


def _positions(runs: Sequence[NamedRun]) -> Section | None:
    plans = [
        (each.run, each.chosen.labels, each.name, style)
        for each, style in zip(runs, styles(runs), strict=True)
    ]
    drawn = curves.positions_by_domain(shared_domains(runs), plans)
    if not drawn:
        return None
    text = "Forward KL of the chosen plans by the number of tokens in front of a prediction."
    return section(
        "KL by position",
        paragraph(text),
        html.legend(_keys(runs)),
        html.panels(drawn, "positions", label="KL against position"),
        short="Positions",
    )


def _provenance(runs: Sequence[NamedRun]) -> Section | None:
    parts = []
    for each in runs:
        command = account.command(each.run)
        parts.append(html.heading(each.name))
        parts.append(f'<pre class="wrap">{escape(command)}</pre>' if command else "")
        parts.append(render_table(account.checksums(each.run), "summary"))
    differing = account.differing_settings([(each.name, each.run) for each in runs])
    if differing.rows:
        parts += [html.heading("Where they differ"), render_table(differing, "text")]
    return section("Provenance", *parts)
