"""Full-precision predictions on a token set, kept once and compared with many plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from kvbits.errors import CalibrationError
from kvbits.evaluation.batching import batches, counted_logits, vocab_size
from kvbits.evaluation.restart import Captured, LayerInputs, capturing
from kvbits.evaluation.token_set import TokenSet

DEFAULT_MAX_BYTES = 2 * 1024**3
_SLICE_VALUES = 2**22  # values of one softmax slice: 16 MiB in float32

Progress = Callable[[int], None]


class Reference(NamedTuple):
    """A model's full-precision predictions on a token set, kept to compare many plans with.

    Attributes:
        checksum: checksum of the token set.
        log_probs: one tensor ``[M, V]`` per batch of the set: float32 on the CPU, natural
            logarithms, one row per counted prediction.
        layer_inputs: what restarting needs, one per batch; None where it was not wanted or cannot
            be had.
        seconds: wall time.
    """

    checksum: str
    log_probs: tuple[torch.Tensor, ...]
    layer_inputs: tuple[LayerInputs | None, ...]
    seconds: float


def reference_logits(
    model: Any,
    token_set: TokenSet,
    *,
    keep_layer_inputs: bool = True,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Progress | None = None,
) -> Reference:
    """Run a set at full precision and keep the log-probabilities of its counted predictions.

    Args:
        model: a causal language model of transformers.
        token_set: the documents.
        keep_layer_inputs: also keep the layers' inputs, so that plans with exact first layers run
            faster.
        max_bytes: most bytes to keep.
        progress: called with the number of documents done.

    Raises:
        CalibrationError: it would take more than ``max_bytes``, or the model's logits are not
            finite.
    """
    started = time.perf_counter()
    _check_bytes(model, token_set, keep_layer_inputs, max_bytes)
    kept, inputs = [], []
    for batch in batches(token_set, vocab_size(model)):
        log_probs = torch.empty(int(batch.counted.sum()), vocab_size(model))
        with capturing(model) if keep_layer_inputs else nullcontext(Captured(0)) as captured:
            for cells, _, logits in counted_logits(model, batch):
                for part in slices(len(cells), logits.shape[-1]):
                    log_probs[cells[part]] = logits[part].float().log_softmax(-1).cpu()
        check_finite(log_probs, "the full-precision model")
        kept.append(log_probs)
        inputs.append(captured.collect())
        if progress is not None:
            progress(len(batch.rows))
    return Reference(token_set.checksum, tuple(kept), tuple(inputs), time.perf_counter() - started)


def slices(num_rows: int, width: int) -> Iterator[slice]:
    """Cut rows of ``width`` values into slices of bounded size, so that no softmax is large."""
    step = max(1, _SLICE_VALUES // width)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def check_finite(values: torch.Tensor, who: str) -> None:
    """Refuse nan and infinity with the name of who made them."""
    if not bool(torch.isfinite(values.sum())):
        raise CalibrationError(f"logits of {who} must be finite, got nan or infinity")


def check_counted(token_set: TokenSet) -> None:
    """Refuse a set of which nothing counts."""
    if token_set.num_tokens == 0:
        raise CalibrationError(
            f"token set {token_set.name!r} must count at least one token, got 0"
        )


def _check_bytes(model: Any, token_set: TokenSet, keep_inputs: bool, max_bytes: int) -> None:
    check_counted(token_set)
    num_tokens = token_set.num_tokens
    needed = num_tokens * vocab_size(model) * 4
    if keep_inputs:
        config = model.config.get_text_config()
        states = config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
        needed += token_set.input_ids.numel() * states
    if needed > max_bytes:
        raise CalibrationError(
            f"the reference of {token_set.name!r} must take at most max_bytes={max_bytes}, "
            f"got {needed} for {num_tokens} tokens of a vocabulary of {vocab_size(model)}; "
            "use fewer or shorter documents, raise max_bytes, or measure without a reference"
        )
