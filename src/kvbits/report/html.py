"""The skeleton of a page: sections, figures that stand alone, and nothing that is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs

from kvbits.report.style import CSS

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
<script>{plotly}</script>
</head>
<body>
<main>
<h1>{title}</h1>
{lead}
<nav aria-label="Sections">{links}</nav>
{sections}
</main>
<script>{draw}</script>
</body>
</html>
"""


# Figures are drawn when the whole page has its layout: while it is parsed, the first of several
# panels would still have the width of all.
DRAW = """
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""


class Section(NamedTuple):
    """A part of the page under a heading; ``short`` stands in the list of sections."""

    title: str
    short: str
    html: str


class Key(NamedTuple):
    """One entry of a legend: a glyph in a colour, and what it means."""

    glyph: str
    colour: str
    text: str


def section(title: str, *parts: str, short: str = "") -> Section | None:
    """Return a section of the parts that are not empty, or None where all are."""
    kept = [part for part in parts if part]
    return Section(title, short or title, "\n".join(kept)) if kept else None


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def code(text: str) -> str:
    """A block of code."""
    return f"<pre>{escape(text)}</pre>"


def details(summary: str, *parts: str) -> str:
    """Parts that open on a click; nothing where there are none."""
    inner = "\n".join(part for part in parts if part)
    return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>" if inner else ""


def legend(keys: Iterable[Key]) -> str:
    """One line of glyphs for several panels."""
    items = (
        f'<li><span class="key" style="color:{key.colour}" aria-hidden="true">{key.glyph}</span>'
        f"{escape(key.text)}</li>"
        for key in keys
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(drawn: Any, name: str, *, label: str, min_width: int = 0) -> str:
    """A plotly figure; one that needs more room than a phone has scrolls in its own box.

    Args:
        drawn: the figure.
        name: its id on the page.
        label: what it shows, for readers who do not see it.
        min_width: pixels it needs.
    """
    height = drawn.layout.height
    size = f"height:{height}px;" + (f"min-width:{min_width}px" if min_width else "")
    data = drawn.to_json().replace("</", "<\\/")  # a name must not end the script
    return (
        f'<div class="figure" role="img" aria-label="{escape(label)}">'
        f'<div id="{name}" data-figure style="{size}"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def panels(drawn: Iterable[tuple[str, Any]], name: str, *, label: str, min_width: int = 0) -> str:
    """Figures under a title each: side by side where there is room, else one below the other."""
    parts = [
        f'<div class="panel">{heading(title)}'
        f"{figure(each, f'{name}-{index}', label=f'{label}: {title}', min_width=min_width)}</div>"
        for index, (title, each) in enumerate(drawn)
    ]
    room = f' style="--room: {min_width}px"' if min_width else ""
    return f'<div class="panels"{room}>{"".join(parts)}</div>' if parts else ""


def page(title: str, lead: str, sections: Sequence[Section | None]) -> str:
    """Return the whole page; plotly.js is in it once."""
    present = [each for each in sections if each is not None]
    links = "".join(f'<a href="#{_anchor(s.short)}">{escape(s.short)}</a>' for s in present)
    body = (
        f'<section id="{_anchor(each.short)}">\n<h2>{escape(each.title)}</h2>\n'
        f"{each.html}\n</section>"
        for each in present
    )
    return TEMPLATE.format(
        title=escape(title),
        css=CSS,
        plotly=get_plotlyjs(),
        draw=DRAW,
        lead=lead,
        links=links,
        sections="\n".join(body),
    )


def _anchor(text: str) -> str:
    return "section-" + re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def write(text: str, target: Path) -> Path:
    """Write a page; it replaces an earlier one only once it is complete."""
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target
