"""What every generated task shares: examples, the task protocol, and splits that cannot overlap.

The bundled model is trained on these generators, so "held out" must hold by construction. Each
random part of an example (a key, a value, a tuple of names, of numbers, of operations) is called a
facet. A stable hash of the facet's text decides the one split it may appear in, and a generator
redraws until the hash agrees. No facet of a test example can therefore occur in training, whatever
the seeds and however many examples are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

Split = Literal["train", "valid", "test"]
Templates = Literal["seen", "heldout"]
T = TypeVar("T")

END = "<|endoftext|>"  # separates documents; decoded completions may still carry it
NUM_BUCKETS = 20  # one bucket in 20 is test, one is valid: 5 % of every facet's values each
CHARS_PER_TOKEN = 3.7  # English under a 4096-token byte-level BPE; only an estimate for lengths


@dataclass(frozen=True, kw_only=True)
class Example:
    """One problem with its expected answer.

    Args:
        prompt: the text given to the model.
        answer: the bare answer, as `Task.is_correct` compares it.
        completion: the full expected text after the prompt, chain of thought included.
        task: name of the task that generated it.
        facts: what the generator drew (numbers, names, depth), to analyse and to prove splits
            disjoint.
    """

    prompt: str
    answer: str
    completion: str
    task: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A context followed by one or more questions on it, each with its answer text.

    An `Example` asks the first question only; training asks all of them, so that one long context
    teaches several look-ups.
    """

    context: str
    turns: tuple[tuple[str, str], ...]
    facts: dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """A seeded generator of problems that can tell a right completion from a wrong one."""

    @property
    def name(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def stop(self) -> str: ...
    def generate(self, n: int, *, seed: int, split: Split) -> list[Example]: ...
    def is_correct(self, completion: str, example: Example) -> bool: ...


def split_of(facet: str) -> Split:
    """Return the only split in which ``facet`` may appear."""
    digest = hashlib.blake2b(facet.encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % NUM_BUCKETS
    return "test" if bucket == 0 else "valid" if bucket == 1 else "train"


def draw(make: Callable[[], T], split: Split, facet: Callable[[T], str] = str) -> T:
    """Call ``make`` until the facet of what it returns belongs to ``split``.

    Raises:
        RuntimeError: after 10 000 draws, which means that ``make`` has too few outcomes (the odds
            are below 10^-200 otherwise).
    """
    for _ in range(10_000):
        value = make()
        if split_of(facet(value)) == split:
            return value
    raise RuntimeError(f"no value of split {split!r} in 10000 draws, last was {value!r}")


def example_rng(task: str, split: Split, seed: int, index: int) -> random.Random:
    """Return the random state of one example, whatever the number of examples drawn."""
    return random.Random(f"{task}/{split}/{seed}/{index}")


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens of English text without a tokenizer."""
    return round(len(text) / CHARS_PER_TOKEN)


def check_split(split: str, templates: Templates) -> None:
    """Refuse unknown splits, and training on templates that are held out."""
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split must be one of train, valid, test, got {split!r}")
    if templates not in ("seen", "heldout"):
        raise ValueError(f"templates must be one of seen, heldout, got {templates!r}")
    if split == "train" and templates == "heldout":
        raise ValueError(
            "split must not be 'train' with templates='heldout'; they are held out of training"
        )


@cache
def words() -> tuple[str, ...]:
    """Return the 3000 common English words that keys and values are made of."""
    text = files("kvbits.evaluation").joinpath("data/words.txt").read_text(encoding="utf-8")
    return tuple(text.split())
