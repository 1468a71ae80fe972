"""Decode attention by ``torch.compile``, for CPUs: one query, codes read where they lie.

The compiler fuses unpacking with the products, so no code is ever written out as a number: scales
multiply the finished dot product (keys per token), the query (keys per channel) or the probability
(values). What a step needs beside the cache is one score per query head and token.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbits.attention.states import LayerStates
from kvbits.codecs import Affine, Codec, packing
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import LayerPlan


class _Side(NamedTuple):
    """How a store lies in memory: facts that are compiled in."""

    bits: int
    page_tokens: int
    block_tokens: int  # tokens that share a channel's scale; 0: scales per token

    @property
    def is_exact(self) -> bool:
        return self.bits == 16


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
        if not codec.is_exact and not (isinstance(codec, Affine) and not codec.symmetric):
            return f"codecs must be exact or affine with an offset, got {codec!r}"
    for group in plan.groups:
        if isinstance(group.value, Affine) and group.value.granularity != "per_token":
            return f"values must share scales per token, got {group.value!r}"
    return None


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
    keys, values, is_exact = _exact(states)
    outputs, order = [], []
    for (key, heads), (value, _) in zip(states.key.stores, states.value.stores, strict=True):
        own, own_logits = (grouped, keys, values), logits
        if heads is not None:
            own = (grouped[:, heads], keys[:, heads], values[:, heads])
            own_logits = None if logits is None else logits[heads]
            order.append(heads)
        count = -(-max(key.lengths) // key.page_tokens)
        weigh, add = _compiled(_side(key), _side(value), softcap)
        lengths, pages = torch.tensor(key.lengths), _pages(value, count)
        weights, exact = weigh(*own, is_exact, lengths, _pages(key, count), pages, own_logits)
        outputs.append(add(weights, exact, pages))
    output = outputs[0] if not order else torch.cat(outputs, 1)[:, torch.cat(order).argsort()]
    return output.flatten(1, 2)[:, :, None].to(query.dtype)


def _exact(states: LayerStates) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks and tail of both sides ``[B, H, E, D]``, and which of them a row holds ``[B, E]``."""
    keys, values = (
        torch.cat((side.sinks, side.tail), -2).float() for side in (states.key, states.value)
    )
    if not keys.shape[-2]:  # a maximum needs something to be over
        keys, values = (x.new_zeros(*x.shape[:2], 1, x.shape[-1]) for x in (keys, values))
        return keys, values, torch.zeros(len(keys), 1, dtype=torch.bool)
    num_sinks, width = states.key.sinks.shape[-2], states.key.tail.shape[-2]
    length = torch.from_numpy(states.row_lengths)[:, None]
    packed = torch.tensor(states.key.stores[0][0].lengths)[:, None]
    column = torch.arange(width)
    position = length - width + column  # of the tail's columns
    is_exact = (position >= num_sinks + packed) & (position >= 0)
    if num_sinks:
        is_exact = torch.cat((torch.arange(num_sinks) < length, is_exact), 1)
    return keys, values, is_exact


def _side(store: PageStore) -> _Side:
    codec: Codec = store.codec
    is_blocked = isinstance(codec, Affine) and codec.granularity == "per_channel"
    bits = 16 if codec.is_exact else codec.code_bits()
    return _Side(bits, store.page_tokens, codec.block_tokens if is_blocked else 0)


def _pages(store: PageStore, count: int) -> _Pages:
    planes, ids = store.view_pages(count)
    return _Pages(planes["codes"], planes.get("affine", planes["codes"]), ids)


@functools.cache
def _compiled(
    key: _Side, value: _Side, softcap: float | None
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Both halves of a step. In one, the compiler would weigh a token anew for each channel."""
    halves = {"weigh": (_weigh, (key, value, softcap)), "add": (_add_values, (value,))}
    weigh, add = (_compile(name, *half) for name, half in halves.items())
    return weigh, add


def _compile(name: str, function: Any, facts: tuple[Any, ...]) -> Any:
    """Compile a function for a layout.

    Dynamo counts recompilations by code object and gives up after a few: each layout has its own.
    """

    def half(*arguments: Any) -> Any:
        return function(*facts, *arguments)

    half.__code__ = half.__code__.replace(co_name=f"{name} {facts}")
    return torch.compile(half, dynamic=True, fullgraph=True)


def _weigh(
    key: _Side,
    value: _Side,
    softcap: float | None,
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    is_exact: Tensor,
    lengths: Tensor,
    key_pages: _Pages,
    value_pages: _Pages,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Turn scaled queries ``[B, H, n, D]`` into weights of value codes and the rest of the output.

    Returns:
        ``[B, pages, H, groups, n, P]`` weights of codes by scale group, tokens in the order of a
        page; and ``[B, H, n, D_v]``: offsets and exact tokens under their weights.
    """
    packed = _packed_scores(query, key, key_pages)  # [B, pages, H, P, n]
    exact = query @ exact_keys.transpose(-1, -2)  # [B, H, n, E]
    if softcap is not None:
        packed, exact = (softcap * torch.tanh(x / softcap) for x in (packed, exact))
    tokens = torch.arange(packed.shape[1] * key.page_tokens).unflatten(0, (-1, key.page_tokens))
    is_packed = tokens < lengths[:, None, None]  # [B, pages, P]
    packed = packed.masked_fill(~is_packed[:, :, None, :, None], -torch.inf)
    exact = exact.masked_fill(~is_exact[:, None, None], -torch.inf)
    maximum = torch.maximum(packed.amax((1, 3)), exact.amax(-1))  # [B, H, n]
    if sink_logits is not None:
        maximum = torch.maximum(maximum, sink_logits)
    maximum = maximum.clamp_min(torch.finfo(torch.float32).min)  # -inf - -inf would be NaN
    packed = torch.exp(packed - maximum[:, None, :, None])
    exact = torch.exp(exact - maximum[..., None])
    total = packed.sum((1, 3)) + exact.sum(-1)
    if sink_logits is not None:
        total = total + torch.exp(sink_logits - maximum)
    total = total.clamp_min(1e-30)
    weights, constant = _value_weights(packed / total[:, None, :, None], value, value_pages)
    groups = constant.shape[-1]
    rest = (exact / total[..., None]) @ exact_values
    rest = rest.unflatten(-1, (groups, -1)) + constant[..., None]
    return weights, rest.flatten(-2)


def _value_weights(packed: Tensor, side: _Side, pages: _Pages) -> tuple[Tensor, Tensor]:
    """Weights of codes, and sums of offsets ``[B, H, n, groups]``."""
    weights = packed.transpose(-1, -2)  # [B, pages, H, n, P]
    if side.is_exact:
        return weights[:, :, :, None].contiguous(), weights.new_zeros(
            *weights[:, 0, ..., 0].shape, 1
        )
    scale, offset = pages.affine[pages.ids].float().unbind(-1)  # [B, pages, H, groups, P]
    constant = (weights[:, :, :, None] * offset[:, :, :, :, None]).sum((1, 5))
    place = packing.value_positions(side.page_tokens).argsort()  # the token at each place
    weights = (weights[:, :, :, None] * scale[:, :, :, :, None])[..., place]
    return weights.contiguous(), constant.transpose(-1, -2)


def _add_values(side: _Side, weights: Tensor, rest: Tensor, pages: _Pages) -> Tensor:
    """``[B, H, n, D_v]``: values under the weights of ``_weigh``, and its rest."""
    codes = pages.codes[pages.ids]
    if not side.is_exact:
        codes = codes.transpose(-1, -2)  # [B, pages, H, P, row bytes]
    groups = _runs(codes, side, weights.shape[3])
    sums = [
        [
            (run * weights[:, :, :, group, head, :, None]).sum(3).sum(1)
            for group, runs in enumerate(groups)
            for run in runs
        ]
        for head in range(weights.shape[4])
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


def _packed_scores(query: Tensor, side: _Side, pages: _Pages) -> Tensor:
    """``[B, H, n, D]`` to scores ``[B, pages, H, P, n]``."""
    query = query[:, None]  # [B, 1, H, n, D]
    codes = pages.codes[pages.ids]  # [B, pages, H, P, row]
    if side.is_exact:
        return _dots(_runs(codes, side, 1)[0], query)
    scale, offset = pages.affine[pages.ids].float().unbind(-1)
    if side.block_tokens:  # of [B, pages, H, blocks, D]; the query takes them, block by block
        weights = query[:, :, :, None] * scale[..., None, :]
        constant = (query[:, :, :, None] * offset[..., None, :]).sum(-1)
        (runs,) = _runs(codes.unflatten(-2, (-1, side.block_tokens)), side, 1)
        return (_dots(runs, weights) + constant[..., None, :]).flatten(3, 4)
    num_groups = scale.shape[3]  # of [B, pages, H, groups, P]
    scores = []
    groups = zip(_runs(codes, side, num_groups), query.chunk(num_groups, -1), strict=True)
    for group, (runs, own) in enumerate(groups):
        factor, shift = scale[..., group, :, None], offset[..., group, :, None]
        scores.append(_dots(runs, own) * factor + own.sum(-1)[..., None, :] * shift)
    return functools.reduce(torch.add, scores)


def _dots(runs: list[Tensor], weights: Tensor) -> Tensor:
    """Products of codes ``[..., P, W]`` by runs with weights ``[..., n, D]``: ``[..., P, n]``."""
    pieces = weights.chunk(len(runs), -1)
    dots = []
    for head in range(weights.shape[-2]):
        parts = [
            (run * piece[..., head, None, :]).sum(-1)
            for run, piece in zip(runs, pieces, strict=True)
        ]
        dots.append(functools.reduce(torch.add, parts))
    return torch.stack(dots, -1)
