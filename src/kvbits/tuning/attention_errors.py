"""KVTuner's layer errors: what quantized keys and values do to one layer's own attention.

The errors come from one full-precision forward over each calibration document, in which every
layer's attention also computes itself with decoded keys and values. Only sums are kept, so memory
does not grow with the number of documents. The signal is cheap and needs no output of the model;
what an error in one layer does to the prediction, only the forward KL (``sensitivity.py``) says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvbits.codecs import Codec, EncodeContext
from kvbits.errors import CalibrationError
from kvbits.layer_plan import LayerPlan

OBSERVER_NAME = "kvbits_observe"
QUERY_CHUNK = 256
# |x| below this share of the tensor's mean |x| counts as that share: a relative error has no
# finite mean where values cross zero, and a few such elements would otherwise decide everything.
DENOMINATOR_FLOOR = 1e-2

Observer: TypeAlias = Callable[["Observed"], None]


class Observed(NamedTuple):
    """One layer's attention over one document, at full precision."""

    layer_idx: int
    query: Tensor  # [H_q, Q, D], a sample of the positions
    key_states: Tensor  # [H_kv, T, D], as they enter the cache
    value_states: Tensor  # [H_kv, T, D_v]
    mask: Tensor  # [Q, T], additive
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None  # [H_q]

    def weights(self, key_states: Tensor) -> Tensor:
        """Return the attention weights ``[H_q, Q, T]`` over the given keys, float32."""
        return attention_weights(
            self.query, key_states, self.mask, self.scaling, self.softcap, self.sink_logits
        )


class LayerErrors(NamedTuple):
    """Mean errors of one pair of codecs in one layer."""

    e_k: float  # relative error of keys
    e_v: float  # relative error of values
    e_a: float  # absolute error of attention weights
    e_o: float  # relative error of the attention output


def attention_weights(
    query: Tensor,
    key_states: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return softmax(q Kᵀ scaling + mask), ``[..., H_q, Q, T]``.

    ``softcap`` is Gemma 2's cap on the scores, ``sink_logits`` GPT-OSS's extra column.
    """
    repeats = query.shape[-3] // key_states.shape[-3]
    keys = key_states.float().repeat_interleave(repeats, dim=-3)
    scores = (query.float() * scaling) @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.float()
    if sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_logits.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


@contextmanager
def observed_attention(model: Any, observer: Observer, *, num_queries: int) -> Iterator[None]:
    """Run the model's attention in plain PyTorch and show every layer's states to ``observer``.

    Args:
        model: A transformers decoder that follows the attention interface.
        observer: Called once per layer and forward; batches must hold one document.
        num_queries: Most query positions to show, evenly spaced, the last one included.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        picked = _sample_positions(query.shape[2], num_queries)
        mask = attention_mask[0, 0, :, : key.shape[2]]
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        observer(
            Observed(
                layer_idx,
                query[0, :, picked],
                key[0],
                value[0],
                mask[picked],
                scale,
                softcap,
                s_aux,
            )
        )
        repeats = query.shape[1] // value.shape[1]
        values = value.float().repeat_interleave(repeats, dim=1)
        parts = [
            attention_weights(q, key, m, scale, softcap, s_aux) @ values
            for q, m in zip(
                query.split(QUERY_CHUNK, dim=2), mask.split(QUERY_CHUNK, dim=0), strict=True
            )
        ]
        return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(OBSERVER_NAME, attend)
    AttentionMaskInterface.register(OBSERVER_NAME, eager_mask)
    former = model.config._attn_implementation
    model.set_attn_implementation(OBSERVER_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(former)


def _sample_positions(num_positions: int, limit: int) -> Tensor:
    count = min(num_positions, limit)
    return torch.linspace(num_positions / count - 1, num_positions - 1, count).round().long()


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """Return mean(|x - x^| / max(|x|, floor)), floor = ``DENOMINATOR_FLOOR`` x mean |x|."""
    magnitude = exact.float().abs()
    floor = DENOMINATOR_FLOOR * magnitude.mean()
    error = (exact.float() - approximate.float()).abs()
    return float((error / magnitude.clamp_min(max(float(floor), 1e-30))).mean())


def decoded_states(codec: Codec, states: Tensor) -> Tensor:
    """Encode and decode the whole blocks of ``[H_kv, T, D]``; the rest stays exact."""
    whole = states.shape[1] - states.shape[1] % codec.block_tokens
    if whole == 0 or codec.is_exact:
        return states.float()
    context = EncodeContext(torch.arange(whole, device=states.device)[None])
    decoded = codec.decode(codec.encode(states[None, :, :whole].float(), context), context)[0]
    return torch.cat([decoded.float(), states[:, whole:].float()], dim=1)


def layer_errors(observed: Observed, plans: Sequence[LayerPlan]) -> list[LayerErrors]:
    """Measure several pairs of codecs on one layer's attention over one document.

    e_k = mean |K - K^| / |K|, e_v likewise; a = softmax(q Kᵀ / sqrt(D)), e_a = mean |a - a^| over
    the positions the mask lets a query see; o = a V, e_o = mean |o - o^| / |o|.

    Source: KVTuner (arXiv 2502.04420), the four error metrics.
    Differs from the paper: relative errors have a floor under the denominator; queries are evenly
    spaced over the document instead of the decoding steps only.
    """
    keys, values, weights, errors = observed.key_states, observed.value_states, {}, []
    exact_weights = observed.weights(keys)
    exact_output = _output(exact_weights, values)
    visible = (observed.mask > torch.finfo(observed.mask.dtype).min / 2).expand_as(exact_weights)
    for plan in plans:
        group = plan.groups[0]
        new_keys, new_values = decoded_states(group.key, keys), decoded_states(group.value, values)
        if group.key not in weights:
            weights[group.key] = observed.weights(new_keys)
        new_weights = weights[group.key]
        errors.append(
            LayerErrors(
                e_k=relative_error(keys, new_keys),
                e_v=relative_error(values, new_values),
                e_a=float((exact_weights - new_weights).abs()[visible].mean()),
                e_o=relative_error(exact_output, _output(new_weights, new_values)),
            )
        )
    return errors


def _output(weights: Tensor, value_states: Tensor) -> Tensor:
    repeats = weights.shape[-3] // value_states.shape[-3]
    return weights @ value_states.float().repeat_interleave(repeats, dim=-3)


class ErrorSums:
    """Running means of the errors, ``[L, P, 4]``, over the documents of one domain."""

    def __init__(self, plans: Sequence[Sequence[LayerPlan]], layers: Sequence[int]) -> None:
        self._plans = {layer: list(row) for layer, row in zip(layers, plans, strict=True)}
        shape = (len(layers), len(plans[0]), len(LayerErrors._fields))
        self._sums = dict(zip(layers, torch.zeros(shape, dtype=torch.float64), strict=True))
        self._documents = dict.fromkeys(layers, 0)

    def observe(self, observed: Observed) -> None:
        """Add one layer's errors over one document; layers that were not asked for are skipped."""
        if observed.layer_idx not in self._plans:
            return
        errors = torch.tensor(
            layer_errors(observed, self._plans[observed.layer_idx]), dtype=torch.float64
        )
        if not bool(errors.isfinite().all()):
            raise CalibrationError(
                f"states of layer {observed.layer_idx} must be finite, got nan or infinity"
            )
        self._sums[observed.layer_idx] += errors
        self._documents[observed.layer_idx] += 1

    def means(self) -> Tensor:
        """Return the means over documents, ``[L, P, 4]``, float64."""
        return torch.stack([s / self._documents[layer] for layer, s in self._sums.items()])
