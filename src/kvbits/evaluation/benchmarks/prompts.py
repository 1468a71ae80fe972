"""Prompts as tokens: examples as text or turns, chat template, cutting in the middle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvbits.evaluation.benchmarks.base import Generate, Prompt, Rank, Read, Request
from kvbits.evaluation.token_set import Segment, encode_continuation, encode_document


@dataclass(frozen=True, kw_only=True)
class Prompter:
    """Turns requests into token ids.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: Wrap prompts in the tokenizer's chat template.
        chat_settings: What to tell the template, such as ``enable_thinking``.
        multi_turn: Few-shot examples as turns of the chat instead of text in one turn.
        context_length: Tokens that prompt and answer may have together.
        max_length: Tokens of a prompt at most, if fewer than that leaves.

    Raises:
        ValueError: If there is no template, or turns are asked for without it.
    """

    tokenizer: Any = field(repr=False)
    chat_template: bool = False
    chat_settings: Mapping[str, Any] = field(default_factory=dict)
    multi_turn: bool = False
    context_length: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for flag, value in (("multi-turn", self.multi_turn), ("chat-set", self.chat_settings)):
            if value and not self.chat_template:
                raise ValueError(f"--{flag} must be given with --chat-template, got it alone")
        if self.chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                "--chat-template must be given for a tokenizer that has one, got one without; "
                "leave it out for base models"
            )

    def text(self, prompt: Prompt) -> str:
        """Everything before the answer, as text."""
        if not self.chat_template or prompt.is_plain:
            system = prompt.system + prompt.separator if prompt.system else ""
            return system + _one_text(prompt) + prompt.lead
        rendered: str = self.tokenizer.apply_chat_template(
            self._messages(prompt),
            tokenize=False,
            add_generation_prompt=True,
            **self.chat_settings,
        )
        return rendered + prompt.lead.lstrip()

    def ids(self, prompt: Prompt, reserve: int) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: The prompt.
            reserve: Tokens to leave for the answer.

        Raises:
            ValueError: If it is too long and may not be cut.
        """
        ids = self._encode(prompt, self.text(prompt))
        room = self._room(reserve)
        if room is None or len(ids) <= room:
            return ids
        if not prompt.may_cut:
            raise ValueError(
                f"a prompt must have at most {room} tokens to leave {reserve} for the answer, got "
                f"{len(ids)}; use fewer --shots, shorter answers or a model with a longer context"
            )
        return self._cut(prompt, room, len(ids))

    def documents(self, request: Rank | Read) -> list[list[Segment]]:
        """Documents whose counted tokens are the answers of a request."""
        if isinstance(request, Read):
            self._check_context(size_of(request))
            return [list(request.segments)]
        text = self.text(request.prompt)
        longest = max(len(encode_continuation(self.tokenizer, each)) for each in request.answers)
        before = self.ids(request.prompt, longest)
        is_whole = before == self._encode(request.prompt, text)
        return [
            [Segment(before, False), Segment(ids, True)]
            for ids in (
                self._answer(request.prompt, text, before, each, is_whole)
                for each in request.answers
            )
        ]

    def _check_context(self, num_tokens: int) -> None:
        if self.context_length is not None and num_tokens > self.context_length:
            raise ValueError(
                f"a window must have at most {self.context_length} tokens, the model's context, "
                f"got {num_tokens}; pass a smaller one, such as --set window={self.context_length}"
            )

    def count_tokens(self, text: str) -> int:
        """Tokens of an answer."""
        return len(encode_continuation(self.tokenizer, text))

    def prompt_hash(self, request: Request) -> str:
        """SHA-256 of what is asked."""
        if isinstance(request, Read):
            parts = [f"{segment.ids}{segment.is_counted}" for segment in request.segments]
        elif isinstance(request, Rank):
            parts = [self.text(request.prompt), *request.answers]
        else:
            parts = [self.text(request.prompt)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        if not self.multi_turn:
            return [*messages, {"role": "user", "content": _one_text(prompt)}]
        for question, answer in prompt.shots:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer.strip()})
        return [*messages, {"role": "user", "content": prompt.question}]

    def _encode(self, prompt: Prompt, text: str) -> list[int]:
        if self.chat_template and not prompt.is_plain:  # a template brings its special tokens
            return encode_continuation(self.tokenizer, text)
        ids = encode_document(self.tokenizer, text)
        return ids or [self.tokenizer.eos_token_id]  # something has to predict the first token

    def _answer(
        self, prompt: Prompt, text: str, before: list[int], answer: str, is_whole: bool
    ) -> list[int]:
        """Tokens of an answer as they follow the prompt; apart from it, they may be others."""
        if self.chat_template and not prompt.is_plain:
            answer = answer.lstrip()
        together = self._encode(prompt, text + answer)
        if is_whole and text and len(together) > len(before):
            return together[len(before) :]
        return encode_continuation(self.tokenizer, answer)

    def _room(self, reserve: int) -> int | None:
        limits = [self.max_length] if self.max_length is not None else []
        if self.context_length is not None:
            limits.append(self.context_length - reserve)
        return max(0, min(limits)) if limits else None

    def _cut(self, prompt: Prompt, room: int, length: int) -> list[int]:
        """Leave out the middle of the question until everything fits."""
        ids = encode_continuation(self.tokenizer, prompt.question)
        keep = len(ids) - (length - room)
        while keep >= 2:
            halves = ids[: keep // 2], ids[len(ids) - keep // 2 :]
            text = "".join(
                self.tokenizer.decode(half, skip_special_tokens=True) for half in halves
            )
            found = self._encode(prompt, self.text(prompt._replace(question=text)))
            if len(found) <= room:
                return found
            keep -= len(found) - room
        raise ValueError(f"prompts must have room for their question, got {room} tokens in all")


def _one_text(prompt: Prompt) -> str:
    shots = "".join(f"{question}{answer}{prompt.separator}" for question, answer in prompt.shots)
    return shots + prompt.question


def size_of(request: Request) -> int:
    """How long a request is, to sort by: characters of text, or tokens."""
    if isinstance(request, Read):
        return sum(len(segment.ids) for segment in request.segments)
    prompt = request.prompt
    return len(prompt.question) + sum(len(q) + len(a) for q, a in prompt.shots)


def kind_of(request: Request) -> tuple[int, tuple[str, ...]]:
    """What the requests of one batch share: how answers end; -1 where nothing is generated."""
    if isinstance(request, Generate):
        return request.max_new_tokens, request.stop
    return -1, ()
