"""Token sets made of texts and of generated tasks, and the sets kvbits uses by default."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kvbits.errors import CalibrationError
from kvbits.evaluation.tasks import ArithmeticChain, KeyValueRecall, Passkey, Split, Task
from kvbits.evaluation.tasks.base import example_rng
from kvbits.evaluation.tasks.recall import RecallTask
from kvbits.evaluation.texts import bundled_texts, read_texts
from kvbits.evaluation.token_set import (
    Segment,
    TokenSet,
    encode_continuation,
    encode_document,
    merge_sets,
    padded_set,
)

DataSplit = Literal["calibration", "heldout"]

# Calibration draws from the generators' validation split, reporting from their test split.
_TASK_SPLIT: dict[str, Split] = {"calibration": "valid", "heldout": "test"}


class SetSize(NamedTuple):
    """How large the default sets are; about 2000 to 5000 tokens are read per domain.

    Attributes:
        text_documents: windows of text.
        text_tokens: tokens of each window.
        reasoning_documents: arithmetic problems, about 200 tokens each; many, because a few
            tokens of a few problems hold most of the divergence.
        recall_documents: key-value and pass key documents together.
        recall_tokens: approximate tokens of each recall document.
        chat_documents: conversations, of sources that hold some.
    """

    text_documents: int = 4
    text_tokens: int = 512
    reasoning_documents: int = 24
    recall_documents: int = 6
    recall_tokens: int = 512
    chat_documents: int = 16


def text_set(
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    path: str | Path | None = None,
    name: str = "text",
    split: str = "heldout",
    domain: str = "text",
    documents: int | None = None,
    max_tokens: int = 512,
) -> TokenSet:
    """Cut texts into windows of ``max_tokens`` and count every predicted token.

    Each window begins with the BOS token where the tokenizer has one. With ``documents`` given,
    the first windows of all texts are taken before any second window, so that a small set stays
    varied.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts; give either these or ``path``.
        path: a ``.txt`` or ``.jsonl`` file, or a folder of such files (see `read_texts`).
        name: name of the set in tables.
        split: which part of the data this is.
        domain: the domain under which a tuner weighs it.
        documents: number of windows, all if None.
        max_tokens: tokens of a window at most, at least 2.

    Raises:
        CalibrationError: no text has two tokens, or there are fewer windows than ``documents``.
    """
    if (texts is None) == (path is None):
        raise ValueError("texts must be given if and only if path is not, got both or neither")
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    found = read_texts(path) if path is not None else list(texts or ())
    windows = _windows(tokenizer, found, max_tokens)
    if not windows or (documents is not None and len(windows) < documents):
        raise CalibrationError(
            f"text must fill {documents or 1} windows of at most {max_tokens} tokens, got "
            f"{len(windows)} in {path or name}; give more text or ask for fewer documents"
        )
    chosen = [[Segment(ids, True)] for ids in windows[:documents]]
    return padded_set(tokenizer, name, domain, split, chosen)


def task_set(
    tokenizer: Any,
    task: Task,
    n: int,
    *,
    seed: int,
    split: Split,
    domain: str | None = None,
    name: str | None = None,
) -> TokenSet:
    """Generate ``n`` examples of a task and count the tokens of the completions only.

    Prompt and completion are tokenized apart, as in generation, so that the counted tokens are
    the ones a model would have to produce.
    """
    documents = [
        [
            Segment(encode_document(tokenizer, example.prompt), False),
            Segment(encode_continuation(tokenizer, example.completion), True),
        ]
        for example in task.generate(n, seed=seed, split=split)
    ]
    return padded_set(tokenizer, name or task.name, domain or task.name, split, documents)


def recall_set(
    tokenizer: Any,
    task: RecallTask,
    n: int,
    *,
    seed: int,
    split: Split,
    questions: int = 1,
) -> TokenSet:
    """Generate ``n`` contexts of a recall task with several questions each; the answers count.

    One reading of a context then gives many counted tokens. A task may have fewer questions.

    Args:
        tokenizer: a Hugging Face tokenizer.
        task: the task.
        n: number of contexts.
        seed: seed of the generator.
        split: split of the generator.
        questions: questions asked on each context, at most.
    """
    documents = []
    for index in range(n):
        drawn = task.document(example_rng(task.name, split, seed, index), split, questions)
        segments, lead = [], drawn.context
        for number, (question, answer) in enumerate(drawn.turns):
            encode = encode_continuation if number else encode_document
            segments.append(Segment(encode(tokenizer, lead + question), False))
            segments.append(Segment(encode_continuation(tokenizer, answer), True))
            lead = "\n"
        documents.append(segments)
    return padded_set(tokenizer, task.name, "recall", split, documents)


def default_sets(
    tokenizer: Any,
    split: DataSplit = "calibration",
    *,
    size: SetSize | None = None,
    seed: int = 0,
    text: str | Path | Iterable[str] | None = None,
) -> list[TokenSet]:
    """Return the sets of the three domains ``text``, ``reasoning`` and ``recall``.

    Text is the bundled sample of kvbits-tiny; the tasks are generated. Calibration and held-out
    sets share no document, and no name, number, key or value of a task.

    Args:
        tokenizer: a Hugging Face tokenizer.
        split: ``calibration`` for choosing a plan, ``heldout`` for reporting on one.
        size: documents and tokens of each domain.
        seed: seed of the generated tasks.
        text: a path, or texts, to use for the text domain in place of the bundled sample.
    """
    if split not in _TASK_SPLIT:
        raise ValueError(f"split must be one of calibration, heldout, got {split!r}")
    size = size or SetSize()
    if text is None:
        name, texts, path = f"selfsample_{split}", bundled_texts(split), None
    elif isinstance(text, (str, Path)):
        name, texts, path = Path(text).stem, None, text
    else:
        name, texts, path = "text", list(text), None
    return [
        text_set(
            tokenizer,
            texts,
            path=path,
            name=name,
            split=split,
            documents=size.text_documents,
            max_tokens=size.text_tokens,
        ),
        _reasoning_set(tokenizer, split, size, seed),
        _recall_set(tokenizer, split, size, seed),
    ]


def _reasoning_set(tokenizer: Any, split: str, size: SetSize, seed: int) -> TokenSet:
    made = task_set(
        tokenizer,
        ArithmeticChain(),
        size.reasoning_documents,
        seed=seed,
        split=_TASK_SPLIT[split],
        domain="reasoning",
    )
    return made._replace(split=split)


def _recall_set(tokenizer: Any, split: str, size: SetSize, seed: int) -> TokenSet:
    def count(text: str) -> int:
        return len(encode_continuation(tokenizer, text))

    tasks: list[RecallTask] = [
        KeyValueRecall(
            num_pairs=max(2, size.recall_tokens // 18)
        ),  # leaves room for the questions
        Passkey(length=max(64, size.recall_tokens), count_tokens=count),
    ]
    half = size.recall_documents // 2
    sets = [
        recall_set(tokenizer, task, n, seed=seed, split=_TASK_SPLIT[split], questions=8)
        for task, n in zip(tasks, (size.recall_documents - half, half), strict=True)
        if n
    ]
    return merge_sets(sets, name="key_value+passkey", domain="recall")._replace(split=split)


def _windows(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Cut every text into windows; first windows first."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = max_tokens - len(bos)
    ranked = []
    for index, text in enumerate(texts):
        ids = encode_continuation(tokenizer, text)
        ids = ids[len(bos) :] if bos and ids[:1] == bos else ids
        for rank, start in enumerate(range(0, len(ids), step)):
            ranked.append((rank, index, bos + ids[start : start + step]))
    ranked.sort(key=lambda item: item[:2])
    return [ids for _, _, ids in ranked if len(ids) >= 2]


__all__ = [
    "DataSplit",
    "SetSize",
    "TokenSet",
    "default_sets",
    "encode_continuation",
    "encode_document",
    "merge_sets",
    "recall_set",
    "task_set",
    "text_set",
]
