"""Colours and the common look of the figures, on light and on dark paper.

A figure has no background and its text no colour of its own that lasts: the page's style sheet
colours text, grid and lines of the SVG, so that a page follows the reader's scheme as it changes.
Colours of data are told apart by readers with any colour vision (after Okabe and Ito) and have a
contrast of at least 3 with either paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BLUE, ORANGE, GREEN, VERMILION = "#1A7FC1", "#C07C00", "#0A9470", "#D55E00"
PURPLE, VIOLET, GREY = "#B5629A", "#8568D0", "#7D838D"
INK, RULE = "#1f2430", "#d9dde3"
RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, VIOLET, GREY)
CLEAR = "rgba(0,0,0,0)"
SHORT_RANGE = 30


def finish(figure: Any, height: int, top: int = 16) -> Any:
    """Give a figure the plain look; it scrolls with the page and does not zoom under a thumb."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 62, "r": 16, "t": top, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        hoverlabel={
            "bgcolor": "#ffffff",
            "bordercolor": GREY,
            "font": {"color": INK},
            "align": "left",
        },
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        dragmode=False,
        hovermode="closest",
        showlegend=False,
    )
    axis = {"gridcolor": RULE, "zeroline": False, "title_standoff": 8, "fixedrange": True}
    axis |= {"title_font_size": 13, "ticks": ""}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, automargin=True)
    return figure


def log_axis(title: str, values: Iterable[float] = ()) -> dict[str, Any]:
    """A logarithmic axis with a tick at every power of ten, and at 2 and 5 for a short range."""
    shown = [value for value in values if value > 0]
    is_short = bool(shown) and max(shown) < SHORT_RANGE * min(shown)
    return {
        "title_text": title,
        "type": "log",
        "dtick": "D2" if is_short else 1,
        "exponentformat": "power",
        "minor_showgrid": False,
        "tickfont": {"size": 11.5},
    }
