"""One self-contained HTML page about a run.

plotly.js is embedded once, nothing is fetched, and every figure has its numbers in a table beside
it, so that the page can be read without JavaScript. This file holds text only: numbers come from
``collect`` and ``compare``, their wording from ``tables`` and ``account``.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from kvbits.report import account, figures, tables
from kvbits.report.collect import Run, collect
from kvbits.report.style import CSS

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
<script>{plotly}</script>
</head>
<body>
<main>
<h1>{title}</h1>
{sections}
</main>
</body>
</html>
"""

WORDS = """<dl>
<dt>effective bits</dt><dd>Stored bits divided by stored values, scales and offsets included, in
the limit of a long context. A plan's name gives nominal code widths; this is what memory
pays.</dd>
<dt>forward KL</dt><dd>KL(full precision ‖ packed) of the next-token distribution, in nats per
counted token, teacher-forced through the packed cache in the order decoding would fill it.</dd>
<dt>±</dt><dd>One standard error, clustered by document.</dd>
<dt>difference</dt><dd>Packed minus full precision on the same problems, in percentage points, with
its 95 % interval.</dd>
<dt>predicted</dt><dd>The sum of the sensitivities of every layer and side on calibration data; it
is not a measurement of the plan.</dd>
</dl>"""


def write_page(
    run_dir: Path | str, path: Path | str | None = None, *, model: str | None = None
) -> Path:
    """Write the report of a run directory.

    Args:
        run_dir: the folder ``kvbits tune`` wrote.
        path: the file to write; ``report.html`` in the run directory by default.
        model: what commands on the page call the model; by default the name the run recorded.

    Returns:
        Where the page is. It replaces an earlier one only once it is complete.

    Raises:
        RecordError: the run directory is damaged, or holds no measurement yet.
    """
    target = Path(path) if path is not None else Path(run_dir) / "report.html"
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(render(collect(run_dir), model), encoding="utf-8")
    os.replace(partial, target)
    return target


def render(run: Run, model: str | None = None) -> str:
    """Return the page of a collected run; see ``write_page`` for ``model``."""
    sections = [
        _summary(run),
        _use(run, model),
        _front(run),
        _verified(run),
        _comparison(run),
        _chosen_bits(run),
        _sensitivity(run),
        _measured_on(run),
        section("Words", WORDS),
    ]
    return TEMPLATE.format(
        title=escape(f"KV cache plan for {account.model_name(run)}"),
        css=CSS,
        plotly=get_plotlyjs(),
        sections="\n".join(section for section in sections if section),
    )


def section(title: str, *parts: str) -> str:
    """A section of a page."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def embed(figure: Any, name: str) -> str:
    """A figure as HTML, for a page that holds plotly.js."""
    html = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    return f'<div class="figure">{html}</div>'


def _summary(run: Run) -> str:
    missing = ""
    if run.missing:
        names = ", ".join(run.missing)
        missing = (
            f'<p class="warning">This run is not finished: {escape(names)} not written yet.</p>'
        )
    return missing + tables.render_table(tables.summary(run), "summary")


def _use(run: Run, model: str | None) -> str:
    if run.chosen is None:
        return ""
    return section(
        "Use this plan",
        f"<pre>{escape(account.python_snippet(run))}</pre>",
        f"<pre>{escape(account.command_snippet(run, model))}</pre>",
    )


def _front(run: Run) -> str:
    if not run.points:
        return ""
    return section(
        "Quality against size",
        _paragraph(
            "Lower left is better. Markers are measured on held-out data, with one standard "
            "error; dotted lines are what the search predicted from calibration data. The dashed "
            "line is the budget, the ring the plan it chose."
        ),
        embed(figures.front_figure(run), "front"),
    )


def _verified(run: Run) -> str:
    if not run.points:
        return ""
    parts = []
    if (divergence := tables.verified(run)).rows:
        parts += [_paragraph("Forward KL in nats per token."), tables.render_table(divergence)]
    if (results := tables.task_results(run)).rows:
        text = "Exact match; the difference is from the full-precision cache, in points."
        parts += [_paragraph(text), tables.render_table(results)]
    return section("Verified on held-out data", *parts) if parts else ""


def _comparison(run: Run) -> str:
    parts = []
    if (paired := tables.paired_comparison(run)).rows:
        text = (
            "The chosen plan against every baseline within the budget: its KL minus theirs over "
            "the same documents, with a 95 % interval. Below zero the search did better."
        )
        parts += [_paragraph(text), tables.render_table(paired)]
    if (equal := tables.comparison(run)).rows:
        text = (
            "At every size: each baseline beside the largest searched plan that was measured and "
            "is at most 0.05 bits larger and 0.2 smaller. The last columns are searched KL "
            "divided by the baseline's: below 1 the search did better, above 1 the baseline did."
        )
        parts += [_paragraph(text), tables.render_table(equal)]
    return section("Search against uniform, ladder and random plans", *parts) if parts else ""


def _chosen_bits(run: Run) -> str:
    if run.chosen is None:
        return ""
    return section(
        "Bits per layer of the chosen plan",
        embed(figures.bits_figure(run.chosen), "bits"),
        tables.render_table(tables.layer_bits(run.chosen), "compact"),
    )


def _sensitivity(run: Run) -> str:
    if not run.sensitivity:
        return ""
    return section(
        "Sensitivity of every layer",
        _paragraph(
            "Forward KL on calibration data when one side of one layer is stored at one width "
            "and everything else is exact. K8 is 8-bit keys, V2 is 2-bit values. Colour is "
            "logarithmic and shared by the panels; a grey cell is not above zero."
        ),
        embed(figures.sensitivity_figure(run), "sensitivity"),
        "<details><summary>The same numbers as tables</summary>",
        *(tables.render_table(table, "compact") for table in tables.sensitivities(run)),
        "</details>",
    )


def _measured_on(run: Run) -> str:
    records = account.measured_on(run)
    return section(
        "What was measured on which data",
        tables.render_table(records) if records.rows else "",
        "<details><summary>Settings, checksums and versions</summary>",
        tables.render_table(account.settings(run), "summary"),
        "</details>",
    )
