"""How shapes run: a pure function, within what the kernels can launch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton import support
from kvbits.attention.triton.schedule import Device, Shape, choose
from kvbits.attention.triton.support import SideShape
from kvbits.codecs import Affine, Identity, Rotated, VarianceNormalised
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.methods.kvarn import KVarN


@st.composite
def shapes(draw):
    head_dim = draw(st.sampled_from(support.HEAD_DIMS))
    key_bits, value_bits = (draw(st.sampled_from(support.BITS)) for _ in range(2))
    key_group = draw(st.sampled_from((0, *support.KEY_GROUPS))) if key_bits < 16 else 0
    groups = draw(st.sampled_from(support.VALUE_GROUPS)) if value_bits < 16 else 1
    num_tokens = draw(st.integers(0, 1 << 20))
    return Shape(
        key=SideShape(key_bits, key_group, 1, head_dim),
        value=SideShape(value_bits, 0, groups, head_dim),
        group_queries=draw(st.integers(1, support.MAX_GROUP_QUERIES)),
        num_queries=draw(st.sampled_from((1, 1, 1, 2, 7, 128, 2048))),
        rows=draw(st.integers(1, 2048)),
        num_tokens=num_tokens,
        exact_tokens=draw(st.integers(0, 300)),
        mean_tokens=draw(st.none() | st.integers(0, num_tokens)),
    )


@given(shapes(), st.sampled_from((48, 108, 132, 160)), st.sampled_from((65_536, 233_472)))
def test_every_choice_can_be_launched(shape, multiprocessors, shared_bytes):
    device = Device(multiprocessors, shared_bytes)
    plan = choose(shape, device)
    assert plan == choose(shape, device)
    tiles = max(1, -(-shape.num_tokens // plan.tile))
    assert 1 <= plan.splits <= min(tiles, schedules.MAX_SPLITS)
    assert 1 <= plan.exact_splits <= 5
    assert plan.tile in {32, 64, 128}
    if shape.key.key_group:
        assert shape.key.key_group % plan.tile == 0  # a tile has one group's scales
    assert plan.columns & (plan.columns - 1) == 0
    if plan.form == "int8":
        assert shape.num_queries == 1
        assert plan.columns >= shape.group_queries
        assert max(shape.key.bits, shape.value.bits) < 16
    assert plan.num_stages == 2 * plan.depth + 1


def serving_shape(rows, context, key_bits, value_bits, **changes):
    fields = {
        "key": SideShape(key_bits, 0, 1, 128),
        "value": SideShape(value_bits, 0, 1, 128),
        "group_queries": 4,
        "num_queries": 1,
        "rows": 8 * rows,
        "num_tokens": context,
        "exact_tokens": 65,
    }
    return Shape(**(fields | changes))


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (serving_shape(8, 32768, 4, 4), "int8"),
        (serving_shape(8, 32768, 3, 2), "int8"),
        (serving_shape(8, 32768, 4, 4, group_queries=8), "fp16"),
        (serving_shape(8, 32768, 3, 4, group_queries=8), "int8"),
        (serving_shape(8, 32768, 2, 2, group_queries=8, key=SideShape(2, 64, 1, 128)), "int8"),
        (serving_shape(8, 32768, 16, 16), "fp16"),
        (serving_shape(8, 32768, 16, 4), "fp16"),
        (serving_shape(8, 32768, 4, 4, num_queries=8), "fp16"),
    ],
)
def test_each_form_runs_where_it_is_faster(shape, form):
    assert choose(shape).form == form


def test_small_batches_are_split_and_large_ones_are_not():
    splits = [choose(serving_shape(rows, 32768, 4, 4)).splits for rows in (1, 8, 64, 256)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] >= 64
    assert splits[-1] <= 2


@pytest.mark.parametrize(
    ("rows", "key_bits", "value_bits", "programs"),
    [
        (16, 2, 2, 8),  # two for every scheduler
        (32, 2, 2, 12),  # those over exact tokens are too many to come on top: fill up
        (32, 8, 8, 6),  # tiles of 8 bits leave room for no more
        (64, 4, 4, 33),  # three times 11, which twice or once do not fill
    ],
)
def test_programs_of_large_batches_come_out_even(rows, key_bits, value_bits, programs):
    plan = choose(serving_shape(rows, 32768, key_bits, value_bits))
    room = programs * schedules.DEFAULT_DEVICE.multiprocessors
    assert 0.9 * room <= plan.splits * 8 * rows <= room


def test_splits_take_as_many_tiles_as_each_other():
    plan = choose(serving_shape(8, 1984, 2, 2))  # 31 tiles: 15 splits would take 2 or 3
    assert plan.splits == 11


def test_rows_of_a_ragged_batch_share_the_places_of_their_mean():
    even = choose(serving_shape(32, 16384, 2, 2))
    ragged = choose(serving_shape(32, 32768, 2, 2, mean_tokens=16384))
    assert ragged.splits == 2 * (even.splits * 3 // 2)
    extreme = choose(serving_shape(32, 1 << 20, 2, 2, mean_tokens=16384))
    assert extreme.splits == schedules.MOST_RAGGED * (even.splits * 3 // 2)


def test_a_schedule_says_what_it_is():
    assert str(choose(serving_shape(1, 64, 4, 4))) == "int8, 64-token tiles, 1 splits"


def normalised(scaled, **changes):
    return VarianceNormalised(inner=Affine(bits=4), scaled=scaled, **changes)


@pytest.mark.parametrize(
    ("codec", "side", "head_dim", "rule"),
    [
        (Affine(bits=4, symmetric=True), "key", 128, "key codec must be one"),
        (Affine(bits=4, parameter_dtype="float32"), "value", 128, "value codec must be one"),
        (Affine(bits=4), "key", 80, "head_dim must be one of"),
        (Affine(bits=4, granularity="per_channel", group_size=16), "key", 128, "group_size"),
        (Affine(bits=4, granularity="per_channel", group_size=32), "value", 128, "per token"),
        (Affine(bits=4, group_size=32), "key", 128, "keys must have one scale per token"),
        (Affine(bits=4, group_size=16), "value", 128, "values must have one of"),
        (Affine(bits=4, group_size=48), "value", 96, "scale groups must be a power of two"),
        (normalised("channel"), "key", 128, "keys must be scaled per token, got 'channel'"),
        (normalised("token"), "value", 128, "values must be scaled per channel, got 'token'"),
        (normalised("channel", tile_tokens=16), "value", 128, "at least 32, got 16"),
        (
            VarianceNormalised(inner=Rotated(inner=Affine(bits=4)), scaled="channel"),
            "value",
            128,
            "got variance_normalised(rotated(affine))",
        ),
    ],
)
def test_what_no_kernel_reads_is_named(codec, side, head_dim, rule):
    assert rule in support.unsupported_side(codec, side, head_dim)


@pytest.mark.parametrize("head_dim", support.HEAD_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_kernels_read_has_no_objection(bits, head_dim):
    for key in (Affine(bits=bits), Affine(bits=bits, granularity="per_channel", group_size=64)):
        for value in (Affine(bits=bits), Identity()):
            assert support.unsupported(LayerPlan.uniform(key, value), head_dim, head_dim) is None
    assert support.unsupported_heads(16) is None
    assert "at most 16, got 17" in support.unsupported_heads(17)


LAYER = LayerGeometry(
    layer_type="full_attention", num_key_value_heads=8, key_head_dim=128, value_head_dim=128
)


def test_a_layer_is_described_by_its_choice_or_by_what_is_in_the_way():
    plan = LayerPlan.uniform(Affine(bits=4), Affine(bits=4))
    (shape,) = schedules.decode_shapes(plan, LAYER, 32, 32768)
    changes = {"exact_tokens": shape.exact_tokens, "mean_tokens": shape.mean_tokens}
    assert shape == serving_shape(1, 32768, 4, 4, **changes)
    assert schedules.describe(plan, LAYER, 32, 32768) == str(choose(shape))
    heads = schedules.describe(plan, LAYER, 256, 32768)
    assert heads == "reference: query heads per key/value head must be at most 16, got 32"
    odd = LAYER.model_copy(update={"key_head_dim": 80})
    assert schedules.describe(plan, odd, 32, 32768).startswith("reference: head_dim must be")


def test_tiles_that_are_normalised_run_as_their_codes_do():
    plan = KVarN().layer_plan(LAYER, None)
    assert support.unsupported(plan, 128, 128) is None
    assert not support.is_writable(plan)
    (shape,) = schedules.decode_shapes(plan, LAYER, 32, 32768)
    # 2-bit codes, pairs of float16, and one float16 more of a token or of a tile's channels
    assert (shape.key.token_bytes, shape.value.token_bytes) == (32 + 4 + 2, 32 + 4 + 2)
    assert schedules.describe(plan, LAYER, 32, 32768).startswith("int8, 128-token tiles")
    halves = shape._replace(value=shape.value._replace(scale_tile=64))
    assert choose(halves).tile == 64


def test_head_groups_share_their_splits():
    shapes = [serving_shape(8, 32768, 4, 4), serving_shape(2, 32768, 2, 2)]
    alone = [choose(shape) for shape in shapes]
    together = schedules.choose_together(shapes)
    assert alone[0].splits != alone[1].splits
    assert {plan.splits for plan in together} == {max(plan.splits for plan in alone)}


def test_choosing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import kvbits.attention.triton.schedule, "
        "kvbits.attention.api, kvbits.cache.hf, kvbits.generation, kvbits.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
