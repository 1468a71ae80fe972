"""Decode loops: one token at a time, plain or captured in a CUDA graph.

A captured step reads nothing from the host: the cache's lengths, the token, its position and what
is finished lie on the device, so one graph serves all steps. Tokens reach the host a step late, so
that it never waits for the device. ``model.generate`` works with the same caches: for beam search,
assistants and logits processors, which this loop does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbits.attention.hf import enable
from kvbits.attention.triton.support import unsupported_heads
from kvbits.cache.hf import QuantizedCache
from kvbits.errors import UnsupportedModelError
from kvbits.geometry import ModelGeometry

OnTokens = Callable[[list[int]], None]
LEAST_HORIZON = 1024
EAGER_STEPS = 2  # before a capture: kernels compile, libraries start, page tables are built


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: Keep this many likeliest tokens.
        top_p: Keep the likeliest tokens that make up this share.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raise ``ValueError`` if a setting is out of range."""
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


class Generation(NamedTuple):
    """What a loop made.

    Attributes:
        tokens: ``[B, N]`` new tokens; behind a row's stop token the padding id.
        prefill_seconds: From the prompt to the first token.
        decode_seconds: Of ``num_steps`` steps; of a captured loop, of its replays alone.
        num_steps: Decode steps in ``decode_seconds``.
        is_captured: Whether steps were replays of a CUDA graph.
    """

    tokens: Tensor
    prefill_seconds: float
    decode_seconds: float
    num_steps: int
    is_captured: bool


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    prefill_chunk: int | None = None,
    capture: bool | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continue a batch of prompts through a cache.

    Args:
        model: A causal language model of transformers.
        input_ids: ``[B, T]``, padded on the left if at all.
        cache: From ``plan.new_cache(model, max_tokens=...)`` for a captured loop; any cache of
            transformers for a plain one. It may hold tokens already.
        max_new_tokens: Tokens to make at most.
        attention_mask: ``[B, T]``, 0 for padding; tokens the cache holds included.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end a row.
        pad_id: What follows a row's end.
        prefill_chunk: Tokens of a forward of the prompt; all at once if None.
        capture: Whether to capture steps in a CUDA graph. None: where the cache allows it.
        on_tokens: Called with the new token of every row, step by step.

    Raises:
        ValueError: If an argument is out of range, or the cache has no room.
        CalibrationError: If states were not finite.
        UnsupportedModelError: If ``capture=True`` and the steps cannot be captured.
    """
    _check(input_ids, cache, max_new_tokens, sampling)
    is_packed = isinstance(cache, QuantizedCache)
    # Streams, events and graphs are the current device's, which need not be the model's.
    here = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    with enable(model) if is_packed else nullcontext(), here:
        loop = _Loop(model, cache, sampling, stop_ids, pad_id, capture)
        started = now(model)
        loop.prefill(input_ids, attention_mask, prefill_chunk, max_new_tokens)
        prefilled = now(model)
        made = loop.run(max_new_tokens, on_tokens)
        return made._replace(prefill_seconds=prefilled - started)


class _Loop:
    """State of one generation, all of it on the device."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        sampling: Sampling,
        stop_ids: Sequence[int],
        pad_id: int,
        capture: bool | None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampling = sampling
        self.pad_id = pad_id
        # Packed layers remember the padding of the prompt; layers of transformers' own do not.
        self._knows_padding = isinstance(cache, QuantizedCache) and cache.is_packed
        self.stop_ids = torch.tensor(list(stop_ids), device=model.device)
        self._stops = set(stop_ids)
        self._ended: set[int] = set()  # rows that have stopped, as far as the host knows
        self._graph: torch.cuda.CUDAGraph | None = None
        self._horizon = 0
        self._must_capture = bool(capture)
        self._is_plain = capture is False or not self._may_capture()
        self._num_steps = 0
        self._setup_seconds = 0.0
        self._setup_steps = 0

    def prefill(
        self, input_ids: Tensor, mask: Tensor | None, chunk: int | None, max_new_tokens: int
    ) -> None:
        """Run the prompt and draw the first token."""
        batch, num_tokens = input_ids.shape
        mask = None if mask is None else mask.to(self.model.device)
        seen = self.cache.get_seq_length()
        for start in range(0, num_tokens, chunk or num_tokens):
            part = input_ids[:, start : start + (chunk or num_tokens)].to(self.model.device)
            known = None if mask is None else mask[:, : seen + start + part.shape[1]]
            arguments: dict[str, Any] = {} if known is None else _padded(known, part.shape[1])
            logits = self.model(
                part, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **arguments
            ).logits
        length = torch.full((batch, 1), seen + num_tokens, device=self.model.device)
        if mask is not None:
            length = mask.sum(-1, keepdim=True).to(length)
        self.position = length
        self.is_done = torch.zeros(batch, dtype=torch.bool, device=self.model.device)
        self.history = torch.full((batch, max_new_tokens), self.pad_id, device=self.model.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        self.mask = mask
        self.token = torch.full((batch, 1), self.pad_id, device=self.model.device)
        self._draw(logits[:, -1])

    def _draw(self, logits: Tensor) -> None:
        """Draw the next token of every row and write it where the next step finds it."""
        drawn = draw(logits, self.sampling)
        drawn = torch.where(self.is_done, self.pad_id, drawn)
        if len(self.stop_ids):
            self.is_done |= (drawn[:, None] == self.stop_ids).any(-1)
        self.token.copy_(drawn[:, None])
        self.history.index_copy_(1, self.index, drawn[:, None])
        self.index.add_(1)

    def step(self) -> None:
        """One forward of one token a row."""
        arguments: dict[str, Any] = {}
        if self.mask is not None and not self._knows_padding:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            arguments["attention_mask"] = self.mask
        logits = self.model(
            self.token,
            past_key_values=self.cache,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        ).logits
        self.position.add_(1)
        self._draw(logits[:, -1])

    def run(
        self,
        max_new_tokens: int,
        on_tokens: OnTokens | None,
    ) -> Generation:
        """Decode until every row has stopped or is full."""
        mailbox = _Mailbox(self.token) if on_tokens or self._stops else None
        if mailbox:
            mailbox.post()
        started = now(self.model)
        while self._num_steps < max_new_tokens - 1:
            self._advance()
            self._num_steps += 1
            if mailbox and self._received(mailbox, on_tokens):
                break
        else:
            if mailbox:
                self._received(mailbox, on_tokens)
        seconds = now(self.model) - started - self._setup_seconds
        tokens = self.history[:, : self._num_wanted(self._num_steps + 1)]
        num_steps = self._num_steps - self._setup_steps
        if isinstance(self.cache, QuantizedCache):
            self.cache.check_finite()
        return Generation(tokens, 0.0, seconds, num_steps, self._graph is not None)

    def _received(self, mailbox: _Mailbox, on_tokens: OnTokens | None) -> bool:
        """Take the tokens of the step before, send the present ones; whether all rows stopped."""
        tokens = mailbox.take()
        mailbox.post()
        if on_tokens:
            on_tokens(tokens)
        return bool(self._stops) and self._all_stopped(tokens)

    def _num_wanted(self, num_made: int) -> int:
        """Tokens up to the last row's stop: the host notices it a step late."""
        if not self._stops or len(self._ended) < len(self.history):
            return num_made
        is_stop = torch.isin(self.history, self.stop_ids)
        return int(is_stop.int().argmax(-1).max()) + 1

    def _all_stopped(self, tokens: Sequence[int]) -> bool:
        self._ended |= {row for row, token in enumerate(tokens) if token in self._stops}
        return len(self._ended) == len(tokens)

    # ----- capturing

    def _may_capture(self) -> bool:
        """Whether room was reserved on a GPU, so that steps could be captured."""
        has_room = isinstance(self.cache, QuantizedCache) and self.cache.max_tokens is not None
        return self._allowed(has_room and self.model.device.type == "cuda")

    def _is_capturable(self) -> bool:
        """Whether the steps that were taken read nothing from the host."""
        return self._allowed(self.cache.steps_on_device and self._has_kernels_for_heads())

    def _allowed(self, is_possible: bool) -> bool:
        if self._must_capture and not is_possible:
            raise UnsupportedModelError(
                "capture must be None or False unless the cache is of plan.new_cache(model, "
                "max_tokens=...) on one CUDA device and all its layers run on kernels, got True; "
                "leave capture out"
            )
        return is_possible

    def _has_kernels_for_heads(self) -> bool:
        geometry = ModelGeometry.from_config(self.model.config)
        return not any(
            unsupported_heads(geometry.num_attention_heads // layer.num_key_value_heads)
            for layer in geometry.layers
        )

    def _advance(self) -> None:
        if self._is_plain:
            self.step()
            return
        if self._num_steps < EAGER_STEPS:
            self._set_up(self.step)
            self._setup_steps += 1
            return
        if self._graph is None and not self._is_capturable():
            self._is_plain = True
            self.step()
            return
        num_tokens = self.cache.get_seq_length() + 1
        if self._graph is None or num_tokens > self._horizon:
            self._set_up(lambda: self._capture(num_tokens))
        else:
            self.cache.count_replayed_step()
        assert self._graph is not None
        self._graph.replay()

    def _set_up(self, act: Callable[[], None]) -> None:
        """Do what no steady step does, and keep its time apart."""
        started = now(self.model)
        act()
        self._setup_seconds += now(self.model) - started

    def _capture(self, num_tokens: int) -> None:
        """Capture the next step, to be replayed until there are twice as many tokens."""
        horizon = max(LEAST_HORIZON, 2 * num_tokens)
        self._horizon = min(horizon, self.cache.max_tokens)
        self._graph = None  # its memory can be taken by the new one
        # Of long rows, each program takes more as they grow: as many as now suit them then.
        self.cache.expect_tokens(min(self._horizon, max(LEAST_HORIZON, num_tokens)))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            raise UnsupportedModelError(
                "the model's forward must not wait for the device to be captured in a CUDA graph, "
                f"got: {str(error).splitlines()[0]}; pass capture=False"
            ) from error
        self._graph = graph


class _Mailbox:
    """Tokens on their way to the host; it takes them while the next step runs."""

    def __init__(self, token: Tensor) -> None:
        self._token = token
        self._is_cuda = token.device.type == "cuda"
        self._host = torch.empty(token.shape[0], dtype=torch.int64, pin_memory=self._is_cuda)
        self._event = torch.cuda.Event() if self._is_cuda else None

    def post(self) -> None:
        """Send the present token of every row."""
        self._host.copy_(self._token[:, 0], non_blocking=True)
        if self._event:
            self._event.record()

    def take(self) -> list[int]:
        """Wait for what was sent."""
        if self._event:
            self._event.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row from ``[B, V]`` logits: ``[B]``.

    With a temperature, by the largest probability over exponential noise, which is a draw from the
    distribution and needs no number on the host.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1]), -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = scores.sort(-1, descending=True)
        share = ordered.softmax(-1)
        is_beyond = share.cumsum(-1) - share >= sampling.top_p  # the likeliest always stays
        scores = scores.scatter(-1, order, ordered.masked_fill(is_beyond, -torch.inf))
    noise = torch.empty_like(scores).exponential_()
    return (scores.softmax(-1) / noise).argmax(-1)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, as the model's generation settings or its tokenizer name them."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _padded(mask: Tensor, num_queries: int) -> dict[str, Tensor]:
    """Mask and positions of a padded chunk."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -num_queries:]
    return {"attention_mask": mask, "position_ids": position}


def _check(input_ids: Tensor, cache: Any, max_new_tokens: int, sampling: Sampling) -> None:
    sampling.check()
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, T], got shape {list(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    room = getattr(cache, "max_tokens", None)
    needed = cache.get_seq_length() + input_ids.shape[1] + max_new_tokens - 1  # the last stays out
    if room is not None and needed > room:
        raise ValueError(
            f"max_tokens of the cache must be at least {needed}, tokens it holds, prompt and new "
            f"ones, got {room}"
        )


def now(model: Any) -> float:
    """Seconds, once the device has caught up."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
