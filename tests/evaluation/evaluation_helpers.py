"""What several test files of the evaluation share."""

from __future__ import annotations

import torch

from kvbits.evaluation.stream import stream_logits
from kvbits.plan import CachePlan


def logits_of(model, ids, plan=None, **settings):
    return torch.cat(list(stream_logits(model, ids, plan, **settings)), dim=1)


def one_layer(model, layer, pair=(2, 2), mode="per_token"):
    pairs = [(16, 16)] * model.config.num_hidden_layers
    pairs[layer] = pair
    return CachePlan.from_pairs(model.config, pairs, mode)
