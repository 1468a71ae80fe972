"""Calibration data by name: one domain from built-in generators, files, datasets or prompts.

``DOMAIN=SOURCE`` names a domain; a source is a path, ``hf:NAME[:CONFIG[:SPLIT]]``, ``task:NAME``,
or nothing for the built-in domains. A ``.jsonl`` line is ``{"text": ...}``, a ``{"prompt": ...}``
that the model itself answers, or ``{"messages": [...]}`` for the chat template. What is held out
is decided by the document: of a source's distinct documents in the order of their hashes, the
first half calibrates and the second is held out.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from kvbits.errors import CalibrationError
from kvbits.evaluation import corpora
from kvbits.evaluation.chat import Turns, answered, as_segments, read_turns
from kvbits.evaluation.corpora import DataSplit, SetSize, task_set, text_set
from kvbits.evaluation.tasks import TASKS
from kvbits.evaluation.texts import dataset_texts, read_texts
from kvbits.evaluation.token_set import TokenSet, padded_set

Counting: TypeAlias = Literal["answers", "all"]
CODE_FILES = 64


class Source(NamedTuple):
    """One domain and where its documents come from; an empty place is a built-in domain."""

    domain: str
    place: str


class Wanted(NamedTuple):
    """What every source needs to know.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        model: Answers prompts; None where there are none.
        split: Which half.
        size: Documents and tokens.
        seed: Of generated tasks.
        answer_tokens: Most tokens of an answer of the model's own.
    """

    tokenizer: Any
    model: Any
    split: DataSplit
    size: SetSize
    seed: int
    answer_tokens: int


def parse_source(text: str) -> Source:
    """Read ``code``, ``chat=prompts.jsonl`` or ``wiki=hf:wikitext:wikitext-2-raw-v1``.

    Raises:
        ValueError: The domain is not built in and has no source, or its source does not exist.
    """
    domain, _, place = text.partition("=")
    source = Source(domain.strip(), place.strip())
    if not source.domain or ("=" in text and not source.place):
        raise ValueError(f"calibration must be DOMAIN or DOMAIN=SOURCE, got {text!r}")
    kind, _, name = source.place.partition(":")
    if not source.place and source.domain not in BUILT_IN:
        raise ValueError(
            f"calibration without a source must be among {', '.join(BUILT_IN)}, got "
            f"{source.domain!r}; give {source.domain}=FILE, =hf:NAME or =task:NAME"
        )
    if kind == "task" and name not in TASKS:
        raise ValueError(f"task must be among {', '.join(sorted(TASKS))}, got {name!r}")
    if source.place and kind not in ("task", "hf") and not Path(source.place).exists():
        raise ValueError(
            f"calibration must name a file, a folder, hf:NAME or task:NAME, got {source.place!r}"
        )
    return source


def source_sets(sources: Sequence[str], wanted: Wanted, count: Counting) -> list[TokenSet]:
    """Return the token set of every source.

    Args:
        sources: As ``parse_source`` reads them; domains must differ.
        wanted: What to make.
        count: ``answers``: of documents with questions only the answers count; ``all``: all.
    """
    parsed = [parse_source(text) for text in sources]
    domains = [source.domain for source in parsed]
    if len(set(domains)) < len(domains):
        raise ValueError(f"calibration must have every domain once, got {', '.join(domains)}")
    sets = [_made(source, wanted) for source in parsed]
    return [counting_all(each) for each in sets] if count == "all" else sets


def counting_all(token_set: TokenSet) -> TokenSet:
    """Return the set with every token counted, up to the last that counts now."""
    positions = torch.arange(token_set.counted.shape[1])
    last = (token_set.counted * positions).amax(1, keepdim=True)
    return token_set._replace(counted=(positions <= last) & (positions > 0))


def _made(source: Source, wanted: Wanted) -> TokenSet:
    kind, _, name = source.place.partition(":")
    if not source.place:
        return BUILT_IN[source.domain](wanted)
    if kind == "task":
        return _task(source.domain, name, wanted)
    if kind == "hf":
        return _texts(source.domain, name, dataset_texts(name), wanted)
    turns = read_turns(source.place)
    if turns:
        return _chat(source.domain, Path(source.place).stem, turns, wanted)
    return _texts(source.domain, Path(source.place).stem, read_texts(source.place), wanted)


def _texts(domain: str, name: str, texts: Sequence[str], wanted: Wanted) -> TokenSet:
    mine = _half(list(texts) if len(set(texts)) > 1 else _cut(texts[0]), wanted.split)
    return text_set(
        wanted.tokenizer,
        mine,
        name=name,
        split=wanted.split,
        domain=domain,
        documents=wanted.size.text_documents,
        max_tokens=wanted.size.text_tokens,
    )


def _chat(domain: str, name: str, turns: Sequence[Turns], wanted: Wanted) -> TokenSet:
    by_text = {json.dumps(each): each for each in turns}
    if len(by_text) < 2:
        raise CalibrationError(
            f"{name} must hold two different conversations, one to calibrate on and one held "
            f"out, got {len(by_text)}"
        )
    mine = [by_text[text] for text in _half(list(by_text), wanted.split)]
    mine = mine[: wanted.size.chat_documents]
    whole = answered(wanted.model, wanted.tokenizer, mine, wanted.answer_tokens)
    documents = [as_segments(wanted.tokenizer, each) for each in whole]
    return padded_set(wanted.tokenizer, name, domain, wanted.split, documents)


def _task(domain: str, name: str, wanted: Wanted) -> TokenSet:
    made = task_set(
        wanted.tokenizer,
        TASKS[name](),
        wanted.size.reasoning_documents,
        seed=wanted.seed,
        split="valid" if wanted.split == "calibration" else "test",
        domain=domain,
    )
    return made._replace(split=wanted.split)


def _half(texts: Sequence[str], split: DataSplit) -> list[str]:
    """The distinct texts that belong to a split, in the order of their hashes."""
    distinct = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    middle = (len(distinct) + 1) // 2
    return distinct[:middle] if split == "calibration" else distinct[middle:]


def _cut(text: str) -> list[str]:
    """A single document in two, at a line or a space near its middle."""
    middle = len(text) // 2
    at = max(text.rfind("\n", 0, middle), text.rfind(" ", 0, middle)) + 1 or middle
    return [text[:at], text[at:]]


def _default(index: int) -> Callable[[Wanted], TokenSet]:
    def make(wanted: Wanted) -> TokenSet:
        sets = corpora.default_sets(
            wanted.tokenizer, wanted.split, size=wanted.size, seed=wanted.seed
        )
        return sets[index]

    return make


def _code(wanted: Wanted) -> TokenSet:
    """Modules of Python's own library: code that is there wherever kvbits is."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(folder.glob("*.py"))[:: max(1, len(list(folder.glob("*.py"))) // CODE_FILES)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in found]
    return _texts("code", "python-library", [text for text in texts if len(text) > 2000], wanted)


def _own_chat(wanted: Wanted) -> TokenSet:
    """General questions, answered by the model itself."""
    text = files("kvbits.evaluation").joinpath("data/prompts.txt").read_text(encoding="utf-8")
    turns = [[{"role": "user", "content": line}] for line in text.splitlines() if line]
    return _chat("chat", "prompts", turns, wanted)


BUILT_IN: Mapping[str, Callable[[Wanted], TokenSet]] = {
    "text": _default(0),
    "reasoning": _default(1),
    "recall": _default(2),
    "code": _code,
    "chat": _own_chat,
}
"""Domains that need no source."""
