"""Encoding kernels against the eager codecs: the same bytes, bit for bit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from kernel_states import DEVICE, codec

pytest.importorskip("triton")

from kvbits.attention.triton.quantize import append_prompt
from kvbits.codecs import Affine, Codebook, EncodeContext, NormScaled, Outliers, PreRope, Rotated
from kvbits.codecs.levels import lloyd_max, normal_float
from kvbits.codecs.pages import PageStore

CODECS = {
    f"{side}-{bits}-D{dim}{'-G' * bool(group)}{group or ''}{f'-size{size}' if size else ''}": (
        side, dim, codec(bits, group, size))
    for side, dim, bits, group, size in (
        *(("key", 128, bits, group, None) for bits in (2, 3, 4, 8) for group in (0, 32, 64, 128)),
        *(("value", 128, bits, 0, size) for bits in (2, 3, 4, 8) for size in (None, 64, 32)),
        *(("key", 96, bits, group, None) for bits in (2, 3, 4, 8) for group in (0, 32)),
        *(("value", 96, bits, 0, None) for bits in (2, 3, 4, 8)),
        *(("key", 64, bits, 64, None) for bits in (3, 4)),
        *(("value", 256, bits, 0, size) for bits in (2, 3) for size in (None, 64)),
        ("key", 128, 16, 0, None), ("value", 64, 16, 0, None),
    )
}  # fmt: skip


def levels(bits, group_size=None, **settings):
    return Codebook(levels=normal_float(bits), group_size=group_size, **settings)


def channel_levels(bits, group_size):
    moved = tuple(0.97 * level + 0.01 for level in normal_float(bits))
    return levels(bits, group_size, granularity="per_channel", decoded_levels=moved)


def turbo(bits, **settings):
    return Rotated(inner=NormScaled(levels=lloyd_max(bits), **settings), sign_seed=bits)


def outliers(inner, slots=2, by="token"):
    return Outliers(inner=inner, slots=slots, by=by)


WRAPPED = {
    "rotated-4": ("key", 128, codec(4, is_rotated=True)),
    "rotated-3-channel": ("key", 64, codec(3, 32, is_rotated=True)),
    "rotated-2-groups": ("value", 64, Rotated(inner=Affine(bits=2, group_size=16))),
    "rotated-8-wide": ("value", 256, codec(8, is_rotated=True)),
    "levels-2": ("key", 96, levels(2)),
    "levels-3-odd": ("value", 96, levels(3)),
    "levels-4-groups": ("value", 128, levels(4, 32)),
    "levels-3-groups": ("value", 64, levels(3, 32)),
    "levels-4-channel": ("key", 64, channel_levels(4, 64)),
    "levels-2-channel": ("key", 96, channel_levels(2, 32)),
    "turbo-4": ("key", 128, turbo(4)),
    "turbo-3": ("value", 64, turbo(3)),
    "turbo-2-uncorrected": ("value", 128, turbo(2, is_corrected=False)),
    "norm-3-odd": ("key", 96, NormScaled(levels=lloyd_max(3))),
    "outliers-2": ("value", 128, outliers(Affine(bits=2), slots=4)),
    "outliers-3-odd": ("value", 96, outliers(levels(3))),
    "outliers-4-groups": ("value", 64, outliers(levels(4, 32), slots=6)),
    "outliers-3-channel": ("key", 128, outliers(channel_levels(3, 64), by="channel")),
    "outliers-2-channel": ("key", 96, outliers(codec(2, 32), slots=4, by="channel")),
    "outliers-token-channel": ("key", 64, outliers(codec(4, 32))),
    "outliers-rotated": ("value", 64, Rotated(inner=outliers(Affine(bits=2)), sign_seed=1)),
}


def random_states(rows, num_tokens, heads, dim, dtype, seed=0):
    """``[B, H, T, D]`` in a projection's memory order; channels differ in scale and mean."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, num_tokens, heads, dim, generator=generator)
    states = states * torch.rand(dim, generator=generator) * 3
    states += torch.randn(dim, generator=generator)
    states[0, 5] = 1.5  # a constant group
    states[0, 7] = 0
    return states.to(dtype).to(DEVICE).transpose(1, 2)


def new_store(each, side, dim, heads, rows=2, dtype=torch.bfloat16, first_position=0):
    return PageStore(
        each,
        side=side,
        num_heads=heads,
        head_dim=dim,
        num_rows=rows,
        dtype=dtype,
        device=DEVICE,
        first_position=first_position,
    )


def assert_same_bytes(ours, theirs):
    assert ours.lengths == theirs.lengths
    pages, reference = ours.export_pages(), theirs.export_pages()
    assert pages.keys() == reference.keys()
    for name, plane in reference.items():
        bits = {1: torch.uint8, 2: torch.int16}[plane.element_size()]
        assert torch.equal(pages[name].view(bits), plane.view(bits)), name


def append_twice(ours, theirs, side, states):
    """Two ragged appends, the second into pages that are partly full."""
    block = ours.codec.block_tokens
    second = [block, 2 * block] if block > 1 else [7, 65]
    for columns, counts in (
        ([3, 40], [-(-100 // block) * block, -(-70 // block) * block]),
        ([0, 0], second),
    ):
        append_prompt(ours, side, states, None, columns=columns, counts=counts)
        for row, (start, count) in enumerate(zip(columns, counts, strict=True)):
            theirs.append(states[row : row + 1, :, start : start + count], [row])


@pytest.mark.parametrize(("side", "dim", "each"), CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prompt_becomes_the_bytes_of_the_eager_codec(side, dim, each, dtype):
    states = random_states(2, 200 + each.block_tokens, 2, dim, dtype)
    ours, theirs = (new_store(each, side, dim, 2, dtype=dtype) for _ in range(2))
    append_twice(ours, theirs, side, states)
    assert_same_bytes(ours, theirs)


@pytest.mark.parametrize(("side", "dim", "each"), WRAPPED.values(), ids=WRAPPED)
def test_wrapped_states_become_the_bytes_of_the_eager_codec(side, dim, each):
    dtype = torch.float16 if dim == 64 else torch.bfloat16
    states = random_states(2, 200, 1, dim, dtype)
    ours, theirs = (new_store(each, side, dim, 1, dtype=dtype) for _ in range(2))
    for store in (ours, theirs):
        store.reserve(280)
        store.pool.fill_(0xA5)  # what is written beyond one's own tokens shows
    append_twice(ours, theirs, side, states)
    assert_same_bytes(ours, theirs)


def test_values_that_tie_are_outliers_in_the_order_of_a_stable_sort():
    states = random_states(2, 200, 1, 64, torch.bfloat16).sign() * 0.5
    for inner, by in ((Affine(bits=2), "token"), (codec(2, 32), "channel")):
        each = outliers(inner, slots=4, by=by)
        ours, theirs = (new_store(each, "value", 64, 1) for _ in range(2))
        append_twice(ours, theirs, "value", states)
        assert_same_bytes(ours, theirs)


def test_a_head_group_takes_its_heads():
    states = random_states(2, 64, 5, 64, torch.bfloat16)
    heads = torch.tensor([4, 0, 3], device=DEVICE)
    ours, theirs = (new_store(codec(4), "key", 64, 3) for _ in range(2))
    append_prompt(ours, "key", states, heads, columns=[0, 0], counts=[64, 64])
    theirs.append(states[:, heads])
    assert_same_bytes(ours, theirs)


def test_rows_that_get_nothing_keep_what_they_have():
    states = random_states(3, 80, 2, 64, torch.bfloat16)
    ours, theirs = (new_store(codec(2), "value", 64, 2, rows=3) for _ in range(2))
    append_prompt(ours, "value", states, None, columns=[0, 0, 0], counts=[0, 33, 0])
    theirs.append(states[1:2, :, :33], [1])
    append_prompt(ours, "value", states, None, columns=[0, 0, 0], counts=[0, 0, 0])
    assert_same_bytes(ours, theirs)


def test_states_of_any_memory_order_are_read_as_they_are():
    states = random_states(2, 70, 2, 64, torch.bfloat16)
    stores = [new_store(codec(4), "value", 64, 2) for _ in range(3)]
    for store, view in zip(
        stores,
        (states, states.contiguous(), states.transpose(2, 3).contiguous().transpose(2, 3)),
        strict=True,
    ):
        append_prompt(store, "value", view, None, columns=[1, 1], counts=[69, 69])
    assert_same_bytes(stores[0], stores[1])
    assert_same_bytes(stores[0], stores[2])


ROTARY = tuple(10_000 ** (-i / 32) for i in range(32))
ANGLE_ERROR = 4e-7  # of cosine and sine: two roundings to float32, and what the series leave out
PRE_ROPE = {
    "affine": Affine(bits=8),
    "channel": codec(4, 32),
    "kvquant": outliers(levels(4, 64, granularity="per_channel"), by="channel"),
}


def half_step(inner, scale):
    """Half the widest gap between what codes decode to, at the largest of the scales."""
    leaf = inner.inner if isinstance(inner, Outliers) else inner
    gap = 1.0
    if isinstance(leaf, Codebook):
        gap = max(high - low for low, high in pairwise(leaf.levels))
    return scale.max().item() * gap / 2


@pytest.mark.parametrize(
    ("name", "first", "frequencies"),
    [
        ("affine", 3, ROTARY),
        ("affine", 40, (3.0, 0.7, 1e-4, 0.0, math.pi)),
        ("channel", 0, ROTARY),
        ("kvquant", 900_000, ROTARY),
    ],
)
def test_keys_are_turned_back_by_the_positions_of_the_row(name, first, frequencies):
    """Nearly all codes are the reference's, and no error is above half a step.

    The ends of channels' ranges tie as outliers, so angles may decide which of them are stored.
    """
    inner = PRE_ROPE[name]
    each = PreRope(inner=inner, frequencies=frequencies)
    states = random_states(2, 200, 1, 64, torch.bfloat16)
    ours, theirs = (new_store(each, "key", 64, 1, first_position=first) for _ in range(2))
    append_twice(ours, theirs, "key", states)
    planes, reference = ours.export_pages(), theirs.export_pages()
    same = (planes["codes"] == reference["codes"]).float().mean()
    assert same > (0.9 if name == "kvquant" else 0.995)
    plain_store = new_store(inner, "key", 64, 1)  # reads the pages as they are, not turned forth
    plain_store.import_pages(planes, ours.lengths)
    num_tokens = ours.lengths[0] - inner.block_tokens if inner.block_tokens > 1 else 100
    exact = states[:1, :, 3 : 3 + num_tokens].float()
    context = EncodeContext(first + torch.arange(num_tokens, device=DEVICE)[None])
    plain = each.apply(exact, context)
    stored = plain_store.read(0, num_tokens)[:1]
    bound = half_step(inner, planes["affine"].float()[..., 0])
    slack = ANGLE_ERROR * plain.norm(dim=-1).max().item() + 2**-10 * bound
    assert (stored - plain).abs().max().item() <= bound + slack
