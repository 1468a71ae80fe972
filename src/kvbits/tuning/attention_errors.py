"""KVTuner's layer errors: what quantized keys and values do to one layer's own attention.

The errors come from one full-precision forward over each calibration document, in which every
layer's attention also computes itself with decoded keys and values. Only sums are kept, so memory
does not grow with the number of documents. The signal is cheap and needs no output of the model;
what an error in one layer does to the prediction, only the forward KL (``sensitivity.py``) says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvbits.calibration.attention import Observed
from kvbits.codecs import Codec, EncodeContext
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.layer_plan import LayerPlan
from kvbits.tuning.tables import Row, place_of

# |x| below this share of the tensor's mean |x| counts as that share: a relative error has no
# finite mean where values cross zero, and a few such elements would otherwise decide everything.
DENOMINATOR_FLOOR = 1e-2


class LayerErrors(NamedTuple):
    """Mean errors of one pair of codecs in one layer."""

    e_k: float  # relative error of keys
    e_v: float  # relative error of values
    e_a: float  # absolute error of attention weights
    e_o: float  # relative error of the attention output


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

    def __init__(self, plans: Sequence[Sequence[LayerPlan]], layers: Sequence[Row]) -> None:
        self._plans = {layer: list(row) for layer, row in zip(layers, plans, strict=True)}
        self._rows: dict[int, list[Row]] = {}
        for row in layers:
            self._rows.setdefault(place_of(row).layer, []).append(row)
        shape = (len(layers), len(plans[0]), len(LayerErrors._fields))
        self._sums = dict(zip(layers, torch.zeros(shape, dtype=torch.float64), strict=True))
        self._documents = dict.fromkeys(layers, 0)

    def observe(self, observed: Observed) -> None:
        """Add one layer's errors over one document; layers that were not asked for are skipped."""
        for row in self._rows.get(observed.layer_idx, ()):
            head = place_of(row).head
            seen = observed if head is None else observed.of_head(head)
            errors = torch.tensor(layer_errors(seen, self._plans[row]), dtype=torch.float64)
            if not bool(errors.isfinite().all()):
                raise CalibrationError(
                    f"states of layer {observed.layer_idx} must be finite, got nan or infinity"
                )
            self._sums[row] += errors
            self._documents[row] += 1

    def means(self) -> Tensor:
        """Return the means over documents, ``[L, P, 4]``, float64.

        Raises:
            UnsupportedModelError: A layer never attended where it can be seen.
        """
        unseen = [layer for layer, number in self._documents.items() if not number]
        if unseen:
            raise UnsupportedModelError(
                "model must attend by transformers' attention interface for the errors of its "
                f"attention to be seen, got nothing of layer {unseen[0]}"
            )
        return torch.stack([s / self._documents[layer] for layer, s in self._sums.items()])
