"""Decode attention by ``torch.compile``, for CPUs: one query, codes read where they lie.

The compiler fuses unpacking with the products, so no code is ever written out as a number: scales
multiply the finished dot product (keys per token), the query (keys per channel) or the probability
(values). What a step needs beside the cache is one score per query head and token. The softmax
over them is left to PyTorch: the compiler's own takes many times as long.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from kvbits.attention.states import LayerStates
from kvbits.codecs import Affine, Codec, packing
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import LayerPlan

_SIZES_ARE_UNRELATED = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]


class _Side(NamedTuple):
    """How a store lies in memory: facts that are compiled in."""

    bits: int
    page_tokens: int
    block_tokens: int  # tokens that share a channel's scale; 0: scales per token

    @property
    def is_exact(self) -> bool:
        return self.bits == 16


class _Steps(NamedTuple):
    """Compiled functions of a layout; see the functions of the same names.

    Inductor fuses what it can. Three functions keep apart what must not be worked out anew for
    every channel or token.
    """

    spread: Callable[..., tuple[Tensor, Tensor]]
    score: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    add_values: Callable[..., Tensor]


class _Pages(NamedTuple):
    """Planes of a store, and the pages of every row ``[B, n]``."""

    codes: Tensor
    affine: Tensor
    ids: Tensor


def unavailable(plan: LayerPlan, device: torch.device) -> str | None:
    """Why a layer cannot be compiled, as ``<name> must <rule>, got <value>``; None if it can."""
    if device.type != "cpu":
        return f"device must be cpu, got {device}"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "a C++ compiler must be on the PATH, got none"
    if plan.flush != "joint":
        return f"flush must be 'joint', got {plan.flush!r}"
    for codec in (codec for group in plan.groups for codec in (group.key, group.value)):
        if not codec.is_exact and not _is_readable(codec):
            return f"codecs must be exact or affine with an offset, got {codec!r}"
    for group in plan.groups:
        if isinstance(group.value, Affine) and group.value.granularity != "per_token":
            return f"values must share scales per token, got {group.value!r}"
    return None


def _is_readable(codec: Codec) -> bool:
    if not isinstance(codec, Affine) or codec.symmetric:
        return False
    return codec.parameter_dtype != "float8" and codec.bits in (2, 3, 4, 8)


def attend(
    query: Tensor,
    states: LayerStates,
    scale: float,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend with one query per row, which sees all that is packed decoded.

    Args:
        query: ``[B, H_q, 1, D]``.
        states: From a decode step of a layer that ``unavailable`` has nothing against, and of
            which something is packed.
        scale: Factor on the scores.
        softcap: As in ``reference.attend``.
        sink_logits: ``[H_q]``.

    Returns:
        ``[B, H_q, 1, D_v]`` in the dtype of ``query``.
    """
    grouped = query[:, :, 0].float().unflatten(1, (states.num_heads, -1)) * scale
    logits = None if sink_logits is None else sink_logits.float().unflatten(0, grouped.shape[1:3])
    keys, values, missing = _exact(states)
    outputs, order = [], []
    for (key, heads), (value, _) in zip(states.key.stores, states.value.stores, strict=True):
        own, own_logits = (grouped, keys, values), logits
        if heads is not None:
            own = (grouped[:, heads], keys[:, heads], values[:, heads])
            own_logits = None if logits is None else logits[heads]
            order.append(heads)
        outputs.append(_attend(key, value, *own, missing, softcap, own_logits))
    output = outputs[0] if not order else torch.cat(outputs, 1)[:, torch.cat(order).argsort()]
    return output.flatten(1, 2)[:, :, None].to(query.dtype)


def _attend(
    key: PageStore,
    value: PageStore,
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    missing: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend with scaled queries ``[B, H, n, D]`` of one head group: ``[B, H, n, D_v]``."""
    count = -(-max(key.lengths) // key.page_tokens)
    key_pages, value_pages = _pages(key, count), _pages(value, count)
    steps = _compiled(_side(key), _side(value), softcap)
    factors = shifts = _varying(query, 0)
    if _side(key).block_tokens:
        factors, shifts = (_varying(x, 0, 1) for x in steps.spread(query, key_pages))
    lengths = _varying(torch.tensor(key.lengths), 0)
    packed, scales, offsets = steps.score(factors, shifts, lengths, key_pages, value_pages)
    exact = query @ exact_keys.transpose(-1, -2)  # [B, H, n, E]
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
    if missing is not None:
        exact = exact.masked_fill(missing[:, None, None], -torch.inf)
    scores = [exact, packed]
    if sink_logits is not None:
        scores.append(sink_logits[None, ..., None].expand(len(query), -1, -1, 1))
    weights = torch.cat(scores, -1).softmax(-1)
    if min(key.lengths) == 0:  # a row of nothing but padding has no weights
        weights = weights.nan_to_num(0.0)
    num_exact, num_packed = exact.shape[-1], packed.shape[-1]
    rest = weights[..., :num_exact] @ exact_values
    weights = weights[..., num_exact : num_exact + num_packed]
    if scales is None or offsets is None:
        weights = _varying(weights[:, :, None].contiguous(), 0, 4)
        return steps.add_values(weights, _varying(rest, 0), value_pages)
    constants = weights @ offsets.transpose(-1, -2)  # [B, H, n, groups]
    rest = (rest.unflatten(-1, (constants.shape[-1], -1)) + constants[..., None]).flatten(-2)
    weights = _varying(weights[:, :, None] * scales[:, :, :, None], 0, 4)
    return steps.add_values(weights, _varying(rest, 0), value_pages)


def _exact(states: LayerStates) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sinks and tail of both sides ``[B, H, E, D]``, and which of them are no row's ``[B, E]``."""
    keys, values = (
        torch.cat((side.sinks, side.tail), -2) if side.sinks.shape[-2] else side.tail
        for side in (states.key, states.value)
    )
    num_sinks, width = states.key.sinks.shape[-2], states.key.tail.shape[-2]
    length = states.row_lengths[:, None]
    packed = np.array(states.key.stores[0][0].lengths)[:, None]
    position = length - width + np.arange(width)  # of the tail's columns
    is_missing = (position < num_sinks + packed) | (position < 0)
    is_missing = np.concatenate((np.arange(num_sinks) >= length, is_missing), 1)
    missing = torch.from_numpy(is_missing) if is_missing.any() else None
    return keys.float(), values.float(), missing


def _side(store: PageStore) -> _Side:
    codec: Codec = store.codec
    is_blocked = isinstance(codec, Affine) and codec.granularity == "per_channel"
    bits = 16 if codec.is_exact else int(codec.code_bits())
    return _Side(bits, store.page_tokens, codec.block_tokens if is_blocked else 0)


def _pages(store: PageStore, count: int) -> _Pages:
    planes, ids = store.view_pages(count)
    codes, affine = planes["codes"], planes.get("affine", planes["codes"])
    return _Pages(_varying(codes, 0), _varying(affine, 0), _varying(ids, 0, 1))


def _varying(states: Tensor, *axes: int) -> Tensor:
    """Have axes compiled for any size: rows and pages come and go, a model's widths do not."""
    torch._dynamo.maybe_mark_dynamic(states, axes)
    return states


@functools.cache
def _compiled(key: _Side, value: _Side, softcap: float | None) -> _Steps:
    return _Steps(
        spread=_compile("spread", _spread, ()),
        score=_compile("score", _score, (key, value, softcap)),
        add_values=_compile("add_values", _add_values, (value,)),
    )


def _compile(name: str, function: Any, facts: tuple[Any, ...]) -> Any:
    """Compile a function for a layout.

    Dynamo counts recompilations by code object and gives up after a few: each layout has its own.
    """

    def half(*arguments: Any) -> Any:
        return function(*facts, *arguments)

    half.__code__ = half.__code__.replace(co_name=f"{name} {facts}")
    compiled = torch.compile(half, fullgraph=True)

    def call(*arguments: Any) -> Any:
        with _SIZES_ARE_UNRELATED:  # else 64 pages of 64 tokens would compile for as many alone
            return compiled(*arguments)

    return call


def _spread(query: Tensor, pages: _Pages) -> tuple[Tensor, Tensor]:
    """Give each block's scales and offsets to the query ``[B, H, n, D]``.

    Returns:
        Factors of codes ``[B, pages, H, n, blocks, D]`` and, without D, what to add to scores.
    """
    scale, offset = pages.affine[pages.ids].float().unbind(-1)  # [B, pages, H, blocks, D]
    query = query[:, None, :, :, None]
    return query * scale[:, :, :, None], (query * offset[:, :, :, None]).sum(-1)


def _score(
    key: _Side,
    value: _Side,
    softcap: float | None,
    factors: Tensor,
    shifts: Tensor,
    lengths: Tensor,
    key_pages: _Pages,
    value_pages: _Pages,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores, in the order in which a page of values holds its tokens.

    Args:
        factors: The scaled query ``[B, H, n, D]``, or of ``_spread``.
        shifts: Of ``_spread``.
        lengths: Packed tokens ``[B]``.

    Returns:
        Scores ``[B, H, n, T]``; scales and offsets of values ``[B, H, groups, T]``, or None.
    """
    place = torch.arange(key.page_tokens)  # the token at each place
    if not value.is_exact:
        place = packing.value_tokens(key.page_tokens)
    token = torch.arange(key_pages.ids.shape[1])[:, None] * key.page_tokens + place
    is_packed = (token < lengths[:, None, None])[:, :, None]  # [B, pages, 1, P]
    scores = []
    for head in _scores_by_head(key, place, factors, shifts, key_pages):
        if softcap is not None:
            head = softcap * torch.tanh(head / softcap)
        scores.append(head.masked_fill(~is_packed, -torch.inf).transpose(1, 2))
    stacked = torch.stack(scores, 2).flatten(-2)
    if value.is_exact:
        return stacked, None, None
    affine = value_pages.affine[value_pages.ids][..., place, :].float()  # [B, pages, H, g, P, 2]
    scales, offsets = affine.permute(5, 0, 2, 3, 1, 4).flatten(-2)
    return stacked, scales, offsets


def _scores_by_head(
    side: _Side, place: Tensor, factors: Tensor, shifts: Tensor, pages: _Pages
) -> Iterator[Tensor]:
    """Scores of each query head ``[B, pages, H, P]``."""
    codes = pages.codes[pages.ids][..., place, :]  # [B, pages, H, P, row]
    if side.block_tokens:
        block = place // side.block_tokens
        (runs,) = _runs(codes, side, 1)
        for head in range(factors.shape[3]):
            own = factors[:, :, :, head, block]
            yield _dot(runs, own) + shifts[:, :, :, head, block]
    elif side.is_exact:
        (runs,) = _runs(codes, side, 1)
        for head in range(factors.shape[2]):
            yield _dot(runs, factors[:, None, :, head, None])
    else:
        affine = pages.affine[pages.ids][..., place, :].float()  # [B, pages, H, groups, P, 2]
        groups = _runs(codes, side, affine.shape[3])
        for head in range(factors.shape[2]):
            parts = factors[:, None, :, head, None].chunk(len(groups), -1)
            yield functools.reduce(
                torch.add,
                (
                    _dot(runs, own) * affine[:, :, :, g, :, 0]
                    + own.sum(-1) * affine[:, :, :, g, :, 1]
                    for g, (runs, own) in enumerate(zip(groups, parts, strict=True))
                ),
            )


def _dot(runs: list[Tensor], factors: Tensor) -> Tensor:
    """Codes by runs of channels, times factors of all channels, summed over channels."""
    pieces = factors.chunk(len(runs), -1)
    products = [run * piece for run, piece in zip(runs, pieces, strict=True)]
    return functools.reduce(torch.add, products).sum(-1)


def _add_values(side: _Side, weights: Tensor, rest: Tensor, pages: _Pages) -> Tensor:
    """Values under the weights of their codes ``[B, H, groups, n, T]``, and the rest.

    Returns:
        ``[B, H, n, D_v]``, like ``rest``.
    """
    codes = pages.codes[pages.ids]
    if not side.is_exact:
        codes = codes.transpose(-1, -2)  # [B, pages, H, P, row bytes]
    groups = _runs(codes, side, weights.shape[2])
    weights = weights.unflatten(-1, (-1, side.page_tokens)).permute(2, 3, 0, 4, 1, 5)
    sums = [
        [
            (run * weights[group, head, ..., None]).sum(3).sum(1)
            for group, runs in enumerate(groups)
            for run in runs
        ]
        for head in range(weights.shape[1])
    ]
    return torch.stack([torch.cat(parts, -1) for parts in sums], -2) + rest


def _runs(codes: Tensor, side: _Side, num_groups: int) -> list[list[Tensor]]:
    """Codes ``[..., row bytes]`` as float32 runs of channels, by scale group."""
    if side.is_exact:
        return [[codes.float()]]
    runs = [run.float() for run in packing.unpack_runs(codes, side.bits)]
    if num_groups % len(runs) == 0:
        pieces = num_groups // len(runs)
        return [[piece] for run in runs for piece in run.chunk(pieces, -1)]
    if len(runs) % num_groups == 0:
        share = len(runs) // num_groups
        return [runs[i : i + share] for i in range(0, len(runs), share)]
    return [[piece] for piece in torch.cat(runs, -1).chunk(num_groups, -1)]
