"""Batches of a token set that fit in memory, and the logits of their counted predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.evaluation.restart import LayerInputs
from kvbits.evaluation.stream import stream_logits
from kvbits.evaluation.token_set import TokenSet

if TYPE_CHECKING:
    from kvbits.plan import CachePlan

MAX_BATCH_TOKENS = 2048  # larger batches are not faster on a CPU
MAX_BATCH_TOKENS_GPU = 2**14  # of a small vocabulary; of others MAX_LOGITS is the bound
MAX_LOGITS = 2**26  # values alive at once, 256 MiB in float32


class DocumentBatch(NamedTuple):
    """Some documents of a set, cut to the tokens that matter.

    Attributes:
        rows: ``[B]`` their indices in the set.
        input_ids: ``[B, T]``, without the last token, which predicts nothing.
        targets: ``[B, T]`` the tokens that are predicted.
        counted: ``[B, T]`` bool, which predictions count.
        chunk_tokens: tokens of a forward pass that keep its logits within bounds.
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    chunk_tokens: int

    @property
    def keep(self) -> torch.Tensor:
        """``[T]`` bool: the positions at which any document counts."""
        return self.counted.any(0)

    @property
    def documents(self) -> torch.Tensor:
        """Index in the set of each counted prediction's document, ``[num_counted]``."""
        return self.rows[self.counted.nonzero()[:, 0]]

    @property
    def positions(self) -> torch.Tensor:
        """Tokens in front of each counted prediction, ``[num_counted]``."""
        return self.counted.nonzero()[:, 1] + 1


def batches(
    token_set: TokenSet, num_logits: int, max_tokens: int = MAX_BATCH_TOKENS
) -> Iterator[DocumentBatch]:
    """Yield the documents in batches of similar length; which, depends on the set and bounds.

    Args:
        token_set: the documents.
        num_logits: width of the model's logits, which bounds the batch.
        max_tokens: tokens of a batch at most.
    """
    counted = token_set.counted
    positions = torch.arange(counted.shape[1])
    lengths = (counted * positions).amax(1) + 1  # tokens up to the last that counts
    order = torch.argsort(lengths, stable=True).tolist()
    batch: list[int] = []
    for row in order:
        length = int(lengths[row])
        if length < 2:
            continue  # nothing of this document counts
        if batch and (len(batch) + 1) * length > min(max_tokens, MAX_LOGITS // num_logits):
            yield _batch(token_set, batch, int(lengths[batch[-1]]), num_logits)
            batch = []
        batch.append(row)
    if batch:
        yield _batch(token_set, batch, int(lengths[batch[-1]]), num_logits)


def _batch(token_set: TokenSet, rows: list[int], length: int, num_logits: int) -> DocumentBatch:
    ids = token_set.input_ids[rows, :length]
    chunk = max(1, min(length, MAX_LOGITS // (num_logits * len(rows))))
    return DocumentBatch(
        torch.tensor(rows), ids[:, :-1], ids[:, 1:], token_set.counted[rows, 1:length], chunk
    )


def max_batch_tokens(model: Any) -> int:
    """Tokens of a batch where a model runs."""
    return MAX_BATCH_TOKENS if model.device.type == "cpu" else MAX_BATCH_TOKENS_GPU


def vocab_size(model: Any) -> int:
    """Return the width of a model's logits."""
    return int(model.get_output_embeddings().weight.shape[0])


def counted_logits(
    model: Any,
    batch: DocumentBatch,
    plan: CachePlan | None = None,
    *,
    start_layer: int = 0,
    layer_inputs: LayerInputs | None = None,
    cache: Any = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Stream a batch and yield, per chunk, the counted predictions.

    Yields:
        Their numbers ``[M]`` in the batch (row by row), their true tokens ``[M]`` and their
        logits ``[M, V]``.
    """
    stream = stream_logits(
        model,
        batch.input_ids,
        plan,
        chunk_tokens=batch.chunk_tokens,
        keep=batch.keep,
        start_layer=start_layer,
        layer_inputs=layer_inputs,
        cache=cache,
    )
    chunks = zip(_chunk_columns(batch), counted_cells(batch), strict=True)
    for (columns, cells), logits in zip(chunks, stream, strict=True):
        mask = batch.counted[:, columns]
        yield cells, batch.targets[:, columns][mask], logits[mask.to(logits.device)]


def counted_cells(batch: DocumentBatch) -> Iterator[torch.Tensor]:
    """Yield, per chunk, the numbers ``[M]`` of its counted predictions in the batch."""
    number = batch.counted.flatten().cumsum(0).reshape(batch.counted.shape) - 1
    for columns in _chunk_columns(batch):
        yield number[:, columns][batch.counted[:, columns]]


def _chunk_columns(batch: DocumentBatch) -> Iterator[torch.Tensor]:
    """Yield the kept positions of each chunk that has any."""
    kept = batch.keep.nonzero()[:, 0]
    for start in range(0, batch.keep.shape[0], batch.chunk_tokens):
        here = kept[(kept >= start) & (kept < start + batch.chunk_tokens)]
        if len(here):
            yield here
