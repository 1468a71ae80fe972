"""Measuring what each layer and side can lose: forward KL, and the errors of its own attention.

Forward KL is measured by ``kvbits.evaluation`` on the path that serves the model, with a plan in
which one side of one layer is quantized and everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.calibration.attention import observed_attention
from kvbits.evaluation.corpora import TokenSet
from kvbits.evaluation.divergence import Divergence, Reference, measure, reference_logits
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.plan.modes import Mode, layer_plan
from kvbits.tuning.attention_errors import ErrorSums, LayerErrors
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import EXACT_BITS, SIDES, Pair

if TYPE_CHECKING:
    from kvbits.plan.modes import Settings

KL_RECORDS = "sensitivity.jsonl"
ERROR_RECORDS = "errors.jsonl"
NUM_QUERIES = 64


class Meter:
    """A model with its token sets; the reference of a set is made once, when first needed.

    Args:
        model: A causal language model of transformers.
        token_sets: One per domain.
        mode: What a pair of widths means.
    """

    def __init__(self, model: Any, token_sets: Sequence[TokenSet], mode: Mode) -> None:
        self.model = model
        self.mode = mode
        self.token_sets = {token_set.domain: token_set for token_set in token_sets}
        self.geometry = ModelGeometry.from_config(model.config)
        self._references: dict[str, Reference] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the packable layers: the rows of every table."""
        return self.geometry.packable_layers

    def every_pair(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return a pair for every layer of the model, given those of the packable ones."""
        chosen = dict(zip(self.layers, pairs, strict=True))
        exact = (EXACT_BITS, EXACT_BITS)
        return [chosen.get(layer, exact) for layer in range(self.geometry.num_hidden_layers)]

    def plan(self, pairs: Sequence[Pair]) -> CachePlan:
        """Return the plan that gives every layer of the model its pair."""
        return CachePlan.from_pairs(self.model.config, pairs, mode=self.mode)

    def divergence(self, pairs: Sequence[Pair], domain: str) -> Divergence:
        """Measure a plan (a pair for every layer) against full precision on one domain."""
        token_set = self.token_sets[domain]
        if domain not in self._references:
            self._references[domain] = reference_logits(self.model, token_set)
        return measure(self.model, self.plan(pairs), token_set, self._references[domain])

    def kl_nats(self, pairs: Sequence[Pair]) -> tuple[float, ...]:
        """Return the KL of every domain for one pair per packable layer, nats per token."""
        every = self.every_pair(pairs)
        return tuple(rounded(self.divergence(every, domain).kl_nats) for domain in self.token_sets)

    def document_kl(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """Return, per domain, the KL and that of every document with its counted tokens."""
        every = self.every_pair(pairs)
        return [
            {
                "kl_nats": rounded(result.kl_nats),
                "document_kl_nats": [rounded(value) for value in result.document_kl_nats],
                "document_tokens": list(result.document_tokens),
            }
            for result in (self.divergence(every, domain) for domain in self.token_sets)
        ]


class IsolatedSide(NamedTuple):
    """One measurement of the profile: one side of one layer at one width on one domain."""

    domain: str
    layer: int
    side: str
    bits: int

    def pairs(self, meter: Meter) -> list[Pair]:
        """Return the plan: this side of this layer quantized, all else exact."""
        pair = (self.bits, EXACT_BITS) if self.side == "key" else (EXACT_BITS, self.bits)
        exact = (EXACT_BITS, EXACT_BITS)
        layers = range(meter.geometry.num_hidden_layers)
        return [pair if layer == self.layer else exact for layer in layers]


def profile_kl(
    meter: Meter, widths: Sequence[int], *, run: RunDir, progress: Progress
) -> list[dict[str, Any]]:
    """Measure the isolated forward KL of every side, width and domain; resume where a run stopped.

    Returns:
        The lines of ``sensitivity.jsonl``.
    """
    records = run.records(KL_RECORDS)
    done = {IsolatedSide(r["domain"], r["layer"], r["side"], r["bits"]) for r in records}
    steps = list(_steps(meter, widths))
    progress.start("sensitivity", len(steps))
    progress.advance(len(done))
    for step in steps:
        if step in done:
            continue
        result = meter.divergence(step.pairs(meter), step.domain)
        record = {
            "layer": step.layer,
            "side": step.side,
            "bits": step.bits,
            "mode": meter.mode,
            "domain": step.domain,
            "kl_nats": rounded(result.kl_nats),
            "kl_se": rounded_or_none(result.kl_se),
            "seconds": round(result.seconds, 3),
        }
        run.append(KL_RECORDS, record)
        records.append(record)
        progress.advance()
    progress.finish()
    return records


def _steps(meter: Meter, widths: Sequence[int]) -> Iterator[IsolatedSide]:
    return (
        IsolatedSide(domain, layer, side, bits)
        for domain in meter.token_sets
        for layer in meter.layers
        for side in SIDES
        for bits in widths
    )


def rounded(value: float) -> float:
    """Round to 6 significant digits: the last bits of a sum depend on how it was split."""
    return float(f"{value:.6g}")


def rounded_or_none(value: float) -> float | None:
    """Round as above; None for nan, the standard error of a single document."""
    return None if math.isnan(value) else rounded(value)


def profile_errors(
    meter: Meter, pairs: Sequence[Pair], *, run: RunDir, progress: Progress
) -> list[dict[str, Any]]:
    """Measure e_k, e_v, e_a and e_o of every packable layer and pair on the calibration documents.

    Every document counts the same within its domain, and every domain the same.

    Returns:
        The lines of ``errors.jsonl``.
    """
    records = run.records(ERROR_RECORDS)
    if len(records) == len(meter.layers) * len(pairs):
        return records
    run.file(ERROR_RECORDS).unlink(missing_ok=True)
    means = _mean_errors(meter, pairs, progress)
    records = [
        {
            "layer": layer,
            "pair": list(pair),
            "mode": meter.mode,
            **{n: rounded(v) for n, v in zip(LayerErrors._fields, row.tolist(), strict=True)},
        }
        for layer, of_layer in zip(meter.layers, means, strict=True)
        for pair, row in zip(pairs, of_layer, strict=True)
    ]
    for record in records:
        run.append(ERROR_RECORDS, record)
    return records


def _mean_errors(meter: Meter, pairs: Sequence[Pair], progress: Progress) -> torch.Tensor:
    settings: Settings = {}
    layers = meter.geometry.layers
    plans = [
        [layer_plan(layers[index], [pair], meter.mode, settings) for pair in pairs]
        for index in meter.layers
    ]
    total = sum(token_set.num_documents for token_set in meter.token_sets.values())
    progress.start("attention errors", total)
    domains = []
    for token_set in meter.token_sets.values():
        sums = ErrorSums(plans, meter.layers)
        with observed_attention(meter.model, sums.observe, num_queries=NUM_QUERIES):
            for document in _documents(token_set):
                with torch.no_grad():
                    meter.model(document.to(meter.model.device), use_cache=False)
                progress.advance()
        domains.append(sums.means())
    progress.finish()
    return torch.stack(domains).mean(0)


def _documents(token_set: TokenSet) -> Iterator[torch.Tensor]:
    """Yield each document ``[1, T]`` without its padding: up to the last token that counts."""
    positions = torch.arange(token_set.counted.shape[1])
    lengths = (token_set.counted * positions).amax(1) + 1
    for ids, length in zip(token_set.input_ids, lengths.tolist(), strict=True):
        yield ids[None, :length]
