"""Measuring what each layer and side can lose: forward KL, and the errors of its own attention.

Forward KL is measured by ``kvbits.evaluation`` on the path that serves the model, with a plan in
which one side of one layer is quantized and everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kvbits.calibration.attention import observed_attention
from kvbits.calibration.placement import input_device
from kvbits.evaluation.corpora import TokenSet
from kvbits.evaluation.divergence import Divergence, Reference, measure, reference_logits
from kvbits.plan import CachePlan
from kvbits.tuning.attention_errors import ErrorSums, LayerErrors
from kvbits.tuning.candidates import Candidates, SideOption
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Choice, Row
from kvbits.tuning.team import Alone, Kind, Team

KL_RECORDS = "sensitivity.jsonl"
ERROR_RECORDS = "errors.jsonl"
SENSITIVITY, ERRORS = Kind("sensitivity", ("kl_nats",)), Kind("errors")
NUM_QUERIES = 64


class Meter:
    """A model with its token sets; the reference of a set is made once, when first needed.

    Args:
        model: A causal language model of transformers.
        token_sets: One per domain.
        candidates: What the columns of a choice mean.
    """

    def __init__(self, model: Any, token_sets: Sequence[TokenSet], candidates: Candidates) -> None:
        self.model = model
        self.candidates = candidates
        self.token_sets = {token_set.domain: token_set for token_set in token_sets}
        self._references: dict[str, Reference] = {}

    def divergence(self, plan: CachePlan, domain: str) -> Divergence:
        """Measure a plan against full precision on one domain."""
        token_set = self.token_sets[domain]
        if domain not in self._references:
            self._references[domain] = reference_logits(self.model, token_set)
        return measure(self.model, plan, token_set, self._references[domain])

    def document_kl(self, choice: Choice) -> list[dict[str, Any]]:
        """Return, per domain, the KL and that of every document with its counted tokens."""
        plan = self.candidates.plan(choice)
        return [
            {
                "kl_nats": rounded(result.kl_nats),
                "document_kl_nats": [rounded(value) for value in result.document_kl_nats],
                "document_tokens": list(result.document_tokens),
            }
            for result in (self.divergence(plan, domain) for domain in self.token_sets)
        ]


class IsolatedSide(NamedTuple):
    """One measurement of the profile: one codec of one layer on one domain, all else exact."""

    domain: str
    layer: Row
    label: str


def profile_kl(
    meter: Meter, *, run: RunDir, progress: Progress, team: Team | None = None
) -> list[dict[str, Any]]:
    """Measure the isolated forward KL of every layer, codec and domain; resume a stopped run.

    Returns:
        The lines of ``sensitivity.jsonl``.
    """
    records = run.records(KL_RECORDS)
    known = {IsolatedSide(r["domain"], r["layer"], r["label"]): r for r in records}
    steps = dict(_steps(meter))
    progress.start("sensitivity", len(steps))
    progress.advance(len(known))
    measured = (team or Alone()).measure(
        SENSITIVITY, steps, lambda step: _measure_side(meter, step, steps[step]), known
    )
    for _, record in measured:
        run.append(KL_RECORDS, record)
        records.append(dict(record))
        progress.advance()
    progress.finish()
    return records


def _measure_side(meter: Meter, step: IsolatedSide, option: SideOption) -> dict[str, Any]:
    result = meter.divergence(meter.candidates.isolated(step.layer, option), step.domain)
    return {
        "layer": step.layer,
        "side": option.side,
        "bits": option.bits,
        "label": option.label,
        "domain": step.domain,
        "kl_nats": rounded(result.kl_nats),
        "kl_se": rounded_or_none(result.kl_se),
        "seconds": round(result.seconds, 3),
    }


def _steps(meter: Meter) -> Iterator[tuple[IsolatedSide, SideOption]]:
    return (
        (IsolatedSide(domain, layer, option.label), option)
        for domain in meter.token_sets
        for layer in meter.candidates.layers
        for option in meter.candidates.sides
    )


def rounded(value: float) -> float:
    """Round to 6 significant digits: the last bits of a sum depend on how it was split."""
    return float(f"{value:.6g}")


def rounded_or_none(value: float) -> float | None:
    """Round as above; None for nan, the standard error of a single document."""
    return None if math.isnan(value) else rounded(value)


def profile_errors(
    meter: Meter, *, run: RunDir, progress: Progress, team: Team | None = None
) -> list[dict[str, Any]]:
    """Measure e_k, e_v, e_a and e_o of every layer and candidate on the calibration documents.

    Every document counts the same within its domain, and every domain the same.

    Returns:
        The lines of ``errors.jsonl``.
    """
    layers, columns = meter.candidates.layers, meter.candidates.columns
    records = run.records(ERROR_RECORDS)
    if len(records) == len(layers) * len(columns):
        return records
    run.file(ERROR_RECORDS).unlink(missing_ok=True)
    means = _mean_errors(meter, progress, team or Alone())
    records = [
        {
            "layer": layer,
            "label": column.label,
            **{n: rounded(v) for n, v in zip(LayerErrors._fields, row.tolist(), strict=True)},
        }
        for layer, of_layer in zip(layers, means, strict=True)
        for column, row in zip(columns, of_layer, strict=True)
    ]
    for record in records:
        run.append(ERROR_RECORDS, record)
    return records


def _mean_errors(meter: Meter, progress: Progress, team: Team) -> torch.Tensor:
    total = sum(token_set.num_documents for token_set in meter.token_sets.values())
    progress.start("attention errors", total)
    measured_here: set[str] = set()

    def one(domain: str) -> dict[str, Any]:
        measured_here.add(domain)
        return {"means": _domain_errors(meter, domain, progress).tolist()}

    found = {}
    for domain, record in team.measure(ERRORS, meter.token_sets, one, {}):
        found[domain] = torch.tensor(record["means"], dtype=torch.float64)
        if domain not in measured_here:
            progress.advance(meter.token_sets[domain].num_documents)
    progress.finish()
    return torch.stack([found[domain] for domain in meter.token_sets]).mean(0)


def _domain_errors(meter: Meter, domain: str, progress: Progress) -> torch.Tensor:
    """Mean errors over the documents of a domain, ``[L, P, 4]``."""
    candidates = meter.candidates
    plans = [
        [candidates.layer_plan(layer, column) for column in range(len(candidates.columns))]
        for layer in candidates.layers
    ]
    sums = ErrorSums(plans, candidates.layers)
    with observed_attention(meter.model, sums.observe, num_queries=NUM_QUERIES):
        for document in _documents(meter.token_sets[domain]):
            with torch.no_grad():
                meter.model(document.to(input_device(meter.model)), use_cache=False)
            progress.advance()
    return sums.means()


def _documents(token_set: TokenSet) -> Iterator[torch.Tensor]:
    """Yield each document ``[1, T]`` without its padding: up to the last token that counts."""
    positions = torch.arange(token_set.counted.shape[1])
    lengths = (token_set.counted * positions).amax(1) + 1
    for ids, length in zip(token_set.input_ids, lengths.tolist(), strict=True):
        yield ids[None, :length]
