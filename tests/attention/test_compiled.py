"""Decode attention by torch.compile, against one float64 softmax over what a query should see.

Its arithmetic is tested eagerly, over every plan; two layouts are compiled for real.
"""

from __future__ import annotations

import functools

import pytest
import torch
from naive_layer import HEADS, KEY_DIM, PLANS, random_states
from torch._dynamo.utils import counters

from kvbits.attention import api, compiled
from kvbits.cache.layer import PackedLayer
from kvbits.codecs import Affine
from kvbits.errors import KernelUnavailableError
from kvbits.layer_plan import LayerPlan
from kvbits.testing import attend_naively

CPU = torch.device("cpu")
SCALE = KEY_DIM**-0.5
REPEATS = 2  # query heads per key/value head
# Sums of a few hundred float32 products of numbers up to 30; the oracle is float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
POSSIBLE = {name: plan for name, plan in PLANS.items() if not compiled.unavailable(plan, CPU)}
every_plan = pytest.mark.parametrize("plan", POSSIBLE.values(), ids=POSSIBLE)
needs_compiler = pytest.mark.skipif(not POSSIBLE, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def eager(monkeypatch):
    """Run what would be compiled as it is written."""
    monkeypatch.setattr(
        compiled, "_compile", lambda _, function, facts: functools.partial(function, *facts)
    )
    compiled._compiled.cache_clear()
    yield
    compiled._compiled.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the compiled attention."""
    seen = []

    def counted(*args, **options):
        seen.append(args)
        return attend(*args, **options)

    attend = compiled.attend
    monkeypatch.setattr(compiled, "attend", counted)
    return seen


def last_step(plan, num_tokens, padding=(0, 0), num_queries=1):
    """A layer of so many tokens, and what the last queries see."""
    layer = PackedLayer(plan, impl="compiled")
    layer.set_padding(padding)
    layer.update(*random_states(num_tokens - num_queries))
    return layer, layer.update(*random_states(num_queries, seed=3))


def random_query(num_queries=1, rows=2):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, HEADS * REPEATS, num_queries, KEY_DIM, generator=generator)


def expected(query, states, **options):
    """Float64 attention ``[B, Q, H_q, D_v]`` over the dense states; padding is not seen."""
    is_real = torch.arange(states.num_tokens) >= torch.tensor(states.padding)[:, None]
    keys, values = states.dense("key"), states.dense("value")
    output = attend_naively(query, keys, values, is_real[:, None, None], SCALE, **options)
    return output.transpose(1, 2)


@every_plan
@pytest.mark.parametrize(
    ("num_tokens", "padding"),
    [(2, (1, 0)), (41, (0, 0)), (41, (3, 39)), (200, (0, 0)), (401, (0, 150))],
    ids=str,
)
def test_output_is_attention_over_the_decoded_states(plan, num_tokens, padding, eager, calls):
    layer, states = last_step(plan, num_tokens, padding)
    query = random_query()
    output = api.attend(query, states, None, SCALE)
    torch.testing.assert_close(output.double(), expected(query, states), **CLOSE)
    assert output.dtype == query.dtype
    assert bool(calls) == (layer.packed_lengths("key").max() > 0), "packed layers are compiled"


@pytest.mark.parametrize("plan", [PLANS[n] for n in ("token-4", "kivi-64-sinks", "head-groups")])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sink_logits_take_part(plan, softcap, with_sinks, eager, calls):
    _, states = last_step(plan, 200)
    query = random_query()
    logits = torch.randn(HEADS * REPEATS, generator=torch.Generator().manual_seed(2))
    options = {"softcap": softcap, "sink_logits": 4 * logits if with_sinks else None}
    output = api.attend(query, states, None, SCALE, **options)
    torch.testing.assert_close(output.double(), expected(query, states, **options), **CLOSE)
    assert calls


@pytest.mark.parametrize("plan", [PLANS[n] for n in ("token-4", "kivi-32")])
def test_pages_in_pieces_and_in_another_order_are_read(plan, eager):
    layer = PackedLayer(plan, impl="compiled")
    for seed in range(12):  # a pool that grows piece by piece
        layer.update(*random_states(70, seed=seed))
    layer.crop(33)
    layer.map_rows([1, 0])
    states = layer.update(*random_states(1, seed=99))
    query = random_query()
    output = api.attend(query, states, None, SCALE)
    torch.testing.assert_close(output.double(), expected(query, states), **CLOSE)


def test_sides_that_hold_different_tokens_go_to_the_reference(eager, calls):
    """A crop cuts a block of keys and no values."""
    plan = LayerPlan.uniform(
        Affine(bits=4, granularity="per_channel", group_size=32), Affine(bits=2)
    )
    layer = PackedLayer(plan, impl="compiled")
    layer.update(*random_states(70))
    layer.crop(20)
    query, states = random_query(), layer.update(*random_states(1, seed=3))
    output = api.attend(query, states, None, SCALE)
    torch.testing.assert_close(output.double(), expected(query, states), **CLOSE)
    assert not calls


def test_what_is_no_plain_step_goes_to_the_reference(eager, calls):
    plan = PLANS["token-4"]
    _, states = last_step(plan, 200, num_queries=3)
    api.attend(random_query(3), states, None, SCALE)  # several queries
    _, states = last_step(plan, 200)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    api.attend(random_query(), states, mask, SCALE)  # a mask that may say anything
    api.attend(random_query(), states, None, SCALE, window=100)
    assert not calls
    api.attend(random_query(), states, mask, SCALE, is_plain=True)
    api.attend(random_query(), states, None, SCALE, window=200)
    assert len(calls) == 2


@needs_compiler
@pytest.mark.parametrize("name", ["token-4", "kivi-128"])
def test_compiled_code_computes_what_is_written(name, calls):
    layer, states = last_step(PLANS[name], 400)
    query = random_query()
    compiled_before = None
    for seed in range(3):
        output = api.attend(query, states, None, SCALE)
        torch.testing.assert_close(output.double(), expected(query, states), **CLOSE)
        num_compiled = counters["frames"]["ok"]
        assert compiled_before in {None, num_compiled}, "another length must not compile again"
        compiled_before = num_compiled
        layer.update(*random_states(130, seed=10 + seed))
        states = layer.update(*random_states(1, seed=20 + seed))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("plan", "device", "message"),
    [
        (PLANS["token-4"], torch.device("meta"), "device must be cpu, got meta"),
        (PLANS["independent"], CPU, "flush must be 'joint', got 'independent'"),
        (PLANS["symmetric"], CPU, "codecs must be exact or affine with an offset"),
        (PLANS["channel-both"], CPU, "values must share scales per token"),
    ],
)
def test_what_cannot_be_compiled_is_refused(plan, device, message):
    with pytest.raises(KernelUnavailableError, match=message) as caught:
        api.resolve_impl(
            "compiled",
            plan,
            key_head_dim=16,
            value_head_dim=24,
            dtype=torch.float32,
            device=device,
        )
    assert "pass impl='auto' or 'reference'" in str(caught.value)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    reason = compiled.unavailable(LayerPlan.uniform(Affine(bits=4), Affine(bits=4)), CPU)
    assert reason == "a C++ compiler must be on the PATH, got none"
