"""RULER-style tasks at any length: needles, chains of variables, word counts, questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kvbits.evaluation.tasks.ruler.base import RulerTask, share_found
from kvbits.evaluation.tasks.ruler.chains import VariableChains
from kvbits.evaluation.tasks.ruler.needles import Needle
from kvbits.evaluation.tasks.ruler.questions import Questions
from kvbits.evaluation.tasks.ruler.words import CommonWords, FrequentWords

RULER: dict[str, Callable[..., RulerTask]] = {
    "niah_single_1": partial(Needle, name="niah_single_1", haystack="noise"),
    "niah_single_2": partial(Needle, name="niah_single_2"),
    "niah_single_3": partial(Needle, name="niah_single_3", values="uuid"),
    "niah_multikey_1": partial(Needle, name="niah_multikey_1", num_keys=4),
    "niah_multikey_2": partial(Needle, name="niah_multikey_2", haystack="needles"),
    "niah_multikey_3": partial(
        Needle, name="niah_multikey_3", haystack="needles", keys="uuid", values="uuid"
    ),
    "niah_multivalue": partial(Needle, name="niah_multivalue", num_values=4),
    "niah_multiquery": partial(Needle, name="niah_multiquery", num_keys=4, num_queries=4),
    "vt": partial(VariableChains, name="vt"),
    "cwe": partial(CommonWords, name="cwe"),
    "fwe": partial(FrequentWords, name="fwe"),
    "qa_1": partial(Questions, name="qa_1"),
    "qa_2": partial(Questions, name="qa_2", hops=2),
}


def ruler_task(name: str, **settings: Any) -> RulerTask:
    """Make one of RULER's 13 tasks; ``length`` and ``count_tokens`` are settings.

    Raises:
        ValueError: there is no such task.
    """
    if name not in RULER:
        raise ValueError(f"ruler task must be one of {', '.join(RULER)}, got {name!r}")
    return RULER[name](**settings)


__all__ = [
    "RULER",
    "CommonWords",
    "FrequentWords",
    "Needle",
    "Questions",
    "RulerTask",
    "VariableChains",
    "ruler_task",
    "share_found",
]
