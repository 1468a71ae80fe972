"""Conversations: read from files, answered by the model itself, and cut into what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig

from kvbits.calibration.placement import input_device
from kvbits.errors import CalibrationError
from kvbits.evaluation.token_set import Segment, encode_continuation, encode_document

Turns: TypeAlias = list[dict[str, str]]
"""Messages ``{"role": ..., "content": ...}``; roles are system, user and assistant."""

BATCH = 8


def read_turns(path: str | Path) -> list[Turns]:
    """Read the conversations of a ``.jsonl`` file; none if its first line is of another kind.

    A line is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"prompt": ...}``, to
    which an ``"answer"`` may be given.

    Raises:
        CalibrationError: A later line is of another kind than the first.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        return []
    found: list[Turns] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        turns = _turns(line)
        if turns is None:
            if not found:
                return []
            raise CalibrationError(
                f'{path}:{number} must be an object with "messages" or "prompt" as the lines '
                f"before, got {line[:60]!r}"
            )
        found.append(turns)
    return found


def _turns(line: str) -> Turns | None:
    try:
        item = json.loads(line)
    except ValueError:
        return None
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("prompt"), str):
        said = [{"role": "user", "content": item["prompt"]}]
        if isinstance(item.get("answer"), str):
            said.append({"role": "assistant", "content": item["answer"]})
        return said
    messages = item.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    kept = [
        {"role": message["role"], "content": message["content"]}
        for message in messages
        if isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    ]
    return kept if len(kept) == len(messages) else None


def answered(
    model: Any, tokenizer: Any, conversations: Sequence[Turns], max_tokens: int
) -> list[Turns]:
    """Let the model answer, greedily and at full precision, those that end with a question.

    Raises:
        CalibrationError: There is no model to answer.
    """
    open_ends = [i for i, turns in enumerate(conversations) if turns[-1]["role"] != "assistant"]
    if open_ends and model is None:
        raise CalibrationError(
            "conversations must end with an answer where no model is given to answer, got "
            f"{len(open_ends)} that do not"
        )
    whole = [list(turns) for turns in conversations]
    for start in range(0, len(open_ends), BATCH):
        rows = open_ends[start : start + BATCH]
        prompts = [_ids(tokenizer, whole[row], is_open=True) for row in rows]
        for row, answer in zip(
            rows, _generate(model, tokenizer, prompts, max_tokens), strict=True
        ):
            whole[row].append({"role": "assistant", "content": answer})
    return whole


def as_segments(tokenizer: Any, turns: Turns) -> list[Segment]:
    """Tokenize a conversation; only the answers of the assistant count.

    Some templates tell earlier turns differently once later ones follow; then only the later
    answers count.
    """
    segments: list[Segment] = []
    ids: list[int] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _ids(tokenizer, turns[:index], is_open=True)
        if prompt[: len(ids)] != ids:
            segments, ids = [], []
        answer = encode_continuation(tokenizer, turn["content"])
        segments += [Segment(prompt[len(ids) :], False), Segment(answer, True)]
        ids = prompt + answer
    return [segment for segment in segments if segment.ids]


def _ids(tokenizer: Any, turns: Turns, *, is_open: bool) -> list[int]:
    """Tokens of a conversation up to where the assistant answers.

    By the chat template of the tokenizer; without one, the contents with blank lines between.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(turn["content"] for turn in turns)
    return encode_document(tokenizer, text + "\n\n" * is_open)


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[str]:
    """Answer left-padded prompts; an empty answer becomes a full stop, so that a token counts."""
    width, padding = max(map(len, prompts)), tokenizer.pad_token_id or 0
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = input_device(model)
    with torch.no_grad(), _greedy(model):
        output = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=padding,
        )
    texts = tokenizer.batch_decode(output[:, width:].cpu(), skip_special_tokens=True)
    return [text.strip() or "." for text in texts]


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Set the model's generation config aside, but for the tokens that end an answer."""
    former = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=former.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = former
