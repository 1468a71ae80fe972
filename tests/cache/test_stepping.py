"""A layer on kernels against the same layer in plain PyTorch: the same bytes after any history."""

from __future__ import annotations

import pytest
import torch

from kvbits.attention import api
from kvbits.attention.states import StepStates
from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton import support
from kvbits.cache.layer import PackedLayer
from kvbits.cache.stepping import Clock, Clocks
from kvbits.codecs import Affine, Codebook, Identity, NormScaled, Outliers, PreRope, Rotated
from kvbits.codecs.levels import lloyd_max, normal_float
from kvbits.errors import CalibrationError, KernelUnavailableError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan

pytest.importorskip("triton")

from kvbits.attention.triton.decode import shape_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM, QUERIES = 2, 64, 2


def channel(bits, group_size):
    return Affine(bits=bits, granularity="per_channel", group_size=group_size)


PLANS = {
    "token-4-2": LayerPlan.uniform(Affine(bits=4), Affine(bits=2)),
    "token-3-8": LayerPlan.uniform(Affine(bits=3), Affine(bits=8), residual_length=20),
    "token-2-groups": LayerPlan.uniform(
        Affine(bits=2), Affine(bits=2, group_size=16), residual_length=7, sink_tokens=5
    ),
    "kivi-32": LayerPlan.uniform(
        channel(2, 32), Affine(bits=2, group_size=32), residual_length=32
    ),
    "kivi-64-sinks": LayerPlan.uniform(channel(3, 64), Affine(bits=4), sink_tokens=3),
    "kivi-128": LayerPlan.uniform(channel(4, 128), Identity(), residual_length=20),
    "key-exact": LayerPlan.uniform(Identity(), Affine(bits=4), residual_length=10),
    "exact": LayerPlan.uniform(Identity(), Identity()),
    "head-groups": LayerPlan(
        groups=(
            HeadGroup(heads=(1,), key=channel(4, 32), value=Affine(bits=2)),
            HeadGroup(heads=(0,), key=Affine(bits=8), value=Affine(bits=3)),
        ),
        residual_length=32,
        sink_tokens=1,
    ),
}
ROTARY = tuple(10_000 ** (-i / 32) for i in range(32))
LEVELS = Codebook(levels=normal_float(3), granularity="per_channel", group_size=64)
TURBO = Rotated(inner=NormScaled(levels=lloyd_max(4)), sign_seed=5)
KVQUANT_KEY = Outliers(inner=LEVELS, slots=2, by="channel")
KVQUANT_VALUE = Outliers(inner=Codebook(levels=normal_float(4)), slots=2)
WRAPPED = {
    "turbo": LayerPlan.uniform(TURBO, TURBO, sink_tokens=2),
    "rotated-kivi": LayerPlan.uniform(
        Rotated(inner=channel(2, 32)), Rotated(inner=Affine(bits=2, group_size=16)),
        residual_length=20,
    ),
    "outliers": LayerPlan.uniform(KVQUANT_KEY, KVQUANT_VALUE, sink_tokens=1),
    "groups": LayerPlan(
        groups=(
            HeadGroup(heads=(1,), key=Affine(bits=4), value=Codebook(levels=normal_float(2))),
            HeadGroup(heads=(0,), key=Rotated(inner=Affine(bits=8)), value=Affine(bits=3)),
        ),
        residual_length=9,
    ),
}  # fmt: skip
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_padding = pytest.mark.parametrize("padding", [(0, 0), (3, 90)], ids=["even", "padded"])


def random_states(num_tokens, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, rows, num_tokens, HEADS, DIM, generator=generator)
    keys, values = states.to(torch.bfloat16).to(DEVICE).transpose(2, 3)
    keys[..., 3] += 20
    return keys, values


def before_a_flush(plan, padding=(0, 0)):
    """Tokens after which the third step packs a block of the padded row, if there are blocks."""
    exact = plan.sink_tokens + plan.residual_length
    return padding[1] + exact + max(2 * plan.quantum - 3, 8)


def new_layers(plan, padding, **settings):
    layers = [PackedLayer(plan, impl=impl, **settings) for impl in ("triton", "reference")]
    for layer in layers:
        layer.set_padding(padding)
    return layers


def feed(layers, states, chunks):
    start = layers[0].num_tokens
    for count in chunks:
        part = [side[:, :, start : start + count] for side in states]
        views = [layer.update(*part) for layer in layers]
        start += count
    return views


def assert_same_bytes(ours, theirs):
    tensors, facts = ours.export()
    reference, reference_facts = theirs.export()
    assert facts == reference_facts
    assert tensors.keys() == reference.keys()
    for side in SIDES:  # places of sinks and tail that no token owns are unspecified
        assert torch.equal(ours.states().dense(side), theirs.states().dense(side)), side
    for name in (name for name in tensors if name.split(".")[1] not in {"sinks", "tail"}):
        plain, other = (x.contiguous().view(torch.uint8) for x in (tensors[name], reference[name]))
        assert torch.equal(plain, other), name


@every_plan
@every_padding
def test_steps_and_chunks_store_the_bytes_of_the_reference(plan, padding):
    layers = new_layers(plan, padding)
    states = random_states(450)
    first = before_a_flush(plan, padding)
    views = feed(layers, states, [first, *[1] * 8, 30, *[1] * 4])
    assert isinstance(views[0], StepStates)
    assert_same_bytes(*layers)


@pytest.fixture
def _all_is_readable(monkeypatch):
    """Steps are appended whether or not a kernel attends to what they store."""
    monkeypatch.setattr(support, "unsupported", lambda *plan_and_dims: None)


@pytest.mark.usefixtures("_all_is_readable")
@pytest.mark.parametrize("plan", WRAPPED.values(), ids=WRAPPED)
def test_steps_of_wrapped_states_store_the_bytes_of_the_reference(plan):
    padding = (0, 11)
    layers = new_layers(plan, padding)
    first = before_a_flush(plan, padding) - plan.quantum
    views = feed(layers, random_states(200), [first, *[1] * 4, max(plan.quantum - 4, 5), *[1] * 3])
    assert isinstance(views[0], StepStates)
    assert_same_bytes(*layers)


@pytest.mark.usefixtures("_all_is_readable")
def test_keys_that_are_turned_back_are_the_same_by_steps_as_by_a_prompt():
    plan = LayerPlan.uniform(
        PreRope(inner=KVQUANT_KEY, frequencies=ROTARY), KVQUANT_VALUE, sink_tokens=3
    )
    layers = [PackedLayer(plan, impl="triton") for _ in range(2)]
    states = random_states(133)
    feed(layers[:1], states, [65, 1, 1, 1, 61, *[1] * 4])
    feed(layers[1:], states, [133])
    assert layers[0].packed_lengths("key").tolist() == [128, 128]
    assert_same_bytes(*layers)


def test_steps_refuse_what_a_rotated_codec_cannot_hold():
    """One channel may take the whole norm, so every state has a share of what that may be."""
    plan, (keys, values) = WRAPPED["turbo"], random_states(20)
    limit = TURBO.largest_magnitude(DIM)
    for bad in (0.99 * limit, 1.01 * limit):
        layer = new_layers(plan, (0, 0))[0]
        feed([layer], (keys, values), [12, 1])
        values[1, 0, 13, 3] = bad
        feed([layer], (keys, values), [1])
        if bad <= limit:
            layer.check_finite()
        else:
            with pytest.raises(CalibrationError, match="value_states must be finite"):
                layer.check_finite()


@pytest.mark.parametrize("name", ["token-2-groups", "kivi-32", "head-groups"])
def test_steps_from_the_first_token_on(name):
    """One row is padding until its last token."""
    layers = new_layers(PLANS[name], (0, 69))
    feed(layers, random_states(70), [1] * 70)
    assert_same_bytes(*layers)


@every_plan
def test_room_reserved_is_room_used(plan):
    """With max_tokens no page, table or ring moves while there is room."""
    first = before_a_flush(plan)
    layers = new_layers(plan, (0, 0), max_tokens=first + 12)
    states = random_states(first + 12)
    feed(layers, states, [first])

    def places():
        stores = [store for side in SIDES for store in layers[0].stores(side)]
        return [(store.pool.data_ptr(), store.table.data_ptr()) for store in stores]

    before, size = places(), layers[0].nbytes
    feed(layers, states, [1] * 12)
    assert places() == before
    assert layers[0].nbytes == size
    assert_same_bytes(*layers)


@every_plan
@every_padding
def test_a_crop_and_moved_rows_end_steps_and_steps_go_on(plan, padding):
    layers = new_layers(plan, padding)
    states = random_states(450)
    feed(layers, states, [before_a_flush(plan, padding) + 50, *[1] * 5])
    for act in (
        lambda layer: layer.crop(9),
        lambda layer: layer.map_rows([1, 0]),
        lambda layer: layer.crop(40),
        lambda layer: layer.map_rows([0, 0, 1]),
    ):
        for layer in layers:
            act(layer)
        states = random_states(450, rows=len(layers[0].padding))
        feed(layers, states, [1, 1])
        assert_same_bytes(*layers)


@every_plan
@every_padding
@pytest.mark.parametrize("num_queries", [1, 5])
def test_attention_of_kernels_is_that_of_the_reference(plan, padding, num_queries):
    layers = new_layers(plan, padding)
    states = random_states(450)
    feed(layers, states, [before_a_flush(plan, padding), 1, 1])
    views = feed(layers, states, [num_queries])
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, HEADS * QUERIES, num_queries, DIM, generator=generator)
    query = query.to(torch.bfloat16).to(DEVICE)
    ours, theirs = (api.attend(query, view, None, DIM**-0.5).double().cpu() for view in views)
    # Both round a probability-weighted sum to bfloat16; see test_triton_decode.py.
    assert (ours - theirs).norm() < 6e-3 * theirs.norm()


def test_steps_of_another_impl_are_none():
    layer = PackedLayer(PLANS["token-4-2"], impl="reference")
    views = feed([layer], random_states(20), [10, 1])
    assert not isinstance(views[0], StepStates)


def test_recording_holds_steps_back():
    """Drafts must never reach pages, so their steps go the host's way."""
    layers = new_layers(PLANS["token-4-2"], (0, 0))
    states = random_states(90)
    feed(layers, states, [50])
    for layer in layers:
        layer.is_recording = True
    feed(layers, states, [1] * 5)
    for layer in layers:
        layer.crop(2)
        layer.is_recording = False
    feed(layers, states, [1] * 20)
    assert_same_bytes(*layers)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_with_states_that_are_not_finite_is_reported(side, bad):
    layer = PackedLayer(PLANS["token-4-2"], impl="triton")
    keys, values = random_states(12)
    layer.update(keys[:, :, :10], values[:, :, :10])
    layer.update(keys[:, :, 10:11], values[:, :, 10:11])
    layer.check_finite()
    new = {"key": keys[:, :, 11:].clone(), "value": values[:, :, 11:].clone()}
    new[side][1, 1, 0, 5] = bad
    layer.update(new["key"], new["value"])
    with pytest.raises(CalibrationError, match=f"{side}_states must be finite"):
        layer.check_finite()


def test_states_that_are_not_finite_may_lie_in_padding():
    layer = PackedLayer(PLANS["token-4-2"], impl="triton")
    layer.set_padding([0, 12])
    keys, values = random_states(12)
    keys[1], values[1] = torch.nan, torch.inf
    layer.update(keys[:, :, :10], values[:, :, :10])
    layer.update(keys[:, :, 10:11], values[:, :, 10:11])
    layer.check_finite()


@pytest.mark.parametrize(
    ("plan", "dtype", "rule"),
    [
        (
            LayerPlan.uniform(Affine(bits=4, symmetric=True), Affine(bits=4)),
            None,
            "must be one that kernels know",
        ),
        (LayerPlan.uniform(Affine(bits=4), channel(4, 32)), None, "values must share scales"),
        (
            LayerPlan.uniform(
                channel(2, 32), Affine(bits=2), residual_length=32, flush="independent"
            ),
            None,
            "flush must be 'joint'",
        ),
        (LayerPlan.uniform(Affine(bits=4), Affine(bits=4)), torch.float32, "must be bfloat16"),
    ],
    ids=["symmetric", "channel values", "independent flush", "float32"],
)
def test_what_no_kernel_takes_is_refused_or_runs_as_reference(plan, dtype, rule):
    keys, values = (x.to(dtype or x.dtype) for x in random_states(70))
    with pytest.raises(KernelUnavailableError, match=rule):
        PackedLayer(plan, impl="triton").update(keys, values)
    layer = PackedLayer(plan, impl="auto")
    layer.update(keys, values)
    assert layer.impl == "reference"
    view = layer.update(keys[:, :, :1], values[:, :, :1])
    assert view.impl == "reference"


def test_a_clock_is_filled_or_counts_by_one():
    clock = Clock(DEVICE)
    for num_tokens in (5, 6, 6, 7, 3):
        clock.set(num_tokens)
        assert clock.device_tokens.item() == num_tokens
    clocks = Clocks()
    assert clocks.on(DEVICE) is clocks.on(DEVICE)


@every_plan
def test_the_shape_inspect_shows_is_the_shape_a_step_has(plan):
    layer = PackedLayer(plan, impl="triton")
    layer.update(*random_states(399))
    kernel = layer.update(*random_states(1)).kernel
    shapes = [shape_of(group, kernel, QUERIES, 1) for group in kernel.groups]
    geometry = LayerGeometry(
        layer_type="full_attention",
        num_key_value_heads=HEADS,
        key_head_dim=DIM,
        value_head_dim=DIM,
    )
    assert shapes == schedules.decode_shapes(plan, geometry, HEADS * QUERIES, 400, batch=2)


def attention(layers, num_queries, states, **options):
    """Attention of the next queries by both layers, float64 ``[B, Q, H_q, D]``."""
    views = feed(layers, states, [num_queries])
    generator = torch.Generator().manual_seed(3)
    rows = len(layers[0].padding)
    query = torch.randn(rows, HEADS * QUERIES, num_queries, DIM, generator=generator)
    query = query.to(torch.bfloat16).to(DEVICE)
    return [api.attend(query, view, None, DIM**-0.5, **options).double().cpu() for view in views]


def assert_same_attention(layers, num_queries, states, **options):
    ours, theirs = attention(layers, num_queries, states, **options)
    # Both round a probability-weighted sum to bfloat16; see test_triton_decode.py.
    assert (ours - theirs).norm() < 6e-3 * theirs.norm()


@every_plan
def test_the_first_token_alone_is_attended_to(plan):
    assert_same_attention(new_layers(plan, (0, 0)), 1, random_states(4))


@pytest.mark.parametrize("name", ["token-4-2", "token-3-8", "kivi-64-sinks", "head-groups"])
def test_a_step_that_is_held_back_is_attended_to(name):
    """Its exact tokens lie in a plain tail, not in the ring."""
    layers = new_layers(PLANS[name], (0, 60))
    states = random_states(450)
    feed(layers, states, [200])
    for layer in layers:
        layer.is_recording = True
    for _ in range(3):
        assert_same_attention(layers, 1, states)


@every_plan
def test_rows_that_were_copied_write_to_pages_of_their_own(plan):
    """Room reserved for a row must not be shared with its copies."""
    layers = new_layers(plan, (0, 0), max_tokens=400)
    feed(layers, random_states(150), [150])
    for layer in layers:
        layer.map_rows([0, 0, 1, 0])
    feed(layers, random_states(400, rows=4, seed=2), [1] * 150)
    assert_same_bytes(*layers)


def test_a_row_cut_back_writes_to_pages_of_its_own():
    layers = new_layers(PLANS["token-4-2"], (0, 0), max_tokens=400)
    feed(layers, random_states(300), [300])
    for layer in layers:
        layer.map_rows([0, 0])
        layer.crop(170)
    feed(layers, random_states(400, seed=2), [1] * 100)
    assert_same_bytes(*layers)


@pytest.mark.parametrize("plan", [PLANS["token-4-2"], PLANS["exact"]], ids=["token", "exact"])
@pytest.mark.parametrize(("window", "num_queries"), [(64, 64), (20, 90), (130, 33)])
def test_every_query_of_a_chunk_sees_its_own_window(plan, window, num_queries):
    layers = new_layers(plan, (0, 7))
    states = random_states(450)
    feed(layers, states, [256])
    assert_same_attention(layers, num_queries, states, window=window)


def test_groups_of_different_blocks_flush_together():
    plan = LayerPlan(
        groups=(
            HeadGroup(heads=(1,), key=channel(4, 32), value=Affine(bits=2)),
            HeadGroup(heads=(0,), key=channel(2, 64), value=Affine(bits=4)),
        ),
        residual_length=5,
    )
    layers = new_layers(plan, (0, 9))
    states = random_states(400)
    feed(layers, states, [70, *[1] * 140])
    assert_same_bytes(*layers)
    assert_same_attention(layers, 1, states)


def test_rings_of_different_size_are_left_to_the_host():
    layers = new_layers(PLANS["kivi-32"], (0, 0))
    states = random_states(450)
    feed(layers, states, [200])
    for layer in layers:
        layer.crop(60)
        layer.is_recording = True
    feed(layers, states, [50, 5])
    for layer in layers:
        layer.crop(0)
        layer.is_recording = False
    for _ in range(40):
        assert_same_attention(layers, 1, states)
    assert_same_bytes(*layers)


def test_rows_of_a_ragged_batch_get_their_pages_together(monkeypatch):
    """Each row alone would rebuild the table at a step of its own."""
    layer = PackedLayer(PLANS["token-4-2"], impl="triton")
    layer.set_padding((0, 10, 20, 30))
    states = random_states(400, rows=4)
    feed([layer], states, [100, 1])
    tables = set()
    for _ in range(128):
        feed([layer], states, [1])
        tables.add(layer.stores("key")[0].table.data_ptr())
    assert len(tables) <= 3
