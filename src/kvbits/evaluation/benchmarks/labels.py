"""Scores of short answers as LongBench counts them: classes, paragraphs, counts, lines of code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvbits.evaluation.benchmarks.overlap import edit_similarity

_DIGITS = re.compile(r"\d+")
_NOT_CODE = ("`", "#", "//")


def class_score(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's does not count.

    >>> class_score("Other location", "Other location", ["Country", "Other location", "location"])
    1.0
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def count_score(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the right one.

    >>> count_score("7 of 8, so 7", "7")
    0.6666666666666666
    """
    found = _DIGITS.findall(answer)
    return found.count(reference) / len(found) if found else 0.0


def paragraph_score(answer: str, reference: str) -> float:
    """The same for the number of a paragraph.

    >>> paragraph_score("Paragraph 12", "Paragraph 12"), paragraph_score("1 or 2", "Paragraph 2")
    (1.0, 0.5)
    """
    return count_score(answer, _DIGITS.findall(reference)[0])


def code_line_score(answer: str, reference: str) -> float:
    """Edit similarity of the first line that is neither fence nor comment."""
    lines = answer.lstrip("\n").split("\n")
    code = [line for line in lines if not any(mark in line for mark in _NOT_CODE)]
    return edit_similarity(code[0] if code else "", reference)
