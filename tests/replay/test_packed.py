"""The packed cache makes the choices the replay says, wherever a plan can say the policy."""

from __future__ import annotations

import pytest
import torch

from kvbits import CachePlan
from kvbits.attention.hf import enable
from kvbits.errors import PlanError
from kvbits.replay.harness import replay_example
from kvbits.replay.model import cache_of, entries_of, next_logits
from kvbits.replay.packed import plan_of
from kvbits.replay.run import replay_slice
from kvbits.testing import tiny_model

KIVI = {
    "quantizer_family": "'kivi'",
    "group_size": "16",
    "residual_length": "32",
    "choose_bits": "2",
}
TOKENS = {"choose_axis": "'token'", "residual_length": "7", "sink_tokens": "3", "group_size": "16"}
POLICIES = [
    KIVI,
    TOKENS | {"choose_bits": "3", "clip_ratio": "0.9"},
    TOKENS | {"choose_bits": "2 + 2 * a[2]"},
    {"choose_axis": "'channel'", "group_size": "8", "residual_length": "5", "choose_bits": "2"},
    {"residual_length": "0", "choose_bits": "2"},
    TOKENS | {"choose_bits": "2 if a[0] == 1 else 16"},
]


@pytest.mark.parametrize("mode", ["teacher", "free"])
@pytest.mark.parametrize("hooks", POLICIES)
def test_the_packed_cache_chooses_the_same_tokens(workload, policy_file, hooks, mode):
    made = workload(policy_file(**hooks), mode=mode, budget_bits=16)
    outcome = replay_slice(made, packed=True)
    assert outcome.agreement.refused == {}
    assert outcome.agreement.num_steps == outcome.metrics["num_steps"] == 10
    assert outcome.agreement.num_agreed == 10
    assert outcome.metrics["kl_nats"] > 0


@torch.no_grad()
def test_what_is_packed_is_what_the_replay_decoded(workload, policy_file):
    """Not the choices alone: the states of the cache are as far from the exact ones."""
    made = workload(policy_file(**KIVI))
    example = made.slice.examples[0]
    result = replay_example(made, example)
    plan = plan_of(result, made.model.config)
    cache, exact = plan.new_cache(made.model, impl="reference"), cache_of([])
    with enable(made.model):
        next_logits(made.model, made.ids(example), cache)
    next_logits(made.model, made.ids(example), exact)
    entries = entries_of(exact)
    for layer, packed in cache.packed_layers.items():
        for side, index in (("key", layer), ("value", 3 + layer)):
            states = packed.states().dense(side, 0, packed.num_tokens)
            error = torch.linalg.vector_norm(states - entries[index])
            error = error / torch.linalg.vector_norm(entries[index])
            record = result.steps[0].tensors[index]
            assert error.item() == pytest.approx(record.error, rel=1e-6)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"choose_bits": "2 + a[4]['step'] % 2"}, "bits must be the same in every step"),
        (TOKENS | {"choose_bits": "5"}, "bits must be 2, 3, 4, 8 or 16"),
        (TOKENS | {"symmetric": "True"}, "quantizer_family must round between"),
        (TOKENS | {"outliers_ratio": "0.1"}, "quantizer_family must round between"),
        (TOKENS | {"group_size": "0"}, "group_size must be at least 1"),
        (TOKENS | {"group_size": "64"}, "group_size must divide head_dim"),
        ({"residual_length": "8"}, "axes must be flushed as a plan can"),
        (TOKENS | {"sink_tokens": "len(a[1])"}, "sink_tokens must be the same on both sides"),
    ],
)
def test_what_no_plan_can_say_is_left_out_with_the_reason(workload, policy_file, hooks, message):
    made = workload(policy_file(**hooks), budget_bits=8)
    outcome = replay_slice(made, packed=True)
    assert outcome.agreement.num_steps == 0
    assert all(message in reason for reason in outcome.agreement.refused.values())
    with pytest.raises(PlanError, match=message):
        plan_of(outcome.examples[0], made.model.config)


def test_a_tuned_plan_is_a_policy_too(workload, tiny, tmp_path):
    pairs = [(4, 2), (3, 4), (2, 2)]
    settings = {"residual_length": 16, "sink_tokens": 2, "group_size": 16}
    plan = CachePlan.from_pairs(tiny[0].config, pairs, "per_token", **settings)
    plan.save(tmp_path / "plan.json")
    made = workload(tmp_path / "plan.json")
    one = made.slice._replace(examples=made.slice.examples[:1])
    outcome = replay_slice(made._replace(slice=one), packed=True)
    assert outcome.agreement.num_agreed == 5
    chosen = [tensor.chosen for tensor in outcome.examples[0].steps[0].tensors]
    assert chosen == [(4, 4), (3, 3), (2, 2), (2, 2), (4, 4), (2, 2)]
    assert all(each.sink_tokens == 2 for each in outcome.examples[0].settings)
    with pytest.raises(PlanError, match=r"model must have"):
        replay_slice(made._replace(model=tiny_model("qwen2")))
