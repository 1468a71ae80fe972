"""The cache inside transformers: eight families, every way to generate, every cache operation."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import kvbits
from kvbits.cache.hf import QuantizedCache, watch_padding
from kvbits.codecs import Affine, Identity
from kvbits.codecs.pages import PageStore
from kvbits.errors import PlanError, UnsupportedModelError
from kvbits.layer_plan import SIDES, LayerPlan
from kvbits.testing import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)

EXACT = LayerPlan.uniform(Identity(), Identity())
PLANS = {
    "token-8": LayerPlan.uniform(Affine(bits=8), Affine(bits=8)),
    "kivi-4": LayerPlan.uniform(
        Affine(bits=4, granularity="per_channel", group_size=8),
        Affine(bits=4),
        residual_length=8,
        sink_tokens=2,
    ),
    # Packed machinery, exact bytes: key states in pages, values in pages, nothing lost.
    "lossless": LayerPlan.uniform(
        Identity(), Affine(bits=8, parameter_dtype="float32"), residual_length=400
    ),
}
packed_plans = pytest.mark.parametrize(
    "plan", [PLANS["token-8"], PLANS["kivi-4"]], ids=list(PLANS)[:2]
)
NEW = 9


@functools.cache
def shared_model(family):
    """One model per family for all tests; they must leave it as it was."""
    return tiny_model(family)


@pytest.fixture(params=FAMILIES)
def model(request):
    model = shared_model(request.param)
    yield model
    kvbits.disable(model)


@pytest.fixture(params=[family for family in FAMILIES if family != "mistral"])
def packable(request):
    """A model with full-attention layers; in this Mistral every layer slides."""
    model = shared_model(request.param)
    yield model
    kvbits.disable(model)


@pytest.fixture
def llama():
    model = shared_model("llama")
    yield model
    kvbits.disable(model)


def new_cache(model, plan, **settings):
    """A cache with ``plan`` in every layer that may be packed."""
    watch_padding(model)
    stock = DynamicCache(config=model.config).layers
    plans = [plan if type(layer).__name__ == "DynamicLayer" else EXACT for layer in stock]
    return QuantizedCache(plans, model.config, **settings)


def prompt(rows=2, num_tokens=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (rows, num_tokens), generator=generator)


def padded_prompt(padding=(7, 0), num_tokens=20):
    input_ids = prompt(len(padding), num_tokens)
    mask = torch.ones_like(input_ids)
    for row, pad in enumerate(padding):
        input_ids[row, :pad] = mask[row, :pad] = 0
    return input_ids, mask


def generate(model, input_ids, cache=None, mask=None, seed=0, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    mask = torch.ones_like(input_ids) if mask is None else mask
    torch.manual_seed(seed)
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **settings)


def logits_of_each_step(model, input_ids, cache):
    """Logits of a prefill and of six single steps."""
    found = [model(input_ids[:, :-6], past_key_values=cache).logits]
    for t in range(input_ids.shape[1] - 6, input_ids.shape[1]):
        found.append(model(input_ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam": {"num_beams": 3},
    "beam with sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 6},
}
every_way = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)


# ----- 16 bits are the stock cache


@torch.no_grad()
def test_at_16_bits_logits_are_bit_for_bit_those_of_the_stock_cache(model):
    expected = logits_of_each_step(model, prompt(), DynamicCache(config=model.config))
    cache = new_cache(model, EXACT)
    assert torch.equal(logits_of_each_step(model, prompt(), cache), expected)
    with kvbits.enable(model):
        stock = DynamicCache(config=model.config)
        again = logits_of_each_step(model, prompt(), new_cache(model, EXACT))
        assert torch.equal(again, logits_of_each_step(model, prompt(), stock))
    assert cache.packed_layers == {}


@every_way
def test_at_16_bits_every_way_to_generate_gives_the_stock_tokens(model, settings):
    input_ids, mask = padded_prompt()
    expected = generate(model, input_ids, DynamicCache(config=model.config), mask, **settings)
    ours = generate(model, input_ids, new_cache(model, EXACT), mask, **settings)
    assert torch.equal(ours, expected)


@every_family
def test_a_sixteen_bit_cache_plan_is_the_stock_cache(family):
    model = shared_model(family)
    plan = kvbits.CachePlan.uniform(model.config, 16, 16)
    expected = generate(model, prompt())
    assert torch.equal(generate(model, prompt(), plan.new_cache(model)), expected)


@torch.no_grad()
def test_a_bfloat16_model_at_16_bits_is_the_stock_model_bit_for_bit():
    model = tiny_model("llama").bfloat16()
    expected = logits_of_each_step(model, prompt(), DynamicCache(config=model.config))
    ours = logits_of_each_step(model, prompt(), new_cache(model, EXACT))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


# ----- packed machinery loses nothing but what the codec rounds


@every_way
def test_a_lossless_packed_cache_gives_the_stock_tokens(packable, settings):
    """With a residual longer than the text, packed layers do all the work and round nothing."""
    input_ids, mask = padded_prompt()
    expected = generate(
        packable, input_ids, DynamicCache(config=packable.config), mask, **settings
    )
    for context in (False, True):
        if context:
            kvbits.enable(packable)
        cache = new_cache(packable, PLANS["lossless"])
        assert torch.equal(generate(packable, input_ids, cache, mask, **settings), expected)
        assert cache.packed_layers


@torch.no_grad()
def test_exact_keys_and_values_in_pages_change_logits_by_rounding_only(packable):
    """Keys exact in pages, then values: with 8-bit float32-scaled other side not packed yet."""
    expected = logits_of_each_step(packable, prompt(), DynamicCache(config=packable.config))
    for plan in (
        LayerPlan.uniform(Identity(), Affine(bits=8), residual_length=300),
        LayerPlan.uniform(Affine(bits=8), Identity(), residual_length=300),
    ):
        with kvbits.enable(packable):
            got = logits_of_each_step(packable, prompt(), new_cache(packable, plan))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@packed_plans
def test_attention_that_materialises_gives_the_tokens_of_packed_attention(packable, plan):
    input_ids, mask = padded_prompt()
    dense = generate(packable, input_ids, new_cache(packable, plan), mask)
    kvbits.enable(packable)
    packed = generate(packable, input_ids, new_cache(packable, plan), mask)
    assert torch.equal(dense, packed)


@packed_plans
@every_way
def test_every_way_to_generate_is_the_same_with_either_attention(llama, plan, settings):
    input_ids, mask = padded_prompt()
    dense = generate(llama, input_ids, new_cache(llama, plan), mask, **settings)
    kvbits.enable(llama)
    packed = generate(llama, input_ids, new_cache(llama, plan), mask, **settings)
    assert torch.equal(dense, packed)


@packed_plans
def test_eager_attention_takes_the_handles_too(packable, plan):
    expected = generate(packable, prompt(), new_cache(packable, plan))
    former = packable.config._attn_implementation
    packable.set_attn_implementation("eager")
    try:
        assert torch.equal(generate(packable, prompt(), new_cache(packable, plan)), expected)
    finally:
        packable.set_attn_implementation(former)


@packed_plans
@torch.no_grad()
def test_packed_states_are_what_the_model_attends_to(packable, plan):
    """The single-forward trap: after the prompt, 4 bits must differ from 16."""
    with kvbits.enable(packable):
        stock = DynamicCache(config=packable.config)
        exact = logits_of_each_step(packable, prompt(num_tokens=40), stock)
        packed = logits_of_each_step(packable, prompt(num_tokens=40), new_cache(packable, plan))
    assert torch.equal(packed[:, :34], exact[:, :34]), "an exact prefill sees exact states"
    assert not torch.equal(packed[:, 34:], exact[:, 34:])


@packed_plans
def test_a_left_padded_row_generates_what_it_generates_alone(packable, plan):
    kvbits.enable(packable)
    input_ids, mask = padded_prompt((7, 0, 15))
    together = generate(packable, input_ids, new_cache(packable, plan), mask)
    for row, pad in enumerate((7, 0, 15)):
        alone = generate(packable, input_ids[row : row + 1, pad:], new_cache(packable, plan))
        assert torch.equal(together[row, pad:], alone[0])


@packed_plans
def test_a_left_padded_row_stores_the_bytes_of_the_row_alone(packable, plan):
    kvbits.enable(packable)
    input_ids, mask = padded_prompt((7, 0))
    together, alone = new_cache(packable, plan), new_cache(packable, plan)
    generate(packable, input_ids, together, mask)
    generate(packable, input_ids[:1, 7:], alone)
    assert all(layer.padding == (7, 0) for layer in together.packed_layers.values())
    for index, layer in together.packed_layers.items():
        other = alone.packed_layers[index]
        for side in ("key", "value"):
            assert layer.packed_lengths(side)[0] == other.packed_lengths(side)[0] > 0
            # The first layer's states depend on the tokens alone; later ones on float rounding
            # that differs with the batch size.
            dense = layer.states().dense(side)[0, :, 7:]
            torch.testing.assert_close(dense, other.states().dense(side)[0], rtol=1e-2, atol=1e-2)


@packed_plans
@pytest.mark.parametrize("chunk_size", [1, 4, 6])
@torch.no_grad()
def test_a_chunk_of_nothing_but_padding_is_no_hole(llama, plan, chunk_size):
    """A chunked prefill shows a long-padded row a mask of zeros only: more is to come."""
    kvbits.enable(llama)
    input_ids, mask = padded_prompt((13, 0, 2))
    caches = [new_cache(llama, plan, quantize_prefill=True) for _ in range(2)]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = []
    for cache, step in zip(caches, (20, chunk_size), strict=True):
        chunks = [
            llama(
                input_ids[:, t : t + step],
                attention_mask=mask[:, : t + step],
                position_ids=positions[:, t : t + step],
                past_key_values=cache,
            ).logits
            for t in range(0, 20, step)
        ]
        outputs.append(torch.cat(chunks, 1)[mask.bool()])
    # Float noise may flip a code by one, which moves logits by some 2e-4 here.
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-3)
    for index, layer in caches[1].packed_layers.items():
        whole = caches[0].packed_layers[index]
        assert layer.padding == (13, 0, 2)
        for side in ("key", "value"):
            assert (layer.packed_lengths(side) == whole.packed_lengths(side)).all()


@packed_plans
def test_generate_with_chunks_shorter_than_the_padding_runs(llama, plan):
    kvbits.enable(llama)
    input_ids, mask = padded_prompt((13, 0, 2))
    cache = new_cache(llama, plan)
    output = generate(llama, input_ids, cache, mask, prefill_chunk_size=4)
    assert output.shape == (3, 20 + NEW)
    assert all(layer.padding == (13, 0, 2) for layer in cache.packed_layers.values())


def test_other_padding_in_a_later_turn_is_refused(llama):
    cache = new_cache(llama, PLANS["token-8"])
    input_ids, mask = padded_prompt((3, 0))
    llama(input_ids, attention_mask=mask, past_key_values=cache)
    wider = torch.ones(2, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"padding must not change once tokens are stored"):
        llama(input_ids[:, :5], attention_mask=wider, past_key_values=cache)


@torch.no_grad()
def test_a_mask_given_by_position_declares_padding_too(llama):
    input_ids, mask = padded_prompt((7, 0))
    cache = new_cache(llama, PLANS["token-8"])
    llama(input_ids, mask, past_key_values=cache)
    assert all(layer.padding == (7, 0) for layer in cache.packed_layers.values())
    cache = new_cache(llama, PLANS["token-8"])
    llama(input_ids, mask, None, cache)
    assert all(layer.padding == (7, 0) for layer in cache.packed_layers.values())


def test_a_mask_with_holes_is_refused(llama):
    input_ids, mask = padded_prompt((3, 0))
    mask[1, 5] = 0
    with pytest.raises(
        ValueError, match=r"attention_mask must be left-padded .* zeros after ones"
    ):
        llama(input_ids, attention_mask=mask, past_key_values=new_cache(llama, PLANS["token-8"]))


def test_right_padding_is_refused(llama):
    input_ids, mask = padded_prompt((3, 0))
    with pytest.raises(ValueError, match="attention_mask must be left-padded"):
        llama(
            input_ids.flip(1),
            attention_mask=mask.flip(1),
            past_key_values=new_cache(llama, PLANS["token-8"]),
        )


# ----- measuring


@packed_plans
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt_oss", "phi3"])
@torch.no_grad()
def test_teacher_forcing_in_chunks_measures_what_single_steps_see(family, plan):
    """With ``quantize_prefill`` a chunk of any size gives the logits of one-token decoding."""
    model = shared_model(family)
    input_ids = prompt(2, 45)
    outputs = []
    with kvbits.enable(model):
        for size, quantize_prefill in ((1, True), (7, True), (45, True), (45, False)):
            cache = new_cache(model, plan, quantize_prefill=quantize_prefill)
            chunks = input_ids.split(size, dim=1)
            logits = [model(chunk, past_key_values=cache).logits for chunk in chunks]
            outputs.append(torch.cat(logits, 1))
    *in_chunks, trap = [(output - outputs[0]).abs().max() for output in outputs[1:]]
    # Float noise alone is 1e-6; where it flips a code by one, a tenth of what exact states do.
    assert max(in_chunks) < trap / 3


@torch.no_grad()
def test_measuring_latent_attention_in_chunks_is_refused():
    """Such a model works on its keys first, so each query cannot be shown its own states."""
    model = shared_model("deepseek_v2")
    cache = new_cache(model, PLANS["token-8"], quantize_prefill=True)
    with (
        kvbits.enable(model),
        pytest.raises(UnsupportedModelError, match=r"quantize_prefill must be used with kvbits"),
    ):
        model(prompt(), past_key_values=cache)


# ----- drafts


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("plan", [EXACT, PLANS["lossless"]], ids=["exact", "lossless"])
def test_drafted_output_equals_greedy_when_nothing_is_rounded(family, plan):
    model = shared_model(family)
    assistant = tiny_model(family, seed=5)
    repetitive = prompt(1, 6).repeat(1, 5)
    expected = generate(model, repetitive)
    for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        cache = new_cache(model, plan)
        assert torch.equal(generate(model, repetitive, cache, **settings), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    kvbits.disable(model)


@packed_plans
@pytest.mark.parametrize("is_enabled", [False, True], ids=["sdpa", "kvbits"])
def test_drafts_run_on_a_packed_cache_and_never_reach_its_pages(
    llama, plan, is_enabled, monkeypatch
):
    if is_enabled:
        kvbits.enable(llama)
    packed = []
    append = PageStore.append

    def watched(store, states, rows=None):
        packed.append(states.shape[0] * states.shape[2])
        append(store, states, rows)

    monkeypatch.setattr(PageStore, "append", watched)
    repetitive = prompt(1, 6).repeat(1, 5)
    for settings in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model("llama", seed=5)},
        {"assistant_model": llama},
    ):
        cache = new_cache(llama, plan)
        packed.clear()
        output = generate(llama, repetitive, cache, max_new_tokens=30, **settings)
        assert output.shape[1] == 60
        assert cache.get_seq_length() == 59
        assert cache.num_reencoded_tokens == 0
        layers = cache.packed_layers.values()
        held = sum(layer.packed_lengths(side).sum() for layer in layers for side in SIDES)
        assert sum(packed) == held, "a rejected draft was packed"
        for layer in cache.packed_layers.values():
            expected = plan.packed_lengths(torch.tensor([59]).numpy())
            assert layer.packed_lengths("key").tolist() == expected.key.tolist()


def test_plain_generation_after_drafting_packs_again_once_recording_ends(llama):
    """Drafting leaves recording on, as in the stock cache: nothing is lost, but nothing packed."""
    plan = PLANS["token-8"]
    cache = new_cache(llama, plan)
    first = generate(llama, prompt(1, 6).repeat(1, 3), cache, prompt_lookup_num_tokens=3)
    assert all(layer.record_past for layer in cache.layers)
    second = generate(llama, first, cache)
    layers = cache.packed_layers.values()
    assert all(layer.packed_lengths("key")[0] == first.shape[1] - 1 for layer in layers)
    for layer in cache.layers:
        layer.record_past = False
    generate(llama, second, cache, max_new_tokens=1)
    assert all(layer.packed_lengths("key")[0] == second.shape[1] for layer in layers)


# ----- turns, rows, crops


@packed_plans
@pytest.mark.parametrize("is_enabled", [False, True], ids=["sdpa", "kvbits"])
def test_a_second_turn_continues_the_cache(packable, plan, is_enabled):
    """Turn by turn with one cache equals feeding the same pieces by hand."""
    if is_enabled:
        kvbits.enable(packable)
    cache = new_cache(packable, plan)
    first = generate(packable, prompt(), cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    turn = torch.cat((first, prompt(2, 9, seed=8)), 1)
    second = generate(packable, turn, cache)
    by_hand = new_cache(packable, plan)
    with torch.no_grad():
        packable(prompt(), past_key_values=by_hand)
        for t in range(20, first.shape[1] - 1):
            packable(first[:, t : t + 1], past_key_values=by_hand)
        logits = packable(turn[:, first.shape[1] - 1 :], past_key_values=by_hand).logits
        tokens = [logits[:, -1].argmax(-1)]
        for _ in range(NEW - 1):
            logits = packable(tokens[-1][:, None], past_key_values=by_hand).logits
            tokens.append(logits[:, -1].argmax(-1))
    assert torch.equal(second[:, turn.shape[1] :], torch.stack(tokens, 1))
    assert cache.get_seq_length() == by_hand.get_seq_length() == second.shape[1] - 1


@packed_plans
@torch.no_grad()
def test_cropped_tokens_are_forgotten(llama, plan):
    """Also through the positive lengths that older transformers pass."""
    kvbits.enable(llama)
    input_ids, more = prompt(num_tokens=40), prompt(num_tokens=3, seed=4)
    for argument in (-11, 29):
        cropped = new_cache(llama, plan)
        llama(input_ids, past_key_values=cropped)
        for layer in cropped.layers:
            layer.crop(argument)
        assert cropped.get_seq_length() == 29
        other = new_cache(llama, plan)
        llama(
            torch.cat((input_ids[:, :29], prompt(num_tokens=11, seed=6)), 1), past_key_values=other
        )
        other.crop(-11)
        # What lay behind the crop is gone; blocks that were cut had been rounded with it.
        ours = llama(more, past_key_values=cropped).logits
        theirs = llama(more, past_key_values=other).logits
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_crop_through_the_cache_class_equals_the_stock_cache_when_lossless(packable):
    input_ids, more = prompt(num_tokens=12), prompt(num_tokens=4, seed=4)
    outputs = []
    for cache in (DynamicCache(config=packable.config), new_cache(packable, PLANS["lossless"])):
        packable(input_ids, past_key_values=cache)
        cache.crop(-5)
        cache.crop(0)
        assert cache.get_seq_length() == 7
        outputs.append(packable(more, past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


ROW_OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("operation", ROW_OPERATIONS.values(), ids=ROW_OPERATIONS)
@pytest.mark.parametrize("is_enabled", [False, True], ids=["sdpa", "kvbits"])
@torch.no_grad()
def test_row_operations_equal_the_stock_cache_when_lossless(packable, operation, is_enabled):
    if is_enabled:
        kvbits.enable(packable)
    outputs = []
    for cache in (DynamicCache(config=packable.config), new_cache(packable, PLANS["lossless"])):
        packable(prompt(3), past_key_values=cache)
        operation(cache)
        rows = cache.layers[-1].packed.padding if outputs else cache.layers[-1].keys
        outputs.append(packable(prompt(len(rows), 2, seed=2), past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@packed_plans
@pytest.mark.parametrize("operation", ROW_OPERATIONS.values(), ids=ROW_OPERATIONS)
@torch.no_grad()
def test_row_operations_move_packed_states(packable, operation, plan):
    cache, stock = new_cache(packable, plan), DynamicCache(config=packable.config)
    for each in (cache, stock):
        packable(prompt(3, 40), past_key_values=each)
    before = {i: layer.states().dense("key") for i, layer in cache.packed_layers.items()}
    marked = torch.arange(3.0)[:, None, None, None].expand_as(stock.layers[-1].keys).clone()
    stock.layers[-1].keys = marked
    for each in (cache, stock):
        operation(each)
    index = stock.layers[-1].keys[:, 0, 0, 0].long()
    for i, layer in cache.packed_layers.items():
        assert torch.equal(layer.states().dense("key"), before[i][index])


@packed_plans
def test_a_reset_cache_is_as_new(packable, plan):
    cache = new_cache(packable, plan)
    expected = generate(packable, prompt(), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(not layer.is_initialized for layer in cache.packed_layers.values())
    if len(cache.packed_layers) == len(cache.layers):
        assert cache.nbytes == 0
        assert torch.equal(generate(packable, prompt(), cache), expected)
        other_padding = padded_prompt((5, 2))
        cache.reset()
        generate(packable, other_padding[0], cache, other_padding[1])
        assert all(layer.padding == (5, 2) for layer in cache.packed_layers.values())


@packed_plans
@torch.no_grad()
def test_offloaded_layers_come_back(packable, plan):
    cache = new_cache(packable, plan)
    packable(prompt(num_tokens=40), past_key_values=cache)
    before = {i: layer.states().dense("value") for i, layer in cache.packed_layers.items()}
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    for i, layer in cache.packed_layers.items():
        assert torch.equal(layer.states().dense("value"), before[i])
    packable(prompt(num_tokens=1), past_key_values=cache)
    assert cache.get_seq_length() == 41


@pytest.mark.gpu
@packed_plans
@torch.no_grad()
def test_offloading_on_a_gpu_moves_pages_and_gives_the_same_tokens(plan):
    model = tiny_model("llama").cuda()
    input_ids = prompt(num_tokens=40).cuda()
    with kvbits.enable(model):
        expected = generate(model, input_ids, new_cache(model, plan))
        cache = new_cache(model, plan, offloading=True)
        assert torch.equal(generate(model, input_ids, cache), expected)
    cache.layers[0].offload()
    store = cache.packed_layers[0].stores("key")[0]
    assert all(p.device.type == "cpu" for chunk in store._chunks for p in chunk.planes.values())


# ----- what the model is left like


def test_enabling_is_reversible_and_touches_one_model():
    model, other = tiny_model("llama"), shared_model("llama")
    before = model.config._attn_implementation
    kvbits.enable(model)
    assert model.config._attn_implementation == "kvbits"
    assert other.config._attn_implementation == before
    kvbits.enable(model)
    kvbits.disable(model)
    assert model.config._attn_implementation == before
    kvbits.disable(model)
    with kvbits.enable(model):
        with kvbits.enable(model):
            pass
        assert model.config._attn_implementation == "kvbits"
    assert model.config._attn_implementation == before


def test_enabling_does_not_change_what_the_stock_cache_gives(model):
    input_ids, mask = padded_prompt()
    expected = generate(model, input_ids, mask=mask)
    with kvbits.enable(model):
        assert torch.equal(generate(model, input_ids, mask=mask), expected)
    assert torch.equal(generate(model, input_ids, mask=mask), expected)


def test_sliding_layers_keep_the_stock_cache():
    model = shared_model("gemma3")
    cache = new_cache(model, PLANS["token-8"])
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PackedCacheLayer"] * 2
    generate(model, prompt(num_tokens=40), cache)
    assert cache.layers[0].keys.shape[-2] < 16
    assert cache.get_seq_length() == 39 + NEW


def test_a_packed_sliding_layer_is_refused():
    config = shared_model("gemma3").config
    with pytest.raises(
        PlanError, match="layer 0 must be full attention to be packed, got Dynamic"
    ):
        QuantizedCache([PLANS["token-8"]] * 4, config)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_plan_of_another_number_of_layers_is_refused(count):
    config = shared_model("llama").config
    with pytest.raises(PlanError, match=f"each of the model's 4 layers, got {count}"):
        QuantizedCache([EXACT] * count, config)


@packed_plans
def test_dropout_over_packed_states_is_refused(plan):
    model = tiny_model("llama", attention_dropout=0.5).train()
    cache = new_cache(model, plan)
    with kvbits.enable(model):
        model(prompt(), past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match=r"dropout must be unset"):
            model(prompt(), past_key_values=cache)
