"""The table of engines in docs/usage.md."""

from __future__ import annotations

from kvbits.export import ENGINES

HEADER = ("engine", "formats beside 16 bits", "what may differ by layer", "checked against")
REACH = {
    "model": "nothing",
    "model_or_exact": "which layers stay exact",
    "layer": "every layer's format",
}


def markdown_table() -> str:
    """The table of all engines in Markdown."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for engine in ENGINES.values():
        formats = engine.offers or ", ".join(format.name for format in engine.formats)
        rows.append((engine.name, formats, REACH[engine.reach], engine.checked))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
