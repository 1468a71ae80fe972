"""One self-contained HTML page about a run.

plotly.js is embedded once, nothing is fetched, and every figure has its numbers in a table beside
it, so that the page can be read without JavaScript. This file holds text only: numbers come from
``collect`` and ``compare``, their wording from ``tables``, ``verdict`` and ``account``.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from kvbits.report import (
    account,
    curves,
    figures,
    heatmaps,
    html,
    numbers,
    stage_tables,
    tables,
    verdict,
)
from kvbits.report.collect import Run, collect
from kvbits.report.compare import pair_grid
from kvbits.report.html import Section, details, paragraph, section
from kvbits.report.tables import Table, render_table

WORDS = """<dl>
<dt>effective bits</dt><dd>Stored bits divided by stored values, scales and offsets included, in
the limit of a long context. A plan's name gives nominal code widths; this is what memory
pays.</dd>
<dt>forward KL</dt><dd>KL(full precision ‖ packed) of the next-token distribution, in nats per
counted token, teacher-forced through the packed cache in the order decoding would fill it.</dd>
<dt>loss, nats per token</dt><dd>Mean negative log-likelihood of the true tokens with the packed
cache minus that at full precision, over the same tokens.</dd>
<dt>±</dt><dd>One standard error, clustered by document, and paired wherever two caches are
compared.</dd>
<dt>difference</dt><dd>Packed minus full precision on the same problems, in percentage points, with
its 95 % interval.</dd>
<dt>predicted</dt><dd>The sum of the sensitivities of every layer and side on calibration data; it
is not a measurement of the plan.</dd>
<dt>loss of a trial</dt><dd>What the search minimises: KLs on calibration data, each divided by
that of the best uniform plan of the budget's size, joined as the objective says.</dd>
<dt>e_o</dt><dd>Relative error of a layer's attention output when it alone is stored so.</dd>
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
    return html.write(render(collect(run_dir), model), target)


def render(run: Run, model: str | None = None) -> str:
    """Return the page of a collected run; see ``write_page`` for ``model``."""
    return html.page(
        f"KV cache plan for {account.model_name(run)}",
        _lead(run),
        [
            section("The chosen plan", render_table(tables.summary(run), "summary")),
            _use(run, model),
            _front(run),
            _full_precision(run),
            _rivals(run),
            _chosen_bits(run),
            _memory(run),
            _positions(run),
            _domains(run),
            _sensitivity(run),
            _pruned(run),
            _search(run),
            _verified(run),
            _provenance(run),
            section("Words", WORDS),
        ],
    )


def _lead(run: Run) -> str:
    missing = ""
    if run.missing:
        text = f"This run is not finished: {', '.join(run.missing)} not written yet."
        missing = paragraph(text, "warning")
    said = "".join(paragraph(text) for text in verdict.sentences(run))
    return missing + (f'<div class="lead">{said}</div>' if said else "")


def _table(table: Table, style: str = "") -> str:
    return render_table(table, style) if table.rows else ""


def _use(run: Run, model: str | None) -> Section | None:
    if run.chosen is None:
        return None
    python, command = account.python_snippet(run), account.command_snippet(run, model)
    return section("Use this plan", html.code(python), html.code(command), short="Use it")


def _front(run: Run) -> Section | None:
    if not run.points or not run.domains:
        return None
    return section(
        "Quality against size",
        paragraph(
            "Lower left is better. Markers are measured on held-out data, with one standard "
            "error; dotted lines are what calibration data made the search expect. Hover for a "
            "plan's layers and results."
        ),
        html.legend(figures.front_keys(run)),
        html.panels(
            figures.front_figures(run), "front", label="KL against effective bits of every plan"
        ),
        short="Front",
    )


def _full_precision(run: Run) -> Section | None:
    text = (
        "The chosen plan on held-out data that took no part in the search, paired token by token "
        "with the full-precision cache. KL is what the search minimised; loss is what it costs "
        "on the true tokens, and may come out on either side of zero."
    )
    table = _table(verdict.against_full(run))
    return section(
        "Worse than full precision by", paragraph(text) if table else "", table, short="Cost"
    )


def _rivals(run: Run) -> Section | None:
    parts = []
    if rivals := _table(tables.against_rivals(run)):
        text = (
            "The chosen plan's KL minus that of every rival: rules within the budget, and plans "
            "given to compare with. Same documents, ± is the paired standard error; below zero "
            "the search did better, and more than two errors from zero it surely did."
        )
        parts += [html.heading("The chosen plan"), paragraph(text), rivals]
    if equal := _table(tables.comparison(run)):
        text = (
            "Each rival beside the largest searched plan that was measured and is at most 0.05 "
            "bits larger and 0.2 smaller; the chosen plan is marked. The last columns are "
            "searched KL divided by the rival's, with the paired standard error: below 1 the "
            "search did better, above 1 the rival did."
        )
        parts += [html.heading("At equal effective bits"), paragraph(text), equal]
    if neighbours := _table(tables.against_neighbours(run)):
        text = "The chosen plan's KL minus that of other searched plans, paired as above."
        parts += [html.heading("Neighbours on the front"), paragraph(text), neighbours]
    return section("Against uniform, ladder, random and given plans", *parts, short="Rivals")


def _chosen_bits(run: Run) -> Section | None:
    if run.chosen is None:
        return None
    return section(
        "Bits per layer of the chosen plan",
        html.legend(figures.SIDE_KEYS),
        html.figure(
            figures.bits_figure(run.chosen),
            "bits",
            label="Bits of keys and values by layer",
            min_width=figures.bits_width(len(run.chosen.pairs)),
        ),
        details("The same numbers as a table", _table(tables.layer_bits(run.chosen), "compact")),
        short="Bits",
    )


def _memory(run: Run) -> Section | None:
    if not run.memory:
        return None
    batch = run.bought.get("batch", 1)
    rows = "" if batch == 1 else f" of {numbers.count(batch)} rows"
    return section(
        "Memory against context",
        paragraph(
            f"Bytes of the whole cache{rows}, exact tokens, pages and tables included, as the "
            "live cache reports them."
        ),
        html.legend(figures.MEMORY_KEYS),
        html.figure(figures.memory_figure(run), "memory", label="Bytes against tokens"),
        details("The same numbers as a table", _table(stage_tables.memory(run))),
        short="Memory",
    )


def _positions(run: Run) -> Section | None:
    drawn = curves.position_figures(run)
    if not drawn:
        return None
    return section(
        "KL by position",
        paragraph(
            "Forward KL of held-out predictions by the number of tokens in front of them. It is "
            "zero, and not drawn, where all of those are still exact."
        ),
        html.legend(curves.plan_keys(run)),
        html.panels(drawn, "positions", label="KL against position"),
        details("The chosen plan's numbers as a table", _table(stage_tables.positions(run))),
        short="Positions",
    )


def _domains(run: Run) -> Section | None:
    if run.chosen is None or not run.chosen.predicted_kl:
        return None
    keys = [
        *curves.plan_keys(run),
        html.Key("○", curves.CHOSEN.colour, "chosen plan on calibration data"),
        html.Key("–", curves.CHOSEN.colour, "chosen plan as predicted"),
    ]
    return section(
        "KL by domain",
        paragraph(
            "The search keeps calibration domains apart. Filled markers are held-out data of the "
            "same domains."
        ),
        html.legend(keys),
        html.figure(curves.domains_figure(run), "domains", label="KL of every domain"),
        _table(stage_tables.domains(run)),
        short="Domains",
    )


def _sensitivity(run: Run) -> Section | None:
    if not run.sensitivity:
        return None
    columns = {row.label for row in run.sensitivity}
    return section(
        "Sensitivity of every layer",
        paragraph(
            "Forward KL on calibration data when one side of one layer is stored at one width "
            "and everything else is exact. K8 is 8-bit keys, V2 is 2-bit values. Colour is "
            "logarithmic and shared by the panels; an empty cell is not above zero."
        ),
        html.panels(
            heatmaps.sensitivity_figures(run),
            "sensitivity",
            label="KL by layer and side",
            min_width=heatmaps.heat_width(columns),
        ),
        details(
            "The same numbers as tables",
            *(_table(table, "compact") for table in tables.sensitivities(run)),
        ),
        short="Sensitivity",
    )


def _pruned(run: Run) -> Section | None:
    figure, grid = heatmaps.pairs_figure(run), pair_grid(run)
    if figure is None or grid is None:
        return None
    return section(
        "Pairs of every layer, pruned and clustered",
        paragraph(
            "Relative error of a layer's attention output under every pair of widths. Grey pairs "
            "are pruned: another one is at most as large and as wrong. Layers of one letter keep "
            "the same pairs, err alike, and are decided together by strategies that measure every "
            "trial; exact ones use every pair of every layer."
        ),
        html.figure(
            figure,
            "pairs",
            label="Output error by layer and pair",
            min_width=heatmaps.heat_width(grid.columns),
        ),
        details("Groups and what they keep", _table(stage_tables.groups(run), "text")),
        details("The same numbers as a table", _table(stage_tables.pair_errors(run), "compact")),
        short="Pairs",
    )


def _search(run: Run) -> Section | None:
    if not run.trials:
        return None
    return section(
        "Search progress",
        paragraph(
            "Plans the search measured on calibration data, in order. A loss of 1 is that of the "
            "best uniform plan of the budget's size; the exact strategies solve first and measure "
            "few."
        ),
        html.legend(curves.SEARCH_KEYS),
        html.panels(curves.search_figures(run), "search", label="Search progress"),
        details("The trials as a table", _table(stage_tables.trials(run), "compact")),
        short="Search",
    )


def _verified(run: Run) -> Section | None:
    parts = []
    if divergence := _table(tables.verified(run)):
        parts += [paragraph("Forward KL in nats per token."), divergence]
    if results := _table(tables.task_results(run)):
        text = "Exact match; the difference is from the full-precision cache, in points."
        parts += [paragraph(text), results]
    return section("Every plan on held-out data", *parts, short="All plans")


def _provenance(run: Run) -> Section | None:
    command = account.command(run)
    made = ""
    if command:
        made = paragraph("Made by") + f'<pre class="wrap">{escape(command)}</pre>'
    splits = account.splits(run)
    separate = ""
    if splits.rows:
        separate = paragraph(account.separation(run)) + render_table(splits, "text")
    return section(
        "Provenance",
        made,
        _table(account.checksums(run), "summary"),
        separate,
        details("What was measured on which data", _table(account.measured_on(run))),
        details("Settings, checksums and versions", _table(account.settings(run), "summary")),
    )
