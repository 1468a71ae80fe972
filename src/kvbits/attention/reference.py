"""Eager attention over packed states: the specification of every other implementation.

Row positions are walked in spans of at most ``SPAN_TOKENS``. Each span is decoded in float32,
scored, and merged into a running softmax (maximum, sum and weighted output), so that extra memory
stays bounded whatever the context. Where some queries see a token decoded and others see it exact,
both scores are computed and each query takes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvbits.attention.states import LayerStates
from kvbits.codecs.packing import BASE_PAGE_TOKENS
from kvbits.layer_plan import IntArray, Side

SPAN_TOKENS = 4096
# Scores of one span, over batch, query heads and queries: 64 MiB in float32. Many queries get
# shorter spans, so that a chunked prefill does not hold more than the cache it saves.
MAX_SCORES = 2**24


class Span(NamedTuple):
    """Row positions ``start`` to ``stop``, and whether some query sees them decoded or exact."""

    start: int
    stop: int
    has_decoded: bool
    has_exact: bool


class _Running(NamedTuple):
    """Softmax so far: two of ``[B, H_kv, n * Q, 1]`` and one of ``[B, H_kv, n * Q, D_v]``."""

    maximum: Tensor
    total: Tensor
    output: Tensor


def attend(
    query: Tensor,
    states: LayerStates,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute softmax(scale · query · keysᵀ + mask) · values over one layer's states.

    Args:
        query: ``[B, H_q, Q, D]``; the newest Q tokens of the cache.
        states: Keys and values; H_q must be a multiple of their H_kv.
        mask: ``[B or 1, 1 or H_q, Q, T]`` by logical position: boolean (True: attend) or additive.
            None: causal.
        scale: Factor on the scores.
        softcap: If given, scores become ``softcap * tanh(scores / softcap)`` before the mask.
        window: Newest tokens a query sees, its own included; a mask must say so itself.
        sink_logits: ``[H_q]`` extra logits that take part in the softmax and have no value.

    Returns:
        ``[B, H_q, Q, D_v]`` in the dtype of ``query``; zero for queries that may see nothing.
    """
    num_kv_heads = states.key.tail.shape[1]
    grouped = query.float().unflatten(1, (num_kv_heads, -1))  # [B, H_kv, n, Q, D]
    running = _start(grouped, states, sink_logits)
    rows = grouped.flatten(2, 3) * scale  # [B, H_kv, n * Q, D]
    for span in spans(states, rows.shape[:3].numel()):
        scores = _scores(rows, states, span)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.unflatten(2, grouped.shape[2:4])  # [B, H_kv, n, Q, t]
        scores = _masked(scores, states, span, mask, window).flatten(2, 3)
        running = _merge(running, scores, states, span)
    output = running.output / running.total.clamp_min(1e-30)
    return output.unflatten(2, grouped.shape[2:4]).flatten(1, 2).to(query.dtype)


def spans(states: LayerStates, num_rows: int = 1) -> Iterator[Span]:
    """Cut the row positions where what queries see changes, and every ``SPAN_TOKENS`` or fewer.

    ``num_rows`` rows of scores are computed per token; they are kept below ``MAX_SCORES``.
    """
    longest = min(SPAN_TOKENS, max(BASE_PAGE_TOKENS, MAX_SCORES // num_rows))
    num_tokens = int(states.row_lengths.max(initial=0))
    num_sinks = states.key.sinks.shape[-2]
    bounds = np.stack([states.key.decoded_until, states.value.decoded_until])  # [2, B, Q]
    own = _query_positions(states)  # [B, Q]
    real = own >= 0
    lowest = np.where(real, bounds, num_tokens).min(initial=num_tokens)
    highest = np.where(real, bounds, 0).max(initial=0)
    # A query sees positions up to its own: what lies between its bound and itself it sees exact.
    any_exact_beyond_sinks = bool((real & (bounds <= own)).any())
    cuts = sorted({0, num_tokens, *(c for c in (num_sinks, lowest, highest) if c < num_tokens)})
    for begin, end in pairwise(cuts):
        for start in range(int(begin), int(end), longest):
            stop = min(start + longest, int(end))
            has_decoded = begin >= num_sinks and begin < highest
            is_mixed = begin >= lowest and any_exact_beyond_sinks
            yield Span(start, stop, has_decoded, begin < num_sinks or is_mixed or not has_decoded)


def _query_positions(states: LayerStates) -> IntArray:
    """Row position of every query ``[B, Q]``; negative for padding."""
    last = states.row_lengths[:, None] - 1
    return last - np.arange(states.num_queries - 1, -1, -1)


def _start(grouped: Tensor, states: LayerStates, sink_logits: Tensor | None) -> _Running:
    batch, heads, repeats, queries, _ = grouped.shape
    shape = (batch, heads, repeats * queries)
    output = grouped.new_zeros(*shape, states.value.tail.shape[-1])
    if sink_logits is None:
        maximum = grouped.new_full((*shape, 1), -torch.inf)
        return _Running(maximum, grouped.new_zeros(*shape, 1), output)
    logits = sink_logits.float().view(1, heads, repeats, 1).expand(batch, -1, -1, queries)
    return _Running(logits.reshape(*shape, 1), grouped.new_ones(*shape, 1), output)


def _scores(rows: Tensor, states: LayerStates, span: Span) -> Tensor:
    """Scores ``[B, H_kv, n * Q, t]`` of one span."""

    def score(keys: Tensor) -> Tensor:
        return rows @ keys.float().transpose(-1, -2)

    if not span.has_decoded:
        return score(states.exact("key", span.start, span.stop))
    decoded = score(states.key.decoded(span.start, span.stop))
    if not span.has_exact:
        return decoded
    exact = score(states.exact("key", span.start, span.stop))
    return torch.where(_is_decoded(states, "key", span, rows.shape[2]), decoded, exact)


def _is_decoded(states: LayerStates, side: Side, span: Span, num_rows: int) -> Tensor:
    """``[B, 1, n * Q, t]``: which tokens of a span each query sees decoded."""
    until = torch.from_numpy(states.side(side).decoded_until)
    device = states.key.tail.device
    position = torch.arange(span.start, span.stop, device=device)
    seen = position < until.to(device)[..., None]  # [B, Q, t]
    return seen.repeat(1, num_rows // seen.shape[1], 1)[:, None]


def _masked(
    scores: Tensor, states: LayerStates, span: Span, mask: Tensor | None, window: int | None
) -> Tensor:
    """Apply the mask to scores ``[B, H_kv, n, Q, t]``."""
    is_lone = states.num_queries == 1 and not any(states.padding)
    if mask is None and is_lone and window is None:
        return scores  # the newest token sees everything
    position = torch.arange(span.start, span.stop, device=scores.device)
    shift = torch.tensor(list(states.padding), device=scores.device)
    if mask is None:
        own = torch.from_numpy(_query_positions(states)).to(scores.device)[..., None]
        allowed = position <= own  # [B, Q, t]
        if window is not None:
            allowed &= position > own - window
        return scores.masked_fill(~allowed[:, None, None], -torch.inf)
    if any(states.padding):
        column = (position + shift[:, None]).clamp(max=mask.shape[-1] - 1)  # [B, t]
        wide = mask.expand(len(states.padding), *mask.shape[1:])
        index = column[:, None, None].expand(-1, *wide.shape[1:3], -1)
        part = wide.gather(-1, index)
    else:
        part = mask[..., span.start : span.stop]
    part = (
        part.expand(-1, scores.shape[1] * scores.shape[2], -1, -1) if part.shape[1] > 1 else part
    )
    part = part.unflatten(1, (scores.shape[1], scores.shape[2]) if part.shape[1] > 1 else (1, 1))
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~part, -torch.inf)
    else:
        lowest = torch.finfo(mask.dtype).min  # what transformers writes for "do not attend"
        scores = (scores + part.float()).masked_fill(part <= lowest, -torch.inf)
    beyond = position >= torch.from_numpy(states.row_lengths).to(scores.device)[:, None]  # [B, t]
    return scores.masked_fill(beyond[:, None, None, None], -torch.inf)


def _merge(running: _Running, scores: Tensor, states: LayerStates, span: Span) -> _Running:
    """Fold one span's scores ``[B, H_kv, n * Q, t]`` into the softmax so far."""
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    finite = maximum.clamp_min(torch.finfo(torch.float32).min)  # -inf - -inf would be NaN
    weights = torch.exp(scores - finite)
    rescale = torch.exp(running.maximum - finite)
    total = running.total * rescale + weights.sum(-1, keepdim=True)
    return _Running(maximum, total, running.output * rescale + _weighted(weights, states, span))


def _weighted(weights: Tensor, states: LayerStates, span: Span) -> Tensor:
    """Sum of values ``[B, H_kv, n * Q, D_v]`` under unnormalised weights."""
    if not span.has_decoded:
        return weights @ states.exact("value", span.start, span.stop).float()
    decoded = states.value.decoded(span.start, span.stop).float()
    if not span.has_exact:
        return weights @ decoded
    seen = _is_decoded(states, "value", span, weights.shape[2])
    exact = states.exact("value", span.start, span.stop).float()
    return weights.masked_fill(~seen, 0) @ decoded + weights.masked_fill(seen, 0) @ exact
