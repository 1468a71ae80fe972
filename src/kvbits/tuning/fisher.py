"""Fisher-weighted errors: what every codec of every row costs, from one backward pass a document.

For a small error d of what a cache holds, KL(full precision || with d) = ½ dᵀ F d, with F the
Fisher information: the mean of g gᵀ over answers y drawn from the model itself, g the gradient of
log p(y) with respect to what the cache holds. One backward pass gives g of all layers, sides and
heads at once; then any codec costs an encoding and a product. F is taken block by block, a block
being the channels of one head and token: errors of different ones are as good as independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbits.calibration.capture import observe
from kvbits.evaluation.token_set import TokenSet
from kvbits.layer_plan import HeadGroup
from kvbits.tuning.attention_errors import decoded_states
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, rounded
from kvbits.tuning.tables import place_of

RECORDS = "fisher.jsonl"
SEED = 0


class _Document(NamedTuple):
    ids: Tensor  # [T]
    counted: Tensor  # [T] bool


def profile_fisher(meter: Meter, *, run: RunDir, progress: Progress) -> list[dict[str, Any]]:
    """Estimate the forward KL of every row, codec and domain, nats per counted token.

    Returns:
        The lines of ``fisher.jsonl``, which have the form of those of ``sensitivity.jsonl``; a
        domain is measured as a whole, and not again where it is recorded.
    """
    records = run.records(RECORDS)
    candidates, total = meter.candidates, sum(s.num_documents for s in meter.token_sets.values())
    progress.start("fisher", total)
    for domain, token_set in meter.token_sets.items():
        of_domain = [record for record in records if record["domain"] == domain]
        if len(of_domain) == len(candidates.layers) * len(candidates.sides):
            progress.advance(token_set.num_documents)
            continue
        sums = _sums(meter, token_set, progress)
        for row, costs in zip(candidates.layers, sums.tolist(), strict=True):
            for option, cost in zip(candidates.sides, costs, strict=True):
                record = {
                    "layer": row,
                    "side": option.side,
                    "bits": option.bits,
                    "label": option.label,
                    "domain": domain,
                    "kl_nats": rounded(cost / token_set.num_tokens),
                }
                run.append(RECORDS, record)
                records.append(record)
    progress.finish()
    return records


def _sums(meter: Meter, token_set: TokenSet, progress: Progress) -> Tensor:
    """½ Σ (g · d)² over tokens and heads of all documents, ``[rows, sides]``, float64."""
    candidates = meter.candidates
    sums = torch.zeros(len(candidates.layers), len(candidates.sides), dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    for document in _documents(token_set):

        def loss(logits: Tensor, document: _Document = document) -> Tensor:
            return _own_loss(logits, document.counted, generator)

        (seen,) = observe(meter.model, [document.ids], with_gradients=True, loss=loss)
        for i, row in enumerate(candidates.layers):
            layer, head = place_of(row)
            for j, option in enumerate(candidates.sides):
                states, gradients, _ = seen[layer, option.side]
                assert gradients is not None
                part = slice(None) if head is None else slice(head, head + 1)
                group: HeadGroup = option.plan.layers[layer].groups[0]
                exact = states[0, part].float()
                error = decoded_states(group.codec(option.side), exact) - exact
                moved = (error * gradients[0, part].float()).sum(-1).double()  # [H, T]
                sums[i, j] += 0.5 * float(moved.square().sum())
        progress.advance()
    return sums


def _documents(token_set: TokenSet) -> Iterator[_Document]:
    for ids, counted in zip(token_set.documents, token_set.counted, strict=True):
        yield _Document(ids, counted[: len(ids)])


def _own_loss(logits: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    """Minus log p of tokens drawn from the model, ``[T, V]`` to a sum over what counts.

    The text's own next tokens would give the empirical Fisher information, which is larger
    wherever the model is surprised. Draws are made on the CPU, so that they are the same anywhere.
    """
    log_probs = logits[:-1].float().log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
    chosen = log_probs.gather(-1, drawn.to(logits.device))[:, 0]
    return -(chosen * counted[1:].to(logits.device)).sum()
