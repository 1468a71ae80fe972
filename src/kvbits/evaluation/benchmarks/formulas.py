r"""When two answers of a mathematics problem are the same: by their spelling, or as numbers.

LaTeX has many spellings of one thing: ``\dfrac12``, ``\frac{1}{2}``, ``1/2``, ``0.5``. They are
made one; what is then a number, or a list of numbers, is compared as such. Formulas that only
algebra shows to be equal (``x(x+1)`` and ``x^2+x``) count as different, for every plan alike.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DROPPED = (
    *("\\left", "\\right", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr", "\\big", "\\Big"),
    *("\\!", "\\,", "\\;", "\\:", "\\ ", "~", "\\displaystyle", "\\limits"),
    *("^\\circ", "^{\\circ}", "\\circ", "\\degree", "°", "\\$", "$", "\\%", "%"),
)
_UNITS = (
    *("degrees", "degree", "square", "cubic", "units", "unit", "centimeters", "meters", "inches"),
    *("feet", "miles", "hours", "minutes", "seconds", "dollars", "cents", "cm", "mph"),
)
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(rf"(?<=\d)\s*(?:{'|'.join(_UNITS)})\b.*$")
_BARE_FRACTION = re.compile(r"\\frac([^\s{\\])([^\s{\\])")
_HALF_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}([^\s{\\])|([^\s{\\])\{([^{}]*)\})")
_BARE_ROOT = re.compile(r"\\sqrt([^\s{\[\\])")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LATEX_FRACTION = re.compile(r"(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}")
_MIXED = re.compile(r"(-?\d+)\\frac\{(\d+)\}\{(\d+)\}")
_PLAIN = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:/-?\d+)?")
_EQUATION = re.compile(r"^[a-zA-Z](?:_\w|\([a-z]\))?\s*(?:=|\\in)\s*(?=.)")
_LETTER = re.compile(r"\([A-Z]\)")  # of a choice
MAX_CHARACTERS = 1000  # longer ones are compared as they stand


def is_same(answer: str, reference: str) -> bool:
    r"""Whether two answers are the same.

    >>> is_same(r"\dfrac12", "0.5"), is_same("x = 5", "5"), is_same("(1, 2)", "(2, 1)")
    (True, True, False)
    """
    if answer.strip() == reference.strip():
        return True
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    a, b = normalized(answer), normalized(reference)
    if not a or not b:
        return False
    return a == b or _is_same_list(a, b)


def normalized(text: str) -> str:
    r"""A formula in the one spelling that is compared.

    >>> normalized(r"$\left( 3, \dfrac{\pi}2 \right)$.")
    '(3,\\frac{\\pi}{2})'
    """
    text = text.strip().rstrip(".").replace("\n", " ")
    text = (
        text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    )
    for piece in _DROPPED:
        text = text.replace(piece, " " if piece in ("~", "\\ ") else "")
    text = _WORDS.sub(r"\1", text.replace("\\{", "{").replace("\\}", "}"))
    text = _UNIT.sub("", text)
    text = _EQUATION.sub("", text.strip())
    text = re.sub(r"\\frac\s+", r"\\frac", text)
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", "", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _LETTER.fullmatch(text):
        text = text[1]
    return text.rstrip(".").lower() if text.isalpha() else text.rstrip(".")


def _is_same_list(a: str, b: str) -> bool:
    """Compare brackets as they are, and what stands between commas one by one."""
    parts, others = _parts(a), _parts(b)
    if len(parts) != len(others):
        return False
    return all(x == y or _is_same_number(x, y) for x, y in zip(parts, others, strict=True))


def _parts(text: str) -> list[str]:
    """Brackets and the pieces that commas part at the outermost level."""
    head, tail = "", ""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}":
        head, text, tail = text[0], text[1:-1], text[-1]
    depth, found = 0, [""]
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [head, *found, tail]


def _is_same_number(a: str, b: str) -> bool:
    x, y = number(a), number(b)
    return x is not None and x == y


def number(text: str) -> Fraction | None:
    r"""The number a normalized formula is; None if it is none.

    >>> number(r"-\frac{3}{4}"), number("0.75"), number("x")
    (Fraction(-3, 4), Fraction(3, 4), None)
    """
    try:
        if mixed := _MIXED.fullmatch(text):
            whole, part = int(mixed[1]), Fraction(int(mixed[2]), int(mixed[3]))
            return whole - part if mixed[1].startswith("-") else whole + part
        if match := _LATEX_FRACTION.fullmatch(text):
            found = Fraction(match[2]) / Fraction(match[3])
            return -found if match[1] else found
        if _PLAIN.fullmatch(text):
            top, _, bottom = text.partition("/")
            return Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):
        return None
    return None
