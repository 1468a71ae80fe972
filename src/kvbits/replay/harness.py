"""Replay of one example: the policy's cache beside the exact one, step by step.

``teacher``: the exact cache decides which token comes next, and the policy's cache, quantized
afresh from exact entries at every step, is asked what it would have chosen. ``free``: the policy's
choice comes next, its entries are kept exact as they were produced, and the exact cache of the
same entries is what it is compared with. In neither mode are quantized entries quantized again.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kvbits.evaluation.divergence import forward_kl
from kvbits.evaluation.token_set import encode_document
from kvbits.generation import now, stop_ids
from kvbits.replay.families import Attention
from kvbits.replay.model import (
    Queries,
    cache_of,
    check_model,
    entries_of,
    next_logits,
    watched_queries,
)
from kvbits.replay.process import PolicyProcess
from kvbits.replay.settings import Request, TensorSettings, ask_settings
from kvbits.replay.slices import Example, Slice
from kvbits.replay.step import Entries, Quantizer, Stats, TensorRecord, check_settings, stats_of

ReplayMode = Literal["teacher", "free"]


class StepResult(NamedTuple):
    """One step: what the policy's cache chose, how far off it was, and every tensor.

    Attributes:
        token: The token that was fed.
        chosen: What the policy's cache chose next.
        is_match: Whether the exact cache chose the same.
        kl_nats: KL(exact || policy) of the next token.
        num_tokens: Cached tokens.
        num_clamped: Answers of ``choose_bits`` that were cut down to the budget.
        tensors: Keys of all layers, then values.
    """

    token: int
    chosen: int
    is_match: bool
    kl_nats: float
    num_tokens: int
    num_clamped: int
    tensors: tuple[TensorRecord, ...]


class ExampleResult(NamedTuple):
    """One example.

    Attributes:
        example_id: Its name.
        prompt_tokens: Tokens of its prompt.
        settings: What the policy asked for, tensor by tensor.
        steps: The steps; none where the first token ends the text.
        text: What was decoded.
        peak_bytes: Most bytes of the quantized cache, by ``bits``.
        prefill_seconds, decode_seconds, calibration_seconds: Wall time; decoding is snapshot,
            statistics, quantization and the policy's forward.
    """

    example_id: str
    prompt_tokens: int
    settings: tuple[TensorSettings, ...]
    steps: tuple[StepResult, ...]
    text: str
    peak_bytes: float
    prefill_seconds: float
    decode_seconds: float
    calibration_seconds: float


class Workload(NamedTuple):
    """A slice on a model, and the policy that is measured on it.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        model_id: Its name.
        slice: The examples.
        policy: What ``PolicyProcess`` loads.
        budget_bits: Cap on the bits of an entry.
        mode: ``teacher`` or ``free``.
        seed: Seed of the policy's process.
    """

    model: Any
    tokenizer: Any
    model_id: str
    slice: Slice
    policy: str
    budget_bits: int
    mode: ReplayMode = "teacher"
    seed: int = 0

    def ids(self, example: Example) -> list[int]:
        """Tokens of a prompt.

        Raises:
            ValueError: If the model is too short for it.
        """
        found = encode_document(self.tokenizer, example.prompt)
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and len(found) + self.slice.num_steps > most:
            raise ValueError(
                f"--model must take {len(found) + self.slice.num_steps} tokens for example "
                f"{example.example_id}, got a limit of {most}"
            )
        return found

    def meta(self) -> dict[str, Any]:
        """``workload_meta``."""
        lengths = [len(self.ids(example)) for example in self.slice.examples]
        return {
            "name": self.slice.name,
            "source_family": self.slice.examples[0].source_family,
            "num_examples": len(lengths),
            "min_prompt_tokens": min(lengths),
            "mean_prompt_tokens": sum(lengths) / len(lengths),
            "max_prompt_tokens": max(lengths),
            "max_new_tokens": self.slice.num_steps,
            **self._model_meta(),
        }

    def request(self, example: Example) -> Request:
        """What hooks may know of one example before it is decoded."""
        meta = {
            "workload": self.slice.name,
            "dataset": example.source_family,
            "example_id": example.example_id,
            "prompt_chars": len(example.prompt),
            "prompt_tokens": len(self.ids(example)),
            "max_new_tokens": self.slice.num_steps,
            "num_query_heads": check_model(self.model).num_attention_heads,
            **self._model_meta(),
        }
        return Request(meta, self.budget_bits)

    def _model_meta(self) -> dict[str, Any]:
        geometry = check_model(self.model)
        first = geometry.layers[0]
        return {
            "model_id": self.model_id,
            "num_layers": len(geometry.layers),
            "num_kv_heads": first.num_key_value_heads,
            "head_dim": first.key_head_dim,
        }


@torch.no_grad()
def replay_example(workload: Workload, example: Example) -> ExampleResult:
    """Replay one example with a policy built for it alone.

    Raises:
        PolicyError: If a hook fails.
    """
    with PolicyProcess(workload.policy, workload.seed) as policy, ExitStack() as stack:
        request = workload.request(example)
        state = request.budget_state(0)
        mode = policy.ask("calibration_mode", workload.meta(), state)
        frozen, seconds = None, 0.0
        if mode == "workload":
            started = time.perf_counter()
            frozen = _workload_stats(workload, policy)
            seconds = time.perf_counter() - started
        settings = _settings(policy, request)
        queries = Queries(max(each.last_n_attentions for each in settings))
        if any(each.use_attentions for each in settings):
            stack.enter_context(watched_queries(workload.model, queries))
        replay = _Replay(workload, example, policy, request, settings, queries)
        if mode == "prefill":
            started = time.perf_counter()
            frozen = _stats(replay.entries, settings, "prefill")
            seconds += time.perf_counter() - started
        return replay.run(frozen, seconds)


def _settings(policy: PolicyProcess, request: Request) -> list[TensorSettings]:
    return check_settings(ask_settings(policy, request), request.meta["head_dim"])


def _workload_stats(workload: Workload, policy: PolicyProcess) -> Stats:
    """``token_stats`` of the exact cache of the first example's prompt."""
    example = workload.slice.examples[0]
    settings = _settings(policy, workload.request(example))
    cache = cache_of([])
    next_logits(workload.model, workload.ids(example), cache)
    return _stats(entries_of(cache), settings, "workload")


def _stats(entries: Entries, settings: list[TensorSettings], source: str) -> Stats:
    return [stats_of(x, each, source) for x, each in zip(entries, settings, strict=True)]


class _Replay:
    """One example after its prefill."""

    def __init__(
        self,
        workload: Workload,
        example: Example,
        policy: PolicyProcess,
        request: Request,
        settings: list[TensorSettings],
        queries: Queries,
    ) -> None:
        self._workload, self._example, self._policy = workload, example, policy
        self._request, self._settings, self._queries = request, settings, queries
        self._cache = cache_of([])
        started = now(workload.model)
        logits = next_logits(workload.model, workload.ids(example), self._cache)
        self._prefill_seconds = now(workload.model) - started
        self._token = int(logits.argmax())
        self.entries: Entries = entries_of(self._cache)
        self._decode_seconds = self._peak_bytes = 0.0

    def run(self, frozen: Stats | None, calibration_seconds: float) -> ExampleResult:
        """Replay until the text ends or all steps are taken."""
        workload = self._workload
        stops = stop_ids(workload.model, workload.tokenizer)
        quantizer = Quantizer(self._policy, self._request, self._settings, frozen, self._attention)
        tokens, steps = [self._token], []
        for _ in range(workload.slice.num_steps):
            if tokens[-1] in stops:
                break
            step, token = self._step(tokens[-1], quantizer)
            steps.append(step)
            tokens.append(token)
        text = workload.tokenizer.decode(
            [token for token in tokens[: workload.slice.num_steps] if token not in stops]
        )
        return ExampleResult(
            example_id=self._example.example_id,
            prompt_tokens=self._request.meta["prompt_tokens"],
            settings=tuple(self._settings),
            steps=tuple(steps),
            text=text,
            peak_bytes=self._peak_bytes,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            calibration_seconds=calibration_seconds,
        )

    def _step(self, token: int, quantizer: Quantizer) -> tuple[StepResult, int]:
        """Feed one token over both caches; return what happened and the token that follows."""
        model = self._workload.model
        started = now(model)
        self.entries = entries_of(self._cache)
        made = quantizer.run(self.entries)
        cache = cache_of(made.entries)
        with self._queries.paused():
            chosen = next_logits(model, [token], cache)
        self._decode_seconds += now(model) - started
        exact = next_logits(model, [token], self._cache)
        kl = forward_kl(exact.log_softmax(-1), chosen.log_softmax(-1))
        following = exact
        if self._workload.mode == "free":
            self._continue_from(cache)
            following = chosen
        sizes = [
            x.numel() * record.bits / 8
            for x, record in zip(self.entries, made.records, strict=True)
        ]
        self._peak_bytes = max(self._peak_bytes, sum(sizes))
        result = StepResult(
            token=token,
            chosen=int(chosen.argmax()),
            is_match=bool(chosen.argmax() == exact.argmax()),
            kl_nats=float(kl),
            num_tokens=self.entries[0].shape[2],
            num_clamped=made.num_clamped,
            tensors=tuple(made.records),
        )
        return result, int(following.argmax())

    def _continue_from(self, cache: Any) -> None:
        """Go on with the newest entry of the policy's cache behind the exact former ones."""
        newest = [x[:, :, -1:] for x in entries_of(cache)]
        joined = [torch.cat(pair, 2) for pair in zip(self.entries, newest, strict=True)]
        self._cache = cache_of(joined)

    def _attention(self, settings: TensorSettings, start: int, stop: int) -> Attention:
        """What the newest queries say of the quantizable tokens of one tensor."""
        keys = self.entries[settings.layer_id]
        num_tokens = keys.shape[2]
        weights: Tensor = self._queries.largest_weights(
            settings.layer_id, keys, settings.last_n_attentions
        )
        behind = num_tokens - (settings.last_n_attentions - 1)
        newest = max(0, stop - max(start, behind))
        return Attention(weights[:, start:stop], num_tokens, newest)


__all__ = [
    "ExampleResult",
    "ReplayMode",
    "StepResult",
    "Workload",
    "replay_example",
]
