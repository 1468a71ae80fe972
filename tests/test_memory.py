"""The formulas equal what a live page store and a live layer allocate, byte for byte."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvbits import memory
from kvbits.cache.layer import PackedLayer
from kvbits.codecs import Affine, AnyCodec, Identity
from kvbits.codecs.pages import PageStore
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import HeadGroup, LayerPlan

FULL = LayerGeometry(
    layer_type="full_attention", num_key_value_heads=2, key_head_dim=16, value_head_dim=8
)
DTYPES = {16: torch.bfloat16, 32: torch.float32}

widths = st.sampled_from([2, 3, 4, 8])
per_token = st.builds(
    Affine,
    bits=widths,
    group_size=st.sampled_from([None, 8]),
    symmetric=st.booleans(),
    parameter_dtype=st.sampled_from(["float16", "float32"]),
)
per_channel = st.builds(
    Affine,
    bits=widths,
    granularity=st.just("per_channel"),
    group_size=st.sampled_from([16, 32, 48, 128]),
)
key_codecs = st.one_of(per_token, per_channel, st.just(Identity()))
value_codecs = st.one_of(per_token, st.just(Identity()))


@st.composite
def layer_plans(draw: st.DrawFn) -> LayerPlan:
    """One or two head groups, both flush rules, sinks and residual."""
    pairs = draw(st.lists(st.tuples(key_codecs, value_codecs), min_size=1, max_size=2))
    groups = [
        HeadGroup(heads=(head,) if len(pairs) > 1 else None, key=key, value=value)
        for head, (key, value) in enumerate(pairs)
    ]
    plan = LayerPlan(
        groups=tuple(groups),
        sink_tokens=draw(st.sampled_from([0, 1, 5])),
        residual_length=draw(st.sampled_from([0, 7, 32])),
    )
    if draw(st.booleans()):
        residual = plan.block_tokens("key") * draw(st.integers(1, 2))
        update = {"flush": "independent", "residual_length": residual}
        plan = LayerPlan.model_validate(plan.model_dump() | update)
    return plan


def random_states(
    layer: LayerGeometry, batch: int, num_tokens: int, bits: int
) -> list[torch.Tensor]:
    return [
        torch.randn(batch, layer.num_key_value_heads, num_tokens, width).to(DTYPES[bits])
        for width in (layer.key_head_dim, layer.value_head_dim)
    ]


@settings(max_examples=60, deadline=None)
@given(
    codec=key_codecs,
    blocks=st.integers(0, 9),
    batch=st.integers(1, 3),
    state_bits=st.sampled_from([16, 32]),
)
def test_store_formula_equals_allocation(codec, blocks, batch, state_bits):
    store = PageStore(
        codec,
        side="key",
        num_heads=2,
        head_dim=16,
        num_rows=batch,
        dtype=DTYPES[state_bits],
        device=torch.device("cpu"),
    )
    num_tokens = blocks * codec.block_tokens
    if num_tokens:
        store.append(torch.zeros(batch, 2, num_tokens, 16, dtype=DTYPES[state_bits]))
    expected = memory.store_bytes(
        codec, num_tokens, num_heads=2, head_dim=16, batch=batch, state_bits=state_bits
    )
    assert store.nbytes == expected


@settings(max_examples=60, deadline=None)
@given(
    plan=layer_plans(),
    chunks=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    batch=st.sampled_from([1, 3]),
    state_bits=st.sampled_from([16, 32]),
    room=st.sampled_from([None, 1, 130, 400]),
)
def test_layer_formula_equals_allocation_after_every_chunk(plan, chunks, batch, state_bits, room):
    assume(room or not plan.is_exact)  # those are stock layers, which have no pages
    layer, num_tokens = PackedLayer(plan, max_tokens=room), 0
    for chunk in chunks:
        layer.update(*random_states(FULL, batch, chunk, state_bits))
        num_tokens += chunk
        expected = memory.layer_bytes(plan, FULL, num_tokens, batch, state_bits, room)
        assert layer.nbytes == expected


@settings(max_examples=50, deadline=None)
@given(plan=layer_plans())
def test_effective_bits_are_the_long_context_limit_of_allocated_bytes(plan):
    """Pages, their table, residual and sinks are all that separates the two."""
    context = 2**20
    allocated = Fraction(
        8 * memory.layer_bytes(plan, FULL, context), context * FULL.values_per_token
    )
    limit = memory.layer_effective_bits(plan, FULL)
    spare = Fraction(1, 16)  # the pool grows by a sixteenth
    table = Fraction(len(plan.groups) * 2 * 32, 64 * FULL.values_per_token)
    slack = 1 + spare + Fraction(1, 100)
    assert limit <= allocated <= (limit + table) * slack


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (Affine(bits=4), 4 + Fraction(32, 16)),
        (Affine(bits=4, group_size=8), 4 + Fraction(32, 8)),
        (Affine(bits=2, granularity="per_channel", group_size=32), Fraction(3)),
        (Affine(bits=3, symmetric=True), 3 + Fraction(16, 16)),
        (Affine(bits=8, parameter_dtype="float32"), 8 + Fraction(64, 16)),
        (Identity(), Fraction(16)),
    ],
)
def test_effective_bits_count_scale_and_offset(codec: AnyCodec, bits: Fraction):
    layer = FULL.model_copy(update={"value_head_dim": 16})
    assert memory.layer_effective_bits(LayerPlan.uniform(codec, codec), layer) == bits


def test_wider_side_weighs_more():
    plan = LayerPlan.uniform(Identity(), Affine(bits=4, granularity="per_channel", group_size=32))
    expected = (16 * Fraction(16) + 8 * Fraction(5)) / 24
    assert memory.layer_effective_bits(plan, FULL) == expected


@pytest.mark.parametrize(("num_tokens", "kept"), [(1, 1), (15, 15), (16, 15), (1000, 15)])
def test_sliding_layer_stops_growing_at_its_window(num_tokens, kept):
    layer = FULL.model_copy(update={"layer_type": "sliding_attention", "sliding_window": 16})
    assert memory.exact_bytes(layer, num_tokens, batch=2) == 2 * kept * 48 * 2


def test_exact_layer_costs_what_the_stock_layer_does():
    plan = LayerPlan.uniform(Identity(), Identity(), residual_length=8)
    assert memory.layer_bytes(plan, FULL, 100, batch=3) == 3 * 100 * 48 * 2


def test_layer_without_states_costs_nothing():
    layer = FULL.model_copy(update={"layer_type": "linear_attention"})
    assert memory.exact_bytes(layer, 100) == 0


def test_page_holds_all_tokens_of_all_heads():
    codec = Affine(bits=3, granularity="per_channel", group_size=48)  # 192 tokens a page
    assert memory.page_bytes(codec, num_heads=2, head_dim=16) == 2 * (192 * 6 + 4 * 16 * 4)
