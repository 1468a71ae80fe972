"""Layer plans: what they refuse, and how many tokens of a row are packed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvbits.codecs import Affine, Identity
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan


def channel(bits, group_size):
    return Affine(bits=bits, granularity="per_channel", group_size=group_size)


def group(*heads):
    return HeadGroup(heads=heads or None, key=Affine(bits=4), value=Affine(bits=4))


plans = st.builds(
    LayerPlan.uniform,
    st.sampled_from([Affine(bits=4), Identity(), *(channel(2, g) for g in (8, 12, 32))]),
    st.sampled_from([Affine(bits=4), Identity(), *(channel(2, g) for g in (8, 12, 32))]),
    sink_tokens=st.integers(0, 10),
    residual_length=st.sampled_from([0, 96, 192]),
    flush=st.sampled_from(["joint", "independent"]),
)


@given(plan=plans, lengths=st.lists(st.integers(0, 600), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_packed_lengths_keep_the_promises_of_the_flush_rule(plan, lengths):
    lengths = np.array(lengths)
    packed = plan.packed_lengths(lengths)
    beyond_sinks = np.maximum(lengths - plan.sink_tokens, 0)
    for side, count in zip(SIDES, packed, strict=True):
        exact = beyond_sinks - count
        assert (count >= 0).all()
        assert (exact >= 0).all()
        assert (count % plan.block_tokens(side) == 0).all(), "only whole blocks are packed"
        if plan.flush == "joint":
            assert (exact[count > 0] >= plan.residual_length).all()
            assert (exact < plan.residual_length + plan.quantum).all()
        elif side == "key":
            assert (exact < max(plan.residual_length, plan.block_tokens("key"))).all()
        else:
            assert (exact < plan.residual_length + plan.block_tokens("value")).all()
    if plan.flush == "joint":
        assert (packed.key == packed.value).all()


@given(plan=plans)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_packed_lengths_never_shrink_as_a_row_grows(plan):
    packed = plan.packed_lengths(np.arange(500))
    for count in packed:
        assert (np.diff(count) >= 0).all()


def test_joint_flush_leaves_in_multiples_of_the_common_quantum():
    plan = LayerPlan.uniform(channel(2, 32), channel(4, 48), residual_length=10, sink_tokens=4)
    assert plan.quantum == 96
    packed = plan.packed_lengths(np.array([4, 109, 110, 205, 206]))
    assert packed.key.tolist() == packed.value.tolist() == [0, 0, 96, 96, 192]


def test_independent_flush_is_the_rule_of_the_papers():
    """Keys leave R at a time, values one by one, so exactly R values are exact."""
    plan = LayerPlan.uniform(
        channel(2, 32), Affine(bits=2), residual_length=128, flush="independent"
    )
    packed = plan.packed_lengths(np.array([127, 128, 129, 255, 256, 300]))
    assert packed.key.tolist() == [0, 128, 128, 128, 256, 256]
    assert packed.value.tolist() == [0, 0, 1, 127, 128, 172]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ()}, "at least 1 item"),
        ({"groups": (group(), group(0))}, "heads must be listed for every group"),
        ({"groups": (group(0, 1), group(1))}, r"list 0..n-1 once each, got \[0, 1, 1\]"),
        ({"groups": (group(0), group(2))}, r"list 0..n-1 once each, got \[0, 2\]"),
        ({"groups": (group(),), "sink_tokens": -1}, "sink_tokens"),
        ({"groups": (group(),), "residual_length": -1}, "residual_length"),
        ({"groups": (group(),), "residual_lenght": 0}, "residual_lenght"),
        ({"groups": (group(),), "flush": "later"}, "flush"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LayerPlan(**fields)


def test_an_empty_head_group_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        HeadGroup(heads=(), key=Affine(bits=4), value=Affine(bits=4))


def test_an_independent_residual_must_hold_whole_key_blocks():
    with pytest.raises(
        ValidationError, match=r"multiple of the key block, 32 tokens.*independent.*got 40"
    ):
        LayerPlan.uniform(channel(2, 32), Affine(bits=2), residual_length=40, flush="independent")


def test_only_identity_on_both_sides_is_exact():
    assert LayerPlan.uniform(Identity(), Identity()).is_exact
    assert not LayerPlan.uniform(Identity(), Affine(bits=8)).is_exact
    assert not LayerPlan.uniform(Affine(bits=8), Identity()).is_exact


def test_grouped_heads_are_counted():
    assert LayerPlan(groups=(group(),)).num_grouped_heads is None
    assert LayerPlan(groups=(group(2, 0), group(1))).num_grouped_heads == 3


@given(plan=plans)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_plan_survives_json(plan):
    assert LayerPlan.model_validate_json(plan.model_dump_json()) == plan


def test_head_groups_survive_json():
    plan = LayerPlan(groups=(group(2, 0), group(1)))
    assert LayerPlan.model_validate_json(plan.model_dump_json()) == plan


def test_a_plan_is_frozen_and_hashable():
    plan = LayerPlan.uniform(Affine(bits=4), Affine(bits=4))
    with pytest.raises(ValidationError, match="frozen"):
        plan.sink_tokens = 3
    assert len({plan, LayerPlan.uniform(Affine(bits=4), Affine(bits=4))}) == 1
