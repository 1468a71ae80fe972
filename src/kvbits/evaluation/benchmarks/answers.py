"""Reading answers out of text: numbers, boxed formulas, letters of choices, blocks of code."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?|-?\$?\.\d+")
_CODE = re.compile(r"```(?:[\w+-]*)\n(.*?)(?:```|\Z)", re.DOTALL)
_BOXES = ("\\boxed", "\\fbox")


def numbers(text: str) -> list[Decimal]:
    """The numbers of a text in order; ``$1,234.50`` is one.

    >>> numbers("He pays $1,200.50 for 3 of them, -2 each.")
    [Decimal('1200.50'), Decimal('3'), Decimal('-2')]
    """
    found = []
    for match in _NUMBER.finditer(text):
        try:
            found.append(Decimal(match[0].replace(",", "").replace("$", "")))
        except InvalidOperation:  # pragma: no cover - the pattern allows none
            continue
    return found


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` that is closed, braces balanced.

    >>> last_boxed(r"so \boxed{3}, no: $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    starts = sorted(m.end() for box in _BOXES for m in re.finditer(re.escape(box), text))
    for start in reversed(starts):
        inner = _braced(text, start)
        if inner is not None:
            return inner
    return None


def _braced(text: str, start: int) -> str | None:
    while start < len(text) and text[start] == " ":
        start += 1
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position].strip()
    return None


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of code in order; one that is never closed ends with the text.

    >>> code_blocks("Here:\\n```python\\nx = 1\\n```\\nDone.")
    ['x = 1\\n']
    """
    return [match[1] for match in _CODE.finditer(text)]


def after_last(text: str, *marks: str) -> str | None:
    """What follows the last of the first mark that occurs at all."""
    for mark in marks:
        _, found, rest = text.rpartition(mark)
        if found:
            return rest
    return None
