"""What the classes say of the methods, as rows and as the table of the README."""

from __future__ import annotations

from typing import Any, get_args

from kvbits.methods import METHODS
from kvbits.methods.base import Method

HEADER = ("method", "source", "bits", "calibration", "what differs from the source")


def facts(method: type[Method]) -> dict[str, Any]:
    """One method: name, source, widths, calibration, differences, settings and their defaults."""
    return {
        "name": method.name,
        "source": method.source,
        "bits": _widths(method),
        "calibration": method.calibration,
        "differs": list(method.differs),
        "settings": {
            name: "..." if field.is_required() else field.default
            for name, field in method.model_fields.items()
        },
    }


def markdown_table() -> str:
    """The table of all methods in Markdown."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for method in METHODS.values():
        row = facts(method)
        differs = "; ".join(row["differs"]) or "nothing known"
        rows.append((row["name"], row["source"], row["bits"], row["calibration"], differs))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _widths(method: type[Method]) -> str:
    """Widths a method can be asked for, or its one width."""
    field = method.model_fields.get("key_bits")
    if method.widths or field is None:
        return method.widths
    return ", ".join(str(width) for width in get_args(field.annotation))
