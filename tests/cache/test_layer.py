"""The laws of one packed layer, over every plan; the oracle is in ``naive_layer.py``."""

from __future__ import annotations

import pytest
import torch
from naive_layer import (
    HEADS,
    KEY_DIM,
    LIBRARY_PLANS,
    PLANS,
    VALUE_DIM,
    NaiveLayer,
    compare_histories,
    random_states,
)

from kvbits.cache.layer import PackedLayer
from kvbits.codecs import Affine
from kvbits.codecs.pages import PageStore
from kvbits.errors import CalibrationError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan
from kvbits.memory import layer_bytes

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
library_plan = pytest.mark.parametrize("plan", LIBRARY_PLANS.values(), ids=LIBRARY_PLANS)


def filled(plan, states, chunks=None, padding=None, **settings):
    """A layer that got ``states`` in chunks of the given sizes (default: at once)."""
    keys, values = states
    layer = PackedLayer(plan, **settings)
    layer.set_padding(padding or [0] * len(keys))
    start = 0
    for count in chunks or [keys.shape[2]]:
        layer.update(keys[:, :, start : start + count], values[:, :, start : start + count])
        start += count
    assert start == keys.shape[2]
    return layer


def snapshot(layer):
    """Every stored byte: pages per side and group, sinks and residual."""
    tensors, _ = layer.export()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_state(one, other):
    ours, theirs = snapshot(one), snapshot(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for side in SIDES:
        assert one.packed_lengths(side).tolist() == other.packed_lengths(side).tolist()
    assert one.num_tokens == other.num_tokens


def row_planes(layer, side, row, num_tokens):
    """Raw bytes of the first packed tokens of one row, group by group, padding pages left out."""
    planes = []
    for store in layer.stores(side):
        count = -(-num_tokens // store.page_tokens)
        pages = store.export_pages()
        for name, plane in pages.items():
            own = plane.unflatten(0, (len(store.lengths), -1))[row, :count]
            planes.append((name, own.clone()))
    return planes


def packed_bytes_of_tokens(layer, side, row, stop):
    """Codes and parameters of packed tokens 0..stop of a row, in token order."""
    found = []
    for store in layer.stores(side):
        codes, parameters = store._encoded(store._gather(0, -(-stop // store.page_tokens)))
        found.append(codes[row, :, :stop].clone())
        for spec in store._specs:
            found.append(parameters[spec.name][row, :, : stop // spec.block_tokens].clone())
    return found


# ----- appending


@every_plan
@pytest.mark.parametrize("padding", [[0, 0], [3, 90]], ids=["even", "padded"])
def test_states_are_those_of_the_naive_layer(plan, padding):
    keys, values = random_states(230)
    layer, naive = PackedLayer(plan), NaiveLayer(plan, padding)
    layer.set_padding(padding)
    start = 0
    for count in (5, 1, 1, 120, 1, 64, 1, 37):
        chunk = (keys[:, :, start : start + count], values[:, :, start : start + count])
        layer.update(*chunk)
        naive.update(*chunk)
        naive.assert_equals(layer)
        start += count


@every_plan
@pytest.mark.parametrize("padding", [[0, 0], [3, 90]], ids=["even", "padded"])
def test_chunked_appends_store_the_bytes_of_one_append(plan, padding):
    states = random_states(260)
    whole = filled(plan, states, padding=padding)
    for chunks in ([1] * 260, [100, 1, 1, 1, 64, 32, 61], [259, 1]):
        layer = filled(plan, states, chunks, padding=padding)
        assert_same_state(layer, whole)
        assert layer.nbytes == whole.nbytes


@every_plan
def test_a_padded_row_stores_the_bytes_it_would_store_alone(plan):
    """Also rows shorter than the sinks, and rows that are padding to the last token."""
    states = random_states(200, rows=5)
    padding = [0, 7, 100, 198, 200]
    for chunks in ([200], [90, 1, 1, 108], [1] * 200):
        layer = filled(plan, states, chunks, padding=padding)
        for row, pad in enumerate(padding[:-1]):
            alone = filled(plan, tuple(side[row : row + 1, :, pad:] for side in states))
            for side in SIDES:
                (packed,) = alone.packed_lengths(side).tolist()
                assert layer.packed_lengths(side)[row] == packed
                ours = row_planes(layer, side, row, packed)
                theirs = row_planes(alone, side, 0, packed)
                for (name, plane), (_, own) in zip(ours, theirs, strict=True):
                    assert torch.equal(plane, own), (side, name)
                dense = layer.states().dense(side)[row, :, pad:]
                assert torch.equal(dense, alone.states().dense(side)[0])
        assert all(layer.packed_lengths(side)[-1] == 0 for side in SIDES)


@every_plan
def test_what_padding_holds_does_not_matter(plan):
    """Pads are never encoded: even NaN there changes no byte."""
    keys, values = random_states(150)
    layers = []
    for junk in (0.0, 1e4, torch.nan):
        keys[1, :, :60] = values[1, :, :60] = junk
        layers.append(filled(plan, (keys, values), [70, 1, 79], padding=[0, 60]))
    ours = layers[0].states()
    for other in layers[1:]:
        for side in SIDES:
            assert torch.equal(ours.dense(side), other.states().dense(side))
            (long, short) = layers[0].packed_lengths(side).tolist()
            for row, count in ((0, long), (1, short)):
                ours_bytes = packed_bytes_of_tokens(layers[0], side, row, count)
                for a, b in zip(
                    ours_bytes, packed_bytes_of_tokens(other, side, row, count), strict=True
                ):
                    assert torch.equal(a, b)


@every_plan
def test_codes_never_change_after_they_are_written(plan):
    keys, values = random_states(330)
    layer = filled(plan, (keys[:, :, :130], values[:, :, :130]))
    packed = {side: int(layer.packed_lengths(side)[0]) for side in SIDES}
    before = {
        side: [packed_bytes_of_tokens(layer, side, row, packed[side]) for row in (0, 1)]
        for side in SIDES
    }
    for t in range(130, 330):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    for side in SIDES:
        for row in (0, 1):
            after = packed_bytes_of_tokens(layer, side, row, packed[side])
            for old, new in zip(before[side][row], after, strict=True):
                assert torch.equal(old, new)


class EncodeCounter:
    """Counts the tokens and calls of the one place that encodes."""

    def __init__(self, monkeypatch):
        self.tokens = self.calls = 0
        real = PageStore.append

        def counted(store, states, rows=None):
            self.calls += 1
            self.tokens += states.shape[0] * states.shape[1] * states.shape[2]
            return real(store, states, rows)

        monkeypatch.setattr(PageStore, "append", counted)


@every_plan
def test_a_token_is_encoded_exactly_once(plan, monkeypatch):
    states = random_states(300)
    counter = EncodeCounter(monkeypatch)
    layer = filled(plan, states, [100] + [1] * 200)
    packed = sum(int(layer.packed_lengths(side).sum()) for side in SIDES)
    assert counter.tokens == packed * HEADS
    assert layer.num_reencoded_tokens == 0


@every_plan
def test_after_any_number_of_steps_every_group_is_full(plan):
    layer = PackedLayer(plan)
    for t in range(150):
        layer.update(*random_states(1, seed=t))
        for side in SIDES:
            block = plan.block_tokens(side)
            assert (layer.packed_lengths(side) % block == 0).all()


@every_plan
def test_the_newest_tokens_stay_exact_and_no_more_than_promised(plan):
    """R to R + quantum - 1 under joint flush; the papers' rule otherwise."""
    keys, values = random_states(300)
    layer = PackedLayer(plan)
    for t in range(300):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        exact = {
            side: max(0, t + 1 - plan.sink_tokens) - int(layer.packed_lengths(side)[0])
            for side in SIDES
        }
        if any(layer.packed_lengths(side)[0] for side in SIDES):
            if plan.flush == "joint":
                assert exact["key"] == exact["value"]
                assert 0 <= exact["key"] - plan.residual_length < plan.quantum
            else:
                assert exact["value"] == plan.residual_length
                assert 0 <= exact["key"] < plan.residual_length
        if t % 9:
            continue
        first = t + 1 - min(exact.values())
        for side, states in zip(SIDES, (keys, values), strict=True):
            dense = layer.states().dense(side)
            sinks = plan.sink_tokens
            assert torch.equal(dense[:, :, :sinks], states[:, :, : min(sinks, t + 1)])
            assert torch.equal(dense[:, :, first:], states[:, :, first : t + 1])


@every_plan
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_keep_their_dtype(plan, dtype):
    keys, values = random_states(150, dtype=dtype)
    layer, naive = filled(plan, (keys, values), [100, 1, 49]), NaiveLayer(plan, [0, 0])
    naive.update(keys, values)
    naive.assert_equals(layer)
    assert layer.states().dense("key").dtype == dtype


# ----- a decode step does constant work


@every_plan
def test_a_decode_step_encodes_only_what_leaves_the_residual(plan, monkeypatch):
    layer = filled(plan, random_states(300))
    counter = EncodeCounter(monkeypatch)
    for t in range(140):
        before = sum(int(layer.packed_lengths(side).sum()) for side in SIDES)
        counter.tokens = counter.calls = 0
        layer.update(*random_states(1, seed=t))
        after = sum(int(layer.packed_lengths(side).sum()) for side in SIDES)
        assert counter.tokens == (after - before) * HEADS
        assert counter.calls <= 2 * len(plan.groups)


@every_plan
def test_a_decode_step_reads_no_page(plan, monkeypatch):
    layer = filled(plan, random_states(300))
    monkeypatch.setattr(PageStore, "read", lambda *_: pytest.fail("a page was read"))
    for t in range(70):
        layer.update(*random_states(1, seed=t))
    assert layer.num_tokens == 370


# ----- crop


@every_plan
@pytest.mark.parametrize("padding", [[0, 0], [3, 90]], ids=["even", "padded"])
def test_crop_at_any_boundary_equals_the_naive_layer_and_continues(plan, padding):
    keys, values = random_states(300)
    for removed in (1, 7, 32, 33, 70, 129, 170, 207, 210):
        layer = filled(plan, (keys[:, :, :210], values[:, :, :210]), [150, 1, 59], padding)
        naive = NaiveLayer(plan, padding)
        naive.update(keys[:, :, :210], values[:, :, :210])
        layer.crop(removed)
        naive.crop(removed)
        naive.assert_equals(layer)
        for start, stop in ((210, 211), (211, 260), (260, 300)):
            chunk = keys[:, :, start:stop], values[:, :, start:stop]
            layer.update(*chunk)
            naive.update(*chunk)
            naive.assert_equals(layer)


@every_plan
def test_a_crop_leaves_the_bytes_of_untouched_blocks(plan):
    layer = filled(plan, random_states(290))
    packed = {side: int(layer.packed_lengths(side)[0]) for side in SIDES}
    before = {side: packed_bytes_of_tokens(layer, side, 0, packed[side]) for side in SIDES}
    layer.crop(150)
    layer.update(*random_states(40, seed=4))
    for side in SIDES:
        block = plan.block_tokens(side)
        kept = min(packed[side], (140 - plan.sink_tokens) // block * block)
        stores = layer.stores(side)
        after = packed_bytes_of_tokens(layer, side, 0, kept)
        place = 0
        for store in stores:
            for spec in (None, *store._specs):
                count = kept if spec is None else kept // spec.block_tokens
                assert torch.equal(before[side][place][:, :count], after[place])
                place += 1


def test_only_a_cut_block_is_counted_as_reencoded():
    """Keys in blocks of 32: 64 + 96 packed, cut at 75 leaves 64, 11 keys go back; values none."""
    layer = filled(PLANS["kivi-32"], random_states(200, rows=1))
    assert [int(layer.packed_lengths(side)[0]) for side in SIDES] == [160, 160]
    layer.crop(125)
    assert layer.num_reencoded_tokens == 11
    assert [int(layer.packed_lengths(side)[0]) for side in SIDES] == [64, 75]


@pytest.mark.parametrize("name", ["token-2", "token-3", "token-8-groups", "independent-token"])
def test_per_token_codes_are_truncated_never_reencoded(name, monkeypatch):
    layer = filled(PLANS[name], random_states(200))
    counter = EncodeCounter(monkeypatch)
    for removed in (1, 3, 50, 77):
        layer.crop(removed)
    assert counter.tokens == layer.num_reencoded_tokens == 0


@every_plan
def test_crop_of_nothing_changes_no_state(plan):
    layer = filled(plan, random_states(200), padding=[0, 30])
    before, size = snapshot(layer), layer.nbytes
    layer.crop(0)
    after = snapshot(layer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert layer.nbytes == size
    assert layer.num_reencoded_tokens == 0


@every_plan
def test_crop_of_more_than_there_is_empties_the_layer(plan):
    layer = filled(plan, random_states(100))
    layer.crop(1000)
    assert layer.num_tokens == 0
    states = random_states(120, seed=3)
    layer.update(*states)
    layer.num_reencoded_tokens = 0
    naive = NaiveLayer(plan, [0, 0])
    naive.update(*states)
    naive.assert_equals(layer)


def test_cropping_an_empty_layer_is_harmless():
    layer = PackedLayer(PLANS["kivi-32"])
    layer.crop(5)
    layer.map_rows([1, 0])
    assert layer.num_tokens == 0
    assert layer.nbytes == 0


# ----- rows


@every_plan
@pytest.mark.parametrize("index", [[1, 0], [0, 0], [1], [0, 0, 1, 1], [1, 1, 0]])
def test_moved_rows_equal_moved_rows_of_the_naive_layer(plan, index):
    padding = [0, 40]
    layer, naive = PackedLayer(plan), NaiveLayer(plan, padding)
    layer.set_padding(padding)
    states = random_states(190)
    more = random_states(80, rows=len(index), seed=1)
    for each in (layer, naive):
        each.update(*states)
        each.map_rows(index)
    naive.assert_equals(layer)
    for start, stop in ((0, 1), (1, 2), (2, 80)):
        chunk = tuple(side[:, :, start:stop] for side in more)
        layer.update(*chunk)
        naive.update(*chunk)
        naive.assert_equals(layer)
    layer.crop(90)
    naive.crop(90)
    naive.assert_equals(layer)


@every_plan
@pytest.mark.parametrize("seed", range(2))
def test_any_history_equals_the_naive_layer(plan, seed):
    compare_histories(plan, seed)


@library_plan
def test_any_history_of_a_librarys_codes_equals_the_naive_layer(plan):
    compare_histories(plan, seed=0, steps=25)


# ----- drafts


@every_plan
def test_recorded_drafts_never_reach_pages(plan):
    """Held back until the crop, which then stores what a layer without drafts would store."""
    keys, values = random_states(160)
    layer = filled(plan, (keys[:, :, :120], values[:, :, :120]))
    before = {side: layer.packed_lengths(side).tolist() for side in SIDES}
    layer.is_recording = True
    layer.update(keys[:, :, 120:], values[:, :, 120:])
    layer.update(*random_states(5, seed=9))
    assert {side: layer.packed_lengths(side).tolist() for side in SIDES} == before
    layer.crop(5)
    assert layer.is_recording
    assert layer.num_reencoded_tokens == 0
    assert_same_state(layer, filled(plan, (keys, values)))


# ----- what is refused


def needs_float16_range(plan, side):
    head_dim = KEY_DIM if side == "key" else VALUE_DIM
    return any(group.codec(side).largest_magnitude(head_dim) < 1e5 for group in plan.groups)


@every_plan
@pytest.mark.parametrize("side", SIDES)
def test_values_that_cannot_be_stored_are_refused_and_nothing_is_stored(plan, side):
    layer = filled(plan, random_states(70), layer_idx=5)
    before = snapshot(layer)
    beyond_float16 = [1e5] if needs_float16_range(plan, side) else []
    for bad in (torch.nan, torch.inf, -torch.inf, *beyond_float16):
        for count in (1, 40):
            keys, values = random_states(count)
            (keys if side == "key" else values)[1, 2, -1, 3] = bad
            with pytest.raises(CalibrationError, match=f"{side}_states .* layer 5"):
                layer.update(keys, values)
    after = snapshot(layer)
    assert layer.num_tokens == 70
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_limit_is_not_rounded_up_to_the_dtype_of_the_states():
    """65504 is no bfloat16; the next above it, 65536, has no fp16 offset."""
    keys, values = random_states(20, dtype=torch.bfloat16)
    values[0, 0, 3, 3] = -65536.0
    with pytest.raises(CalibrationError, match="value_states must be finite and at most 65504"):
        filled(PLANS["token-4"], (keys, values))


def test_float32_scales_hold_values_beyond_float16():
    codec = Affine(bits=8, parameter_dtype="float32")
    keys, values = random_states(20)
    keys[0, 0, 3, 3] = 3e5
    layer = filled(LayerPlan.uniform(codec, codec), (keys, values))
    assert layer.states().dense("key")[0, 0, 3, 3] == pytest.approx(3e5, rel=1e-5)


def test_states_of_another_shape_are_refused():
    layer = filled(PLANS["token-4"], random_states(10))
    keys, values = random_states(3)
    with pytest.raises(ValueError, match=r"key_states must have shape \(2, 3, 3, 16\) .*got"):
        layer.update(keys[:, :2], values)
    with pytest.raises(ValueError, match=r"value_states must have shape .*got \(1, 3, 3, 24\)"):
        layer.update(keys, values[:1])


def test_head_groups_must_name_every_head():
    plan = LayerPlan(
        groups=(
            HeadGroup(heads=(0,), key=Affine(bits=4), value=Affine(bits=4)),
            HeadGroup(heads=(1,), key=Affine(bits=2), value=Affine(bits=2)),
        )
    )
    with pytest.raises(ValueError, match="must have the 2 heads that layer 7 of the plan names"):
        filled(plan, random_states(3), layer_idx=7)


def test_padding_may_not_change_under_stored_tokens():
    layer = filled(PLANS["token-2"], random_states(10), padding=[0, 3])
    with pytest.raises(ValueError, match=r"padding must not change .*got \[1, 3\]"):
        layer.set_padding([1, 3])


def test_padding_of_a_row_without_real_tokens_may_still_grow():
    """A chunked prefill shows a long-padded row nothing but zeros in its first chunks."""
    plan = PLANS["kivi-32"]
    states = random_states(150)
    layer = PackedLayer(plan)
    layer.set_padding([0, 20])
    layer.update(*(side[:, :, :20] for side in states))
    layer.set_padding([0, 35])
    layer.update(*(side[:, :, 20:] for side in states))
    assert_same_state(layer, filled(plan, states, padding=[0, 35]))


# ----- files and bytes


@every_plan
def test_a_saved_layer_is_restored_bit_for_bit_and_continues(plan):
    keys, values = random_states(250)
    layer = filled(plan, (keys[:, :, :170], values[:, :, :170]), padding=[0, 45])
    layer.crop(10)
    copy = PackedLayer(plan)
    copy.restore(*layer.export())
    assert_same_state(copy, layer)
    assert copy.num_reencoded_tokens == layer.num_reencoded_tokens
    for start, stop in ((170, 171), (171, 250)):
        for each in (layer, copy):
            each.update(keys[:, :, start:stop], values[:, :, start:stop])
    assert_same_state(copy, layer)


def walk_bytes(layer):
    """Bytes of every distinct storage reachable from the layer, but for constants of the plan."""
    found, seen = {}, set()

    def visit(thing):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for item in thing.values():
                visit(item)
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                visit(item)
        elif type(thing).__module__.startswith("kvbits.cache") or isinstance(thing, PageStore):
            for name, item in vars(thing).items():
                if name != "_positions":
                    visit(item)

    for storage in layer._sides.values():
        visit(storage.sinks)
        visit(storage.ring.buffer)
        for store, _ in storage.stores:
            visit(store)
    return sum(found.values())


@every_plan
def test_reported_bytes_are_allocated_bytes_and_the_formula(plan):
    """Views into larger storages would count more here than ``nbytes`` reports."""
    geometry = LayerGeometry(
        layer_type="full_attention",
        num_key_value_heads=HEADS,
        key_head_dim=KEY_DIM,
        value_head_dim=VALUE_DIM,
    )
    for dtype, state_bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        layer = PackedLayer(plan)
        for step, count in enumerate((90, 1, 1, 50, 1, 64, 1, 200, 1)):
            layer.update(*random_states(count, seed=step, dtype=dtype))
            expected = layer_bytes(plan, geometry, layer.num_tokens, 2, state_bits)
            assert layer.nbytes == walk_bytes(layer) == expected


@every_plan
def test_peak_bytes_count_the_moment_before_packing(plan):
    layer = filled(plan, random_states(200))
    assert layer.peak_nbytes >= layer.nbytes
    assert layer.peak_nbytes >= sum(side.nbytes for side in random_states(200))


@every_plan
def test_moving_to_a_device_keeps_the_states(plan):
    layer = filled(plan, random_states(150))
    before = snapshot(layer)
    layer.to(torch.device("cpu"))
    after = snapshot(layer)
    assert all(torch.equal(before[name], after[name]) for name in before)
