"""The attention op over a layer's states, and the choice between its implementations."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvbits.attention import compiled, reference
from kvbits.attention.states import KernelStates, LayerStates, StepStates, store_groups
from kvbits.attention.triton import support
from kvbits.errors import KernelUnavailableError
from kvbits.layer_plan import LayerPlan

Impl = Literal["auto", "reference", "triton", "compiled"]
KERNEL_IMPLS = ("auto", "triton")
IMPLS: tuple[Impl, ...] = get_args(Impl)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def attend(
    query: Tensor,
    states: LayerStates | StepStates,
    mask: Tensor | None,
    scale: float,
    *,
    is_plain: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute softmax(scale · query · keysᵀ + mask) · values over one layer's states.

    Args:
        query: ``[B, H_q, Q, D]``; the newest Q tokens of the cache.
        states: Keys and values; what made them decided whether kernels run.
        mask: As for ``reference.attend``. None: causal.
        scale: Factor on the scores.
        is_plain: Whether the mask is no more than causality, the window and the padding that the
            states know of, so that a kernel need not read it.
        softcap: If given, scores become ``softcap * tanh(scores / softcap)`` before the mask.
        window: Newest tokens a query sees, its own included; a mask must say the same.
        sink_logits: ``[H_q]`` extra logits that take part in the softmax and have no value.

    Returns:
        ``[B, Q, H_q, D_v]`` in the dtype of ``query``.

    Raises:
        KernelUnavailableError: If the cache was made with ``impl="triton"`` and no kernel takes
            the call.
    """
    kernel = None
    if states.impl in KERNEL_IMPLS:
        reason = _unsupported_call(query, states, mask is None or is_plain)
        if reason is None:
            kernel = states.kernel if isinstance(states, StepStates) else chunk_states(states)
            reason = None if kernel else "queries that see different tokens decoded"
        if reason and states.impl == "triton":
            raise KernelUnavailableError(
                f"impl='triton' must be given a call kernels can run, got {reason}; "
                "pass impl='auto' to new_cache"
            )
    if kernel is not None:
        from kvbits.attention.triton.decode import attend as attend_packed

        return attend_packed(
            query, kernel, scale, softcap=softcap, window=window, sink_logits=sink_logits
        )
    whole = states.resolve() if isinstance(states, StepStates) else states
    if states.impl == "compiled" and _is_step(whole, mask is None or is_plain, window):
        step = compiled.attend(query, whole, scale, softcap=softcap, sink_logits=sink_logits)
        return step.transpose(1, 2)
    output = reference.attend(
        query, whole, mask, scale, softcap=softcap, window=window, sink_logits=sink_logits
    )
    return output.transpose(1, 2).contiguous()


def _is_step(states: LayerStates, is_plain: bool, window: int | None) -> bool:
    """Whether a call is a decode step over all of a layer that has as much packed of each side."""
    sees_all = window is None or int(states.row_lengths.max(initial=0)) <= window
    packed = [side.stores[0][0].lengths for side in (states.key, states.value)]
    is_even = packed[0] == packed[1] and max(packed[0]) > 0
    return states.num_queries == 1 and is_plain and sees_all and is_even


def _unsupported_call(
    query: Tensor, states: LayerStates | StepStates, is_plain: bool
) -> str | None:
    if not is_plain:
        return "a mask that is not causal with left padding"
    if query.dtype not in KERNEL_DTYPES:
        return f"a query of {query.dtype}"
    return support.unsupported_heads(query.shape[1] // states.num_heads)


def chunk_states(states: LayerStates) -> KernelStates | None:
    """A chunk's states as kernels take them, or None if its queries differ in what they see."""
    sides = (states.key, states.value)
    num_sinks = states.key.sinks.shape[-2]
    until = states.key.decoded_until
    if any((side.decoded_until != until[:, :1]).any() for side in sides):
        return None
    lengths = states.row_lengths
    packed = np.maximum(np.minimum(until[:, 0], lengths) - num_sinks, 0)
    # Pages may hold more by now, of the chunk itself: its queries see that exact, in the tail.
    device = states.key.tail.device
    clock, padding, floor = (
        torch.tensor(list(x), dtype=torch.int32).to(device, non_blocking=True)
        for x in ([states.num_tokens], states.padding, packed.tolist())
    )
    return KernelStates(
        groups=store_groups(states.key.stores, states.value.stores),
        sinks=(states.key.sinks, states.value.sinks),
        tails=(states.key.tail.contiguous(), states.value.tail.contiguous()),
        is_ring=False,
        clock=clock,
        padding=padding,
        floor=floor,
        is_held=True,
        residual_length=0,
        quantum=1,
        packed=packed.tolist(),
    )


def resolve_impl(
    impl: Impl,
    plan: LayerPlan,
    *,
    key_head_dim: int,
    value_head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Impl:
    """Decide what may run one layer: ``reference``, or ``impl`` as given.

    Raises:
        ValueError: If ``impl`` is unknown.
        KernelUnavailableError: If ``triton`` or ``compiled`` cannot run the layer.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return impl
    if impl == "compiled":
        reason = compiled.unavailable(plan, device)
    else:
        reason = unavailable(device, interpreted=impl == "triton")
        if reason is None and dtype not in KERNEL_DTYPES:
            reason = f"states must be bfloat16 or float16, got {dtype}"
        reason = reason or support.unsupported(plan, key_head_dim, value_head_dim)
    if reason is None:
        return impl
    if impl == "auto":
        return "reference"
    raise KernelUnavailableError(
        f"impl={impl!r} cannot run this layer: {reason}; pass impl='auto' or 'reference'"
    )


def unavailable(device: torch.device, *, interpreted: bool = False) -> str | None:
    """Why kernels cannot run on a device, or None.

    Args:
        device: Where the states are.
        interpreted: Whether Triton's interpreter, on a CPU, counts as running them.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton must be installed, got no such module"
    if device.type == "cuda":
        return None
    if interpreted and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"states must be on a CUDA device, got {device.type!r}"
