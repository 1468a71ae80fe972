"""KL by position: bins, their sums, and what a measurement makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_helpers import logits_of

from kvbits.evaluation.divergence import measure
from kvbits.evaluation.positions import PositionSums, bin_edges
from kvbits.evaluation.statistics import clustered_mean
from kvbits.plan import CachePlan


def test_edges_double_every_second_step_and_pass_the_longest_document():
    assert bin_edges(50) == [0, 16, 24, 32, 48, 64]
    assert bin_edges(64) == [0, 16, 24, 32, 48, 64, 96]
    assert bin_edges(3) == [0, 16]


def test_a_prediction_falls_in_the_bin_that_holds_its_position():
    sums = PositionSums(2, 40)
    positions = torch.tensor([1, 15, 16, 23, 24, 40])
    sums.add(torch.tensor([0, 1, 0, 0, 1, 1]), positions, torch.arange(6.0))
    found = [(b.start, b.stop, b.kl_nats, b.num_tokens) for b in sums.bins()]
    assert found == [(0, 16, 0.5, 2), (16, 24, 2.5, 2), (24, 32, 4.0, 1), (32, 48, 5.0, 1)]


def test_errors_are_clustered_by_document():
    sums = PositionSums(3, 15)
    documents, kl = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1.0, 2, 4, 1, 1, 3])
    for part in (slice(0, 4), slice(4, 6)):  # chunks of one document add up
        sums.add(documents[part], torch.full((len(kl[part]),), 3), kl[part])
    (found,) = sums.bins()
    assert (found.kl_nats, found.kl_se) == pytest.approx(clustered_mean([3, 4, 5], [2, 1, 3]))
    alone = PositionSums(1, 15)
    alone.add(torch.tensor([0]), torch.tensor([2]), torch.tensor([1.0]))
    assert math.isnan(alone.bins()[0].kl_se)


def test_a_measurement_has_the_mean_of_every_position(model, token_set):
    """Against the definition: KL of every prediction, by the number of tokens in front of it."""
    plan = CachePlan.uniform(model.config, 2, 2)
    found = measure(model, plan, token_set)
    by_bin = {(each.start, each.stop): each for each in found.positions}
    values: dict[int, list[float]] = {}
    for ids, counted in zip(token_set.input_ids, token_set.counted, strict=True):
        p = logits_of(model, ids[None])[0, :-1].double().log_softmax(-1)
        q = logits_of(model, ids[None], plan)[0, :-1].double().log_softmax(-1)
        for column in counted[1:].nonzero()[:, 0].tolist():
            kl = float((p[column].exp() * (p[column] - q[column])).sum())
            values.setdefault(column + 1, []).append(kl)
    assert sum(each.num_tokens for each in found.positions) == found.num_tokens
    for (start, stop), each in by_bin.items():
        here = [kl for at, kls in values.items() if start <= at < stop for kl in kls]
        assert each.num_tokens == len(here)
        # as in test_divergence: codes may flip, since the two run in batches of other shapes
        assert each.kl_nats == pytest.approx(sum(here) / len(here), rel=5e-2)


def test_excess_loss_is_the_logarithm_of_the_perplexities(model, token_set):
    found = measure(model, CachePlan.uniform(model.config, 2, 2), token_set)
    ratio = found.perplexity / found.perplexity_reference
    assert found.excess_nll == pytest.approx(math.log(ratio), abs=1e-9)
    assert found.excess_nll_se > 0
