"""A layer written from its description, one row and one token at a time: the oracle of the laws.

It keeps every token it was given. A token is replaced by what the codec decodes when the plan says
that it leaves the residual; nothing is ever encoded twice.
"""

from __future__ import annotations

import copy
import random
from importlib.util import find_spec

import pytest
import torch

from kvbits.cache.layer import PackedLayer
from kvbits.codecs import (
    Affine,
    Array,
    Codebook,
    EncodeContext,
    Float4,
    Float8,
    Hqq,
    Identity,
    MatrixRotated,
    NearestLevel,
    NormScaled,
    Outliers,
    Permuted,
    PreRope,
    Promoted,
    Quanto,
    RangeNormalised,
    Rotated,
    Tiered,
    VarianceNormalised,
)
from kvbits.codecs.levels import lloyd_max, normal_float
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan

HEADS, KEY_DIM, VALUE_DIM = 3, 16, 24


def channel(bits, group_size):
    return Affine(bits=bits, granularity="per_channel", group_size=group_size)


def order(name, heads, width, seed):
    """A permutation of all channels of some heads."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(heads * width, generator=generator).int()
    return Array(name, flat.view(heads, width))


def rotation(name, heads, width, seed):
    """Random orthogonal matrices."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
    return Array(name, torch.linalg.qr(normal).Q.float())


def ranges(name, heads, width):
    """Where the keys of ``random_states`` lie."""
    middle = torch.zeros(heads, width)
    middle[:, 3] = 20
    half_range = torch.linspace(1.5, 2.5, heads * width).view(heads, width)
    return {
        "middle": Array(f"{name}.middle", middle),
        "half_range": Array(f"{name}.half_range", half_range),
    }


PLANS = {
    "token-2": LayerPlan.uniform(Affine(bits=2), Affine(bits=2)),
    "token-3": LayerPlan.uniform(Affine(bits=3), Affine(bits=3), sink_tokens=4),
    "token-4": LayerPlan.uniform(Affine(bits=4), Affine(bits=4), residual_length=100),
    "token-8-groups": LayerPlan.uniform(
        Affine(bits=8, group_size=8), Affine(bits=8, group_size=8), residual_length=32
    ),
    "symmetric": LayerPlan.uniform(
        Affine(bits=4, symmetric=True), Affine(bits=3, symmetric=True), sink_tokens=5
    ),
    "kivi-32": LayerPlan.uniform(channel(2, 32), Affine(bits=2), residual_length=32),
    "kivi-64-sinks": LayerPlan.uniform(channel(3, 64), Affine(bits=4), sink_tokens=3),
    "kivi-128": LayerPlan.uniform(channel(4, 128), Affine(bits=2), residual_length=20),
    "channel-both": LayerPlan.uniform(channel(4, 32), channel(2, 24), residual_length=7),
    "independent": LayerPlan.uniform(
        channel(2, 32), Affine(bits=3), residual_length=64, flush="independent"
    ),
    "independent-token": LayerPlan.uniform(
        Affine(bits=4), Affine(bits=2), residual_length=10, sink_tokens=2, flush="independent"
    ),
    "ternary": LayerPlan.uniform(
        Affine(bits=1.5, clip_ratio=0.9), Affine(bits=1.5, group_size=8, parameter_dtype="float8")
    ),
    "codebook": LayerPlan.uniform(
        Codebook(levels=normal_float(3), granularity="per_channel", group_size=32),
        Codebook(levels=normal_float(4), group_size=8),
        residual_length=10,
    ),
    "float": LayerPlan.uniform(Float4(format="nvfp4"), Float8(tensor_scale=0.5)),
    "turbo": LayerPlan.uniform(
        Rotated(inner=NormScaled(levels=lloyd_max(3)), sign_seed=7),
        NormScaled(levels=lloyd_max(4)),
        sink_tokens=3,
    ),
    "tiles": LayerPlan.uniform(
        Rotated(inner=VarianceNormalised(inner=channel(2, 32), scaled="token", tile_tokens=64)),
        VarianceNormalised(inner=Affine(bits=2), scaled="channel", tile_tokens=32),
        sink_tokens=2,
    ),
    "promoted": LayerPlan.uniform(
        Promoted(group_size=32, num_promoted=4), Affine(bits=2), residual_length=40
    ),
    "tiered": LayerPlan.uniform(
        Outliers(
            inner=Tiered(
                codecs=(Affine(bits=2), Affine(bits=4), Affine(bits=8)),
                num_wide=(12, 3),
                tile_tokens=32,
            ),
            slots=2,
        ),
        Tiered(
            codecs=(Codebook(levels=normal_float(3)), Codebook(levels=normal_float(4))),
            num_wide=(5,),
            tile_tokens=16,
        ),
        residual_length=4,
    ),
    "outliers": LayerPlan.uniform(
        Outliers(inner=channel(3, 32), slots=2, by="channel"),
        Outliers(inner=Affine(bits=2, group_size=12), slots=4),
        residual_length=20,
    ),
    "pre-rope": LayerPlan.uniform(
        PreRope(
            inner=Outliers(inner=channel(4, 32), slots=2, by="channel"),
            frequencies=(1.0, 0.1, 0.01, 0.0123),
        ),
        Affine(bits=3),
        sink_tokens=3,
    ),
    "wrapped-groups": LayerPlan(
        groups=(
            HeadGroup(
                heads=(1, 2),
                key=PreRope(inner=Affine(bits=4), frequencies=(1.0, 0.3)),
                value=Outliers(inner=Affine(bits=2), slots=2),
            ),
            HeadGroup(
                heads=(0,),
                key=Rotated(inner=NormScaled(levels=lloyd_max(2))),
                value=VarianceNormalised(
                    inner=Outliers(inner=Affine(bits=3), slots=2), scaled="channel", tile_tokens=32
                ),
            ),
        ),
        residual_length=5,
        sink_tokens=2,
    ),
    "fitted": LayerPlan.uniform(
        PreRope(
            inner=Permuted(
                inner=Affine(bits=3, group_size=8), order=order("k", HEADS, KEY_DIM, seed=1)
            ),
            frequencies=(1.0, 0.2, 0.03),
        ),
        MatrixRotated(inner=Affine(bits=2), matrix=rotation("v", 1, VALUE_DIM, seed=2)),
        residual_length=6,
        sink_tokens=3,
    ),
    "fitted-groups": LayerPlan(
        groups=(
            HeadGroup(
                heads=(2, 0),
                key=MatrixRotated(inner=Affine(bits=4), matrix=rotation("k", 2, KEY_DIM, seed=3)),
                value=Permuted(inner=channel(2, 32), order=order("v", 2, VALUE_DIM, seed=4)),
            ),
            HeadGroup(
                heads=(1,),
                key=PreRope(
                    inner=RangeNormalised(
                        inner=Outliers(inner=NearestLevel(levels=normal_float(3)), slots=2),
                        **ranges("r", 1, KEY_DIM),
                    ),
                    frequencies=(0.7, 0.05),
                ),
                value=Affine(bits=3),
            ),
        ),
        residual_length=4,
    ),
    "key-exact": LayerPlan.uniform(Identity(), Affine(bits=4), residual_length=10),
    "value-exact": LayerPlan.uniform(channel(2, 32), Identity(), sink_tokens=2),
    "float32-scales": LayerPlan.uniform(
        Affine(bits=8, parameter_dtype="float32"), Affine(bits=4, parameter_dtype="float32")
    ),
    "head-groups": LayerPlan(
        groups=(
            HeadGroup(heads=(2, 0), key=channel(4, 32), value=Affine(bits=2)),
            HeadGroup(heads=(1,), key=Affine(bits=8), value=Affine(bits=3)),
        ),
        residual_length=32,
        sink_tokens=1,
    ),
}

# What extras bring; the first of two names may be there without the second.
LIBRARIES = {"quanto": ("optimum", "optimum.quanto"), "hqq": ("hqq",)}
needs_library = {
    name: pytest.mark.skipif(not all(map(find_spec, modules)), reason=f"needs kvbits[{name}]")
    for name, modules in LIBRARIES.items()
}
BY_CHANNEL = {"granularity": "per_channel", "group_size": 32}
LIBRARY_PLANS = {
    "quanto": pytest.param(
        LayerPlan.uniform(
            Quanto(bits=4, **BY_CHANNEL), Quanto(bits=2, group_size=12), residual_length=9
        ),
        marks=needs_library["quanto"],
    ),
    "hqq": pytest.param(
        LayerPlan.uniform(Hqq(bits=3, **BY_CHANNEL), Hqq(bits=4, tile_tokens=16), sink_tokens=3),
        marks=needs_library["hqq"],
    ),
}


def random_states(num_tokens, rows=2, seed=0, dtype=torch.float32):
    """Keys and values of a few tokens; one key channel lies far from zero."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, HEADS, num_tokens, KEY_DIM, generator=generator)
    keys[..., 3] += 20
    values = torch.randn(rows, HEADS, num_tokens, VALUE_DIM, generator=generator)
    return keys.to(dtype), values.to(dtype)


class NaiveRow:
    """Both sides of one batch row without its padding."""

    def __init__(self, plan):
        self.plan = plan
        self.tokens = {side: [] for side in SIDES}  # what attention sees: [H_kv, D] per token
        self.packed = dict.fromkeys(SIDES, 0)

    def __len__(self):
        return len(self.tokens["key"])

    def append(self, key_states, value_states):
        for side, states in zip(SIDES, (key_states, value_states), strict=True):
            self.tokens[side] += list(states.unbind(1))

    def due(self, side):
        plan = self.plan
        beyond_sinks = max(0, len(self) - plan.sink_tokens)
        leaving = max(0, beyond_sinks - plan.residual_length)
        if plan.flush == "joint":
            return leaving // plan.quantum * plan.quantum
        if side == "key":
            block = plan.residual_length or plan.block_tokens("key")
            return beyond_sinks // block * block
        return leaving // plan.block_tokens("value") * plan.block_tokens("value")

    def flush(self):
        for side in SIDES:
            count = self.due(side) - self.packed[side]
            if count > 0:
                first = self.plan.sink_tokens + self.packed[side]
                states = torch.stack(self.tokens[side][first : first + count], 1)
                stored = self.stored(side, states, first)
                self.tokens[side][first : first + count] = stored.unbind(1)
                self.packed[side] += count

    def stored(self, side, states, first):
        """What the codecs make of ``[H_kv, T, D]`` from row position ``first`` on, each head group
        by its own."""
        context = EncodeContext(torch.arange(first, first + states.shape[1])[None])
        decoded = torch.empty_like(states)
        for group in self.plan.groups:
            heads = list(range(len(states)) if group.heads is None else group.heads)
            codec = group.codec(side)
            encoded = codec.encode(states[None, heads], context)
            decoded[heads] = codec.decode(encoded, context)[0].to(states.dtype)
        return decoded

    def crop(self, length):
        """Forget tokens from ``length`` on; return how many went back to the residual."""
        num_returned = 0
        for side in SIDES:
            del self.tokens[side][length:]
            block = self.plan.block_tokens(side)
            reachable = max(0, length - self.plan.sink_tokens)
            if reachable < self.packed[side]:
                self.packed[side] = reachable // block * block
                num_returned += reachable - self.packed[side]
        return num_returned


class NaiveLayer:
    """A batch of naive rows with left padding."""

    def __init__(self, plan, padding):
        self.padding = list(padding)
        self.rows = [NaiveRow(plan) for _ in padding]
        self.num_tokens = 0
        self.num_reencoded_tokens = 0
        self.is_recording = False

    def update(self, key_states, value_states):
        for row, padding, keys, values in zip(
            self.rows, self.padding, key_states, value_states, strict=True
        ):
            first = max(0, padding - self.num_tokens)
            row.append(keys[:, first:], values[:, first:])
        self.num_tokens += key_states.shape[2]
        self._flush()

    def _flush(self):
        if not self.is_recording:
            for row in self.rows:
                row.flush()

    def crop(self, num_removed):
        self.num_tokens -= num_removed
        if num_removed:
            for row, padding in zip(self.rows, self.padding, strict=True):
                self.num_reencoded_tokens += row.crop(max(0, self.num_tokens - padding))
        if self.is_recording:
            for row in self.rows:
                row.flush()

    def map_rows(self, index):
        self.rows = [copy.deepcopy(self.rows[i]) for i in index]
        self.padding = [self.padding[i] for i in index]

    def assert_equals(self, layer):
        """The dense states, packed lengths and counters of ``layer`` are those of the oracle."""
        assert layer.num_tokens == self.num_tokens
        assert list(layer.padding) == self.padding
        assert layer.num_reencoded_tokens == self.num_reencoded_tokens
        states = layer.states()
        for side in SIDES:
            packed = [row.packed[side] for row in self.rows]
            assert layer.packed_lengths(side).tolist() == packed, side
            dense = states.dense(side)
            for index, (row, padding) in enumerate(zip(self.rows, self.padding, strict=True)):
                assert (dense[index, :, :padding] == 0).all()
                if len(row):
                    expected = torch.stack(row.tokens[side], 1)
                    assert torch.equal(dense[index, :, padding:], expected), (side, index)


def compare_histories(plan, seed, draw=random_states, steps=40):
    """Random operations on a layer and on a naive one: append, crop, move rows, record drafts,
    save and restore."""
    chance = random.Random(seed)
    padding = [0, chance.randrange(40), chance.randrange(5)]
    layer, naive = PackedLayer(plan), NaiveLayer(plan, padding)
    layer.set_padding(padding)
    for step in range(steps):
        action = chance.choice(["append", "append", "decode", "crop", "move", "record", "save"])
        if action == "crop":
            removed = chance.choice([0, 1, 5, chance.randrange(0, naive.num_tokens + 1)])
            removed = min(removed, naive.num_tokens)
            if naive.num_tokens:
                layer.crop(removed)
                naive.crop(removed)
        elif action == "move" and naive.num_tokens:
            size = chance.randint(1, 4)
            index = [chance.randrange(len(naive.padding)) for _ in range(size)]
            layer.map_rows(index)
            naive.map_rows(index)
        elif action == "record":
            layer.is_recording = naive.is_recording = not naive.is_recording
        elif action == "save" and naive.num_tokens:
            copied = PackedLayer(plan)
            copied.restore(*layer.export())
            copied.is_recording = layer.is_recording
            layer = copied
        else:
            count = 1 if action == "decode" else chance.choice([2, 30, 100])
            states = draw(count, rows=len(naive.padding), seed=1000 * seed + step)
            layer.update(*states)
            naive.update(*states)
        if naive.num_tokens:
            naive.assert_equals(layer)
