"""The page store: bytes where the layout says, rows of their own, sharing and copying on write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvbits.codecs import Affine, Identity
from kvbits.codecs.packing import page_capacity, page_tokens
from kvbits.codecs.pages import PageStore
from kvbits.memory import page_bytes, store_bytes
from kvbits.testing import pack_naively, value_position

CODECS = [
    pytest.param(codec, id=name)
    for name, codec in {
        "token-2": Affine(bits=2),
        "token-3": Affine(bits=3),
        "token-4-groups": Affine(bits=4, group_size=8),
        "token-8-symmetric": Affine(bits=8, symmetric=True),
        "token-4-float32": Affine(bits=4, parameter_dtype="float32"),
        "channel-2-32": Affine(bits=2, granularity="per_channel", group_size=32),
        "channel-3-64": Affine(bits=3, granularity="per_channel", group_size=64),
        "channel-4-128": Affine(bits=4, granularity="per_channel", group_size=128),
        "channel-4-24": Affine(bits=4, granularity="per_channel", group_size=24),
        "identity": Identity(),
    }.items()
]
both_sides = pytest.mark.parametrize("side", ["key", "value"])
HEADS, DIM = 2, 16


def new_store(codec, side="key", rows=2, dtype=torch.float32):
    return PageStore(
        codec,
        side=side,
        num_heads=HEADS,
        head_dim=DIM,
        num_rows=rows,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def random_states(num_tokens, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, num_tokens, DIM, generator=generator)


def decoded_alone(codec, states):
    return codec.decode(codec.encode(states))


def blocks(codec, *counts):
    """Token counts that are whole blocks: about as many as asked for."""
    return [-(-count // codec.block_tokens) * codec.block_tokens for count in counts]


def walk_bytes(store):
    """Bytes of every tensor that the attributes of a store lead to, each storage once."""
    found = {}

    def visit(thing):
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for item in thing.values():
                visit(item)
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                visit(item)

    for name, attribute in vars(store).items():
        if name != "_positions":  # a constant of the layout, not states
            visit(attribute)
    return sum(found.values())


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_appends_read_back_as_the_codec_decodes_them(codec, side):
    store, parts, total = new_store(codec, side), [], 0
    for seed, count in enumerate(blocks(codec, 100, 1, 1, 70, 200)):
        states = random_states(count, seed=seed)
        store.append(states)
        parts.append(decoded_alone(codec, states))
        total += count
    expected = torch.cat(parts, -2)
    assert store.lengths == [total, total]
    assert torch.equal(store.read(0, total), expected)
    for start, stop in ((0, 1), (63, 65), (64, 128), (17, total - 3), (total - 1, total)):
        assert torch.equal(store.read(start, stop), expected[:, :, start:stop])


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_an_empty_span_reads_as_no_tokens(codec, side):
    store = new_store(codec, side)
    assert store.read(0, 0).shape == (2, HEADS, 0, DIM)
    store.append(random_states(codec.block_tokens))
    assert store.read(0, 0).shape == (2, HEADS, 0, DIM)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_key_pages_hold_token_rows_and_value_pages_are_transposed(bits):
    """Every stored byte is where the documented picture puts it."""
    codec, states = Affine(bits=bits), random_states(70, rows=1)
    codes = codec.encode(states).codes.numpy()
    keys, values = (new_store(codec, side, rows=1) for side in ("key", "value"))
    for store in (keys, values):
        store.append(states)
    key_pages = keys.export_pages()["codes"].numpy()
    value_pages = values.export_pages()["codes"].numpy()
    assert key_pages.shape == (2, HEADS, 64, DIM * bits // 8)
    assert value_pages.shape == (2, HEADS, DIM * bits // 8, 64)
    for token in (0, 1, 7, 8, 31, 32, 63, 64, 69):
        page, slot = divmod(token, 64)
        for head in range(HEADS):
            expected = pack_naively(codes[0, head, token], bits)
            np.testing.assert_array_equal(key_pages[page, head, slot], expected)
            where = value_position(slot)
            np.testing.assert_array_equal(value_pages[page, head, :, where], expected)


def test_scale_and_offset_lie_as_pairs():
    """Per token ``[pages, H, rows, tokens, 2]``; per channel ``[pages, H, blocks, D, 2]``."""
    states = random_states(64, rows=1)
    for codec, shape in (
        (Affine(bits=4, group_size=8), (1, HEADS, 2, 64, 2)),
        (Affine(bits=4, granularity="per_channel", group_size=32), (1, HEADS, 2, DIM, 2)),
    ):
        store = new_store(codec, rows=1)
        store.append(states)
        plane = store.export_pages()["affine"]
        assert plane.shape == shape
        own = codec.encode(states).parameters["affine"]
        if codec.granularity == "per_token":
            own = own.transpose(2, 3)
        assert torch.equal(plane, own)


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_pages_do_not_depend_on_how_tokens_arrived(codec, side):
    (total,) = blocks(codec, 260)
    states = random_states(total)
    whole, pieces = new_store(codec, side), new_store(codec, side)
    whole.append(states)
    for start in range(0, total, codec.block_tokens):
        pieces.append(states[:, :, start : start + codec.block_tokens])
    for name, plane in whole.export_pages().items():
        assert torch.equal(plane, pieces.export_pages()[name])
    assert whole.nbytes == pieces.nbytes


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_an_append_leaves_earlier_bytes_untouched(codec, side):
    store = new_store(codec, side)
    store.append(random_states(blocks(codec, 150)[0]))
    before = {name: plane.clone() for name, plane in store.export_pages().items()}
    first = store.read(0, 150)
    for seed in range(3):
        store.append(random_states(codec.block_tokens, seed=seed + 1))
    whole = 150 // store.page_tokens
    after = store.export_pages()
    for name, plane in before.items():
        old, new = (p.unflatten(0, (2, -1))[:, :whole] for p in (plane, after[name]))
        assert torch.equal(old, new)
    assert torch.equal(store.read(0, 150), first)


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_different_length_read_zeros_beyond_their_end(codec, side):
    short, long = blocks(codec, 10, 140)
    store, states = new_store(codec, side), random_states(long)
    store.append(states[1:], rows=[1])
    store.append(states[:1, :, :short], rows=[0])
    both = store.read(0, long)
    assert store.lengths == [short, long]
    assert torch.equal(both[1:], decoded_alone(codec, states[1:]))
    assert torch.equal(both[:1, :, :short], decoded_alone(codec, states[:1, :, :short]))
    assert (both[0, :, short:] == 0).all()
    assert (store.read(long, long + 5) == 0).all()


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_truncated_tokens_are_gone_and_the_rest_stays(codec, side):
    kept, total = blocks(codec, 70, 200)
    store, states, more = new_store(codec, side), random_states(total), random_states(kept, seed=9)
    store.append(states)
    size = store.nbytes
    store.truncate(0, kept)
    store.append(more[:1], rows=[0])
    assert store.lengths == [2 * kept, total]
    expected = torch.cat([decoded_alone(codec, x) for x in (states[:1, :, :kept], more[:1])], 2)
    assert torch.equal(store.read(0, 2 * kept)[:1], expected)
    assert torch.equal(store.read(0, total)[1:], decoded_alone(codec, states[1:]))
    assert store.nbytes == size, "freed pages are used again"


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_truncating_to_nothing_frees_every_page(codec, side):
    store = new_store(codec, side)
    store.append(random_states(blocks(codec, 200)[0]))
    size = store.nbytes
    for row in (0, 1):
        store.truncate(row, 0)
    store.append(random_states(blocks(codec, 200)[0], seed=1))
    assert walk_bytes(store) == size


@both_sides
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("index", [[1, 0], [0, 0], [1, 1], [1], [0, 1, 0, 1, 1]])
def test_mapped_rows_are_copies(codec, side, index):
    (total,) = blocks(codec, 130)
    store = new_store(codec, side)
    store.append(random_states(total))
    expected = store.read(0, total)[index]
    store.map_rows(index)
    assert torch.equal(store.read(0, total), expected)
    more = random_states(codec.block_tokens, rows=len(index), seed=5)
    store.append(more)
    own = torch.cat((expected, decoded_alone(codec, more)), 2)
    assert torch.equal(store.read(0, total + codec.block_tokens), own)


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_a_write_after_a_reorder_does_not_touch_the_other_row(codec, side):
    """Both rows share all pages; a write to the last, partly filled one must copy it first."""
    (total,) = blocks(codec, 130)
    store = new_store(codec, side)
    store.append(random_states(total))
    store.map_rows([0, 0])
    shared = store.read(0, total)
    store.append(random_states(codec.block_tokens, rows=1, seed=6), rows=[1])
    assert store.lengths == [total, total + codec.block_tokens]
    assert torch.equal(store.read(0, total), shared)
    store.truncate(1, total - codec.block_tokens)
    store.append(random_states(codec.block_tokens, rows=1, seed=7), rows=[1])
    assert torch.equal(store.read(0, total)[:1], shared[:1])


@pytest.mark.parametrize("codec", CODECS)
def test_a_reorder_shares_pages_and_copies_at_most_the_last(codec):
    store = new_store(codec)
    store.append(random_states(blocks(codec, 500)[0]))
    store.map_rows([0, 0])
    shared = set(store._pages[0])
    store.append(random_states(codec.block_tokens, seed=1))
    still = shared & set(store._pages[0]) & set(store._pages[1])
    assert len(shared) - len(still) <= 1


@pytest.mark.parametrize("codec", CODECS)
def test_beam_like_reorders_do_not_grow_the_pool(codec):
    """A page no row uses is taken again: a hundred reorders stay within the formula."""
    store = new_store(codec, rows=3)
    total = 0
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        store.append(random_states(codec.block_tokens, rows=3, seed=step))
        total += codec.block_tokens
        store.map_rows(torch.randint(0, 3, (3,), generator=generator).tolist())
    expected = store_bytes(codec, total, num_heads=HEADS, head_dim=DIM, batch=3, state_bits=32)
    assert store.nbytes == walk_bytes(store) == expected


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_allocated_bytes_equal_the_formula_at_every_length(codec, side):
    store, total = new_store(codec, side), 0
    for step in range(40):
        assert store.nbytes == walk_bytes(store)
        assert store.nbytes == store_bytes(
            codec, total, num_heads=HEADS, head_dim=DIM, batch=2, state_bits=32
        )
        (count,) = blocks(codec, 1 + step % 3 * 50)
        store.append(random_states(count))
        total += count


@pytest.mark.parametrize("codec", CODECS)
def test_stored_bits_are_the_bytes_of_a_full_page(codec):
    values = page_tokens(codec) * HEADS * DIM
    state_bits = 32
    bits = 8 * page_bytes(codec, num_heads=HEADS, head_dim=DIM, state_bits=state_bits)
    assert codec.stored_bits(DIM, state_bits) * values == bits
    store = new_store(codec, rows=1)
    store.append(random_states(page_tokens(codec), rows=1))
    planes = sum(plane.nbytes for plane in store.export_pages().values())
    assert 8 * planes == bits


def test_a_large_pool_grows_in_few_chunks_that_are_never_copied():
    store = new_store(Affine(bits=2), rows=1)
    addresses = {}
    for _ in range(60):
        store.append(random_states(64, rows=1))
        for index, chunk in enumerate(store._chunks):
            address = chunk.records.data_ptr()
            assert addresses.setdefault(index, address) == address
    assert sum(len(chunk.records) for chunk in store._chunks) == page_capacity(60)


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_viewed_pages_are_those_of_the_rows_and_cost_nothing(codec, side):
    step = page_tokens(codec)
    store, twin = new_store(codec, side), new_store(codec, side)
    for seed in range(5):
        for each in (store, twin):
            each.append(random_states(step, seed=seed))
    for each in (store, twin):
        each.map_rows([1, 0])
    assert len(store._chunks) > 1, "the pool must be in pieces for the test to tell"
    planes, ids = store.view_pages(4)
    expected = twin._gather_pages([page for pages in twin._pages for page in pages[:4]])
    for name, plane in planes.items():
        assert torch.equal(plane[ids].flatten(0, 1), expected[name])
    assert plane.data_ptr() == store.view_pages(4)[0][name].data_ptr(), "no copy the second time"
    assert store.nbytes == twin.nbytes == walk_bytes(store)
    for each in (store, twin):
        each.append(random_states(step, seed=9))
    assert torch.equal(store.read(0, 6 * step), twin.read(0, 6 * step))


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_exported_pages_fill_another_store_bit_for_bit(codec, side):
    short, long = blocks(codec, 70, 150)
    store, states = new_store(codec, side, rows=3), random_states(long, rows=3)
    store.append(states[:2], rows=[0, 2])
    store.append(states[2:, :, :short], rows=[1])
    store.map_rows([1, 2, 2])
    copy = new_store(codec, side, rows=3)
    copy.import_pages(store.export_pages(), store.lengths)
    assert copy.lengths == store.lengths
    assert torch.equal(copy.read(0, long), store.read(0, long))
    more = random_states(codec.block_tokens, rows=3, seed=3)
    for each in (store, copy):
        each.append(more)
    assert torch.equal(copy.read(0, long + 1), store.read(0, long + 1))


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_an_empty_store_exports_and_imports(codec, side):
    store = new_store(codec, side)
    copy = new_store(codec, side)
    copy.import_pages(store.export_pages(), store.lengths)
    assert copy.lengths == [0, 0]
    assert copy.nbytes == store.nbytes == 0


@both_sides
@pytest.mark.parametrize("codec", CODECS)
def test_unwritten_memory_never_reaches_a_reader(codec, side, monkeypatch):
    """Fresh memory is poisoned: NaN in floats, 0xA5 in integers."""
    real_empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real_empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 0xA5)

    short, long = blocks(codec, 3, 100)
    states = random_states(long)
    expected = decoded_alone(codec, states)
    monkeypatch.setattr(torch, "empty", poisoned)
    store = new_store(codec, side)
    store.append(states[:1], rows=[0])
    store.append(states[1:, :, :short], rows=[1])
    read = store.read(0, long)
    assert torch.equal(read[:1], expected[:1])
    assert (read[1, :, short:] == 0).all()
    store.map_rows([1, 1])
    store.append(states[:, :, : codec.block_tokens])
    assert store.read(0, long).isfinite().all()


@pytest.mark.parametrize("codec", CODECS)
def test_moving_a_store_keeps_its_states(codec):
    store = new_store(codec)
    store.append(random_states(blocks(codec, 100)[0]))
    before = store.read(0, 100)
    moved = store.to(torch.device("cpu"))
    assert moved is not store
    assert torch.equal(moved.read(0, 100), before)
    assert torch.equal(store.read(0, 100), before), "who holds the old one can still read it"


@pytest.mark.parametrize("codec", CODECS)
def test_a_full_last_page_shared_by_two_rows_is_not_copied(codec):
    """Only a partly filled page is written again; a full one stays shared for good."""
    store = new_store(codec)
    store.append(random_states(2 * store.page_tokens))
    store.map_rows([0, 0])
    store.append(random_states(codec.block_tokens, seed=1))
    assert store._pages[0][:2] == store._pages[1][:2]
    assert store._pages[0][2] != store._pages[1][2]


def test_a_head_dim_that_does_not_fill_bytes_is_refused_by_the_store():
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 for bits=3, got 12"):
        PageStore(
            Affine(bits=3),
            side="key",
            num_heads=1,
            head_dim=12,
            num_rows=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


def decode_step_work(store, monkeypatch):
    """Elements written and kernels-worth of calls of one append."""
    counts = {"indexed writes": 0, "elements": 0}
    real = torch.Tensor.__setitem__

    def counted(self, index, value):
        counts["indexed writes"] += 1
        counts["elements"] += value.numel()
        return real(self, index, value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__setitem__", counted)
        store.append(random_states(1))
    return counts


@both_sides
def test_work_of_an_append_does_not_grow_with_the_cache(side, monkeypatch):
    """At 100 and at 6000 tokens one more token writes the same elements in the same calls."""
    store = new_store(Affine(bits=4), side)
    store.append(random_states(100))
    early = decode_step_work(store, monkeypatch)
    for _ in range(60):
        store.append(random_states(100))
    assert len(store._chunks) > 10
    assert decode_step_work(store, monkeypatch) == early
