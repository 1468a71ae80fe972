"""Scores of decoded text against the answers of an example, 0 to 100, the best answer counting."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from kvbits.replay.slices import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^}]*)\}")


def score(example: Example, text: str) -> float:
    """Score a decoded text by the rule of the example's family."""
    rule = _RULES[example.source_family]
    if example.source_family != "stem_word_problem":
        text = next((line for line in text.splitlines() if line.strip()), "")
    return max(rule(text, answer) for answer in example.answers)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def word_f1(text: str, answer: str) -> float:
    """F1 of the two bags of words."""
    found, wanted = Counter(normalised(text).split()), Counter(normalised(answer).split())
    common = sum((found & wanted).values())
    return 200 * common / (found.total() + wanted.total()) if common else 0.0


def right_numbers(text: str, answer: str) -> float:
    """Share of the whole numbers in the text that are the one of the answer."""
    found = re.findall(r"\d+", text)
    return 100 * found.count(re.findall(r"\d+", answer)[0]) / len(found) if found else 0.0


def contains(text: str, answer: str) -> float:
    """Whether the answer occurs in the text."""
    return 100.0 * (normalised(answer) in normalised(text))


def last_number(text: str, answer: str) -> float:
    """Whether the boxed number, or else the last one, is the answer."""
    boxed = _BOXED.findall(text)
    found = _NUMBER.findall(boxed[-1] if boxed else text)
    return 100.0 * (bool(found) and _value(found[-1]) == _value(answer))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


_RULES: dict[str, Callable[[str, str], float]] = {
    "multi_paragraph_qa": word_f1,
    "paragraph_retrieval": right_numbers,
    "passkey": contains,
    "stem_word_problem": last_number,
}
