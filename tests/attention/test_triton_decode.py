"""Attention kernels against float64, over every layout and attention they claim."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_states import DEVICE, Case, expected, make

from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton import support
from kvbits.codecs import Affine, Codebook, NormScaled, Outliers, PreRope, Rotated
from kvbits.codecs.levels import lloyd_max, normal_float, on_grid

pytest.importorskip("triton")

from kvbits.attention.triton.decode import attend, scratch_bytes

# Probabilities enter the second product in 8 (bfloat16) or 11 (float16) significant bits, and the
# output is rounded once more; relative to its norm that is 2**-8 and change.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}

LAYOUTS = {
    f"K{key}V{value}": Case(key_bits=key, value_bits=value)
    for key, value in itertools.product(support.BITS, repeat=2)
}
LAYOUTS |= {
    f"K{bits}V{bits}-G{group}-V{groups}": Case(
        key_bits=bits, value_bits=bits, key_group=group, value_groups=groups, packed=(256, 128)
    )
    for bits, group, groups in (
        (2, 32, 4), (3, 32, 2), (4, 32, 1), (8, 32, 1), (2, 64, 2), (3, 64, 1), (4, 64, 4),
        (8, 64, 2), (2, 128, 1), (3, 128, 4), (4, 128, 2), (8, 128, 1),
    )
}  # fmt: skip
LAYOUTS |= {
    f"K{key}V{value}-D{dim}-GQA{queries}": Case(
        key_bits=key, value_bits=value, head_dim=dim, group_queries=queries
    )
    for dim, key, value, queries in (
        (64, 4, 4, 4), (64, 2, 3, 1), (64, 8, 2, 9), (64, 3, 8, 7), (64, 16, 16, 4),
        (96, 4, 4, 4), (96, 2, 3, 4), (96, 8, 2, 9), (96, 3, 8, 1), (96, 16, 2, 4),
        (256, 4, 4, 4), (256, 2, 3, 2), (256, 8, 2, 9), (256, 3, 8, 16), (256, 16, 16, 2),
        (128, 4, 4, 1), (128, 2, 2, 5), (128, 3, 3, 8), (128, 8, 8, 16),
    )
}  # fmt: skip
LAYOUTS |= {
    "head_dim differs": Case(head_dim=128, value_dim=64),
    "float16": Case(dtype=torch.float16),
    "float16 exact keys": Case(key_bits=16, dtype=torch.float16),
    "GQA 8 per channel": Case(key_bits=2, key_group=128, group_queries=8, packed=(256, 128)),
    "int8 where fp16 is chosen": Case(group_queries=8, form="int8"),
    "fp16 where int8 is chosen": Case(key_bits=2, value_bits=3, form="fp16"),
    "fp16 per channel": Case(key_group=64, packed=(128, 192), form="fp16"),
}

ATTENTIONS = {
    "sinks": Case(num_sinks=5),
    "nothing packed": Case(packed=(0, 5), exact=(3, 1)),
    "one token": Case(packed=(0, 64), exact=(1, 1)),
    "uneven rows": Case(packed=(300, 64, 1), exact=(1, 20, 9)),
    "softcap, sinks, sink logits": Case(num_sinks=3, softcap=5.0, has_sink_logits=True),
    "window": Case(num_sinks=3, window=50, has_sink_logits=True),
    "window within the residual": Case(window=9, exact=(20, 12)),
    "window over everything": Case(window=1000),
    "exact, window": Case(key_bits=16, value_bits=16, window=50, has_sink_logits=True),
    "wide heads, window, softcap": Case(
        key_bits=2, value_bits=2, group_queries=16, window=90, softcap=3.0
    ),
    "outliers": Case(has_outliers=True),
    "outliers, 2 bits": Case(key_bits=2, value_bits=2, has_outliers=True),
    "outliers, 3 bits": Case(key_bits=3, value_bits=3, has_outliers=True),
    "outliers, fp16": Case(group_queries=8, has_outliers=True),
    "outliers, per channel": Case(
        key_bits=2, key_group=32, value_groups=4, packed=(128, 64), has_outliers=True
    ),
}
ATTENTIONS |= {
    f"{queries} queries, {name}": case
    for queries, name, case in (
        (2, "4 bits", Case(num_queries=2, num_sinks=2, exact=(30, 25))),
        (9, "4 bits", Case(num_queries=9, num_sinks=2, exact=(30, 25))),
        (20, "GQA 7", Case(num_queries=20, group_queries=7, exact=(20, 25))),
        (65, "2 bits", Case(num_queries=65, key_bits=2, value_bits=2, exact=(65, 70))),
        (5, "exact, window", Case(
            num_queries=5, key_bits=16, value_bits=16, exact=(30, 25), window=40)),
        (5, "per channel", Case(
            num_queries=5, key_bits=3, value_bits=2, key_group=32, value_groups=4,
            packed=(128, 64), exact=(30, 25), num_sinks=2)),
        (7, "all", Case(
            num_queries=7, head_dim=96, exact=(30, 25), softcap=4.0, window=60,
            has_sink_logits=True)),
    )
}  # fmt: skip

ATTENTIONS |= {
    f"rotated, {name}": replace(case, is_rotated=True)
    for name, case in {
        "sinks": Case(num_sinks=5, exact=(1, 9)),
        "two dimensions": Case(head_dim=128, value_dim=64),
        "sink logits, fp16": Case(group_queries=8, has_sink_logits=True, dtype=torch.float16),
        "keys only": Case(key_bits=2, value_bits=16),
        "per channel": Case(key_bits=2, key_group=64, packed=(128, 64), value_bits=3),
        "queries": Case(num_queries=5, exact=(30, 25), num_sinks=2),
        "nothing packed": Case(packed=(0, 5), exact=(3, 1)),
    }.items()
}

KVARN = Case(
    key_bits=2, value_bits=2, key_group=128, key_tile=128, value_tile=128, is_rotated=True,
    num_heads=1, packed=(256, 128),
)  # fmt: skip
ATTENTIONS |= {
    f"normalised, {name}": case
    for name, case in {
        "2 bits, sinks": replace(KVARN, num_heads=2, num_sinks=5),
        "4 bits, GQA 8": replace(
            KVARN, key_bits=4, value_bits=4, group_queries=8, packed=(128,), exact=(7,)),
        "fp16": replace(KVARN, group_queries=9, packed=(128,), exact=(7,), dtype=torch.float16),
        "queries, window": replace(KVARN, num_queries=5, exact=(30, 25), window=90),
        "tiles of 64": replace(
            KVARN, is_rotated=False, key_bits=4, value_bits=4, key_group=64, key_tile=64,
            value_tile=64, packed=(192, 64)),
        "short value tiles": replace(KVARN, value_tile=32, packed=(128,), exact=(9,)),
        "value groups": replace(KVARN, is_rotated=False, value_groups=4, softcap=4.0),
        "3 bits": replace(KVARN, key_bits=3, value_bits=3, head_dim=64, packed=(128, 128)),
        "3 bits, fp16": replace(
            KVARN, key_bits=3, value_bits=3, head_dim=96, is_rotated=False, form="fp16"),
        "8 bits, keys per token": replace(
            KVARN, key_bits=8, value_bits=8, key_group=0, packed=(128, 128)),
        "keys only": replace(KVARN, value_bits=16, value_tile=0),
        "values only": replace(KVARN, key_bits=16, key_group=0, key_tile=0),
    }.items()
}  # fmt: skip


def looked_up(
    bits, *, group=0, slots=0, is_turned=False, head_dim=128, by="token", has_grid=False
):
    """A codebook with what may be around it."""
    levels = on_grid(normal_float(bits)) if has_grid else normal_float(bits)
    codec = Codebook(levels=levels)
    if group:
        codec = Codebook(levels=levels, granularity="per_channel", group_size=group)
    if slots:
        codec = Outliers(inner=codec, slots=slots, by=by)
    if is_turned:
        frequencies = tuple(500.0 ** (-i / (head_dim // 2)) for i in range(head_dim // 2))
        codec = PreRope(inner=codec, frequencies=frequencies)
    return codec


TURBO = Rotated(inner=NormScaled(levels=lloyd_max(3)), sign_seed=1)
LOOKED_UP = {
    f"{bits} bits": Case(key_codec=looked_up(bits), value_codec=looked_up(bits))
    for bits in (2, 3, 4)
}
LOOKED_UP |= {
    f"KVQuant, {bits} bits": Case(
        key_codec=looked_up(bits, group=64, slots=2, is_turned=True, by="channel"),
        value_codec=looked_up(bits, slots=2),
        packed=(192, 64),
        num_sinks=1,
        has_outliers=True,
    )
    for bits in (2, 3, 4)
}
LOOKED_UP |= {
    "TurboQuant": Case(key_codec=TURBO, value_codec=TURBO),
    "plain values": Case(key_codec=looked_up(4, is_turned=True), value_bits=2, value_groups=2),
    "plain keys": Case(value_codec=looked_up(2, slots=4), key_bits=3, key_group=32,
                       packed=(128, 64)),
    "head_dim 64": Case(
        head_dim=64,
        key_codec=looked_up(4, is_turned=True, head_dim=64),
        value_codec=looked_up(2),
        group_queries=7,
    ),
    "head_dim 256": Case(
        head_dim=256, key_codec=looked_up(3, slots=2), value_codec=looked_up(4), window=90
    ),
    "queries": Case(
        key_codec=looked_up(4, group=128, slots=2, is_turned=True, by="channel"),
        value_codec=looked_up(3, slots=2),
        num_queries=6,
        packed=(256, 128),
        exact=(30, 25),
        num_sinks=3,
    ),
}  # fmt: skip


on_bytes = partial(looked_up, has_grid=True)
GRID_TURBO = Rotated(inner=NormScaled(levels=on_grid(lloyd_max(4))), sign_seed=1)
BYTES = {
    "4 bits": Case(key_codec=on_bytes(4), value_codec=on_bytes(4)),
    "2 bits, GQA 1": Case(key_codec=on_bytes(2), value_codec=on_bytes(2), group_queries=1),
    "keys by channel": Case(
        key_codec=on_bytes(4, group=128), value_codec=on_bytes(3), packed=(256, 128)),
    "keys by channel, groups of 32": Case(
        key_codec=on_bytes(4, group=32), value_bits=3, value_groups=4, packed=(96, 64)),
    "TurboQuant": Case(key_codec=GRID_TURBO, value_codec=GRID_TURBO, group_queries=3),
    "outliers": Case(
        key_codec=on_bytes(4, group=64, slots=4, by="channel"),
        value_codec=on_bytes(2, slots=2), packed=(192, 64), num_sinks=1, has_outliers=True),
    "outliers of plain codes": Case(
        key_codec=Outliers(inner=Affine(bits=4), slots=2),
        value_codec=Outliers(inner=Affine(bits=4), slots=4), head_dim=256, softcap=9.0,
        has_outliers=True),
    "head_dim 64": Case(
        head_dim=64, key_codec=on_bytes(4), value_codec=on_bytes(4),
        window=90, dtype=torch.float16),
    "plain values": Case(key_codec=on_bytes(4, is_turned=True), value_bits=2, value_groups=2),
    "turned, fp16": Case(
        key_codec=on_bytes(4, is_turned=True, head_dim=256), value_codec=on_bytes(4),
        head_dim=256, group_queries=2, dtype=torch.float16, has_sink_logits=True),
}  # fmt: skip
BYTES |= {
    f"KVQuant, {bits} bits": Case(
        key_codec=on_bytes(bits, group=64, slots=2, is_turned=True, by="channel"),
        value_codec=on_bytes(bits, slots=2),
        packed=(192, 64),
        num_sinks=1,
        has_outliers=True,
    )
    for bits in (2, 3, 4)
}


def run(case, query, states, **changes):
    return attend(query, states, case.scale, schedule=case.schedule(**changes), **case.options)


def assert_close(output, reference, case):
    error = (output.cpu().double() - reference).norm() / reference.norm()
    assert error < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_agrees_with_float64(case):
    query, states, dense = make(case, poison=True)
    output = run(case, query, states)
    assert output.dtype == case.dtype
    assert output.is_contiguous()
    assert_close(output, expected(case, query, dense), case)


@pytest.mark.parametrize("case", LOOKED_UP.values(), ids=LOOKED_UP)
def test_codes_that_are_looked_up_agree_with_float64(case):
    query, states, dense = make(case, poison=True)
    assert case.schedule().form == "table"
    assert_close(run(case, query, states), expected(case, query, dense), case)


@pytest.mark.parametrize("case", BYTES.values(), ids=BYTES)
def test_codes_that_are_looked_up_as_bytes_agree_with_float64(case):
    query, states, dense = make(case, poison=True)
    assert case.schedule().form == "levels"
    assert_close(run(case, query, states), expected(case, query, dense), case)


@pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
def test_every_attention_agrees_with_float64(case):
    query, states, dense = make(case, poison=True)
    assert_close(run(case, query, states), expected(case, query, dense), case)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("form", ["int8", "fp16"])
def test_splits_change_the_output_by_rounding_only(form, splits):
    case = Case(packed=(300, 64, 1), exact=(1, 40, 9), form=form)
    query, states, dense = make(case)
    changes = {"splits": splits, "exact_splits": 1 + splits % 2}
    assert_close(run(case, query, states, **changes), expected(case, query, dense), case)


def test_the_same_call_gives_the_same_bits():
    case = Case(packed=(300, 64, 1), exact=(1, 40, 9))
    query, states, _ = make(case)
    first = run(case, query, states)
    for _ in range(3):
        assert torch.equal(run(case, query, states), first)


def test_a_row_of_a_batch_is_what_it_is_alone():
    """Under one schedule: how many splits there are depends on the batch."""
    case = Case(packed=(128, 128), exact=(9, 9))
    query, states, _ = make(case)
    both = run(case, query, states, splits=2)
    query[1] = torch.nan
    assert torch.equal(run(case, query, states, splits=2)[0], both[0])


def test_scratch_does_not_grow_with_the_context():
    """Partial outputs are all that attention allocates: splits times queries."""
    for num_queries in (1, 16, 128):
        sizes = set()
        for num_tokens in (1 << 15, 1 << 17, 1 << 20):
            side = support.SideShape(4, 0, 1, 128)
            shape = schedules.Shape(side, side, 4, num_queries, 64, num_tokens, 65)
            plan = schedules.choose(shape)
            sizes.add(scratch_bytes(8, 32, num_queries, plan, 128))
        (size,) = sizes
        assert size <= 192 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [1, 8, 128])
def test_peak_memory_is_that_of_the_scratch(num_queries):
    case = Case(num_heads=8, packed=(4096, 4096), exact=(128, 128), num_queries=num_queries)
    query, states, _ = make(case)
    plan = case.schedule()
    attend(query, states, case.scale, schedule=plan)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, states, case.scale, schedule=plan)
    used = torch.cuda.max_memory_allocated() - before
    output = query.numel() * query.element_size()
    limit = scratch_bytes(2, 32, num_queries, plan, 128) + 3 * output + (1 << 20)
    assert used <= limit, (used, limit, DEVICE)
