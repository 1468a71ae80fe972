"""Models whose layers run on kernels against the same models in plain PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import kvbits
from kvbits.cache.hf import QuantizedCache, watch_padding
from kvbits.codecs import Affine, Identity, Rotated
from kvbits.errors import KernelUnavailableError, UnsupportedModelError
from kvbits.layer_plan import LayerPlan
from kvbits.methods.kvarn import KVarN
from kvbits.testing import tiny_config, tiny_model

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt_oss")
EXACT = LayerPlan.uniform(Identity(), Identity())
PLANS = {
    "token-8": LayerPlan.uniform(Affine(bits=8), Affine(bits=8), residual_length=5),
    "kivi-4": LayerPlan.uniform(
        Affine(bits=4, granularity="per_channel", group_size=32),
        Affine(bits=4, group_size=32),
        sink_tokens=2,
    ),
    "rotated-4": LayerPlan.uniform(
        Rotated(inner=Affine(bits=4)), Rotated(inner=Affine(bits=4)), residual_length=5
    ),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
PROMPT, STEPS = 36, 3
# Both ways round attention's output to bfloat16, in another order of sums; layers carry it on.
TOLERANCE = 2e-2


@functools.cache
def shared_model(family):
    model = tiny_model(family, head_dim=64, num_hidden_layers=2, layer_types=_types(family))
    return model.to(torch.bfloat16).to(DEVICE)


def _types(family):
    hybrid = ["sliding_attention", "full_attention"]
    return hybrid if family in {"gemma3", "gpt_oss"} else None


@pytest.fixture(params=FAMILIES)
def model(request):
    model = shared_model(request.param)
    with kvbits.enable(model):
        yield model


@pytest.fixture
def llama():
    model = shared_model("llama")
    with kvbits.enable(model):
        yield model


def new_cache(model, plan, **settings):
    watch_padding(model)
    stock = DynamicCache(config=model.config).layers
    plans = [plan if type(layer).__name__ == "DynamicLayer" else EXACT for layer in stock]
    return QuantizedCache(plans, model.config, **settings)


def prompt(num_tokens=PROMPT + STEPS, rows=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 97, (rows, num_tokens), generator=generator).to(DEVICE)


def padded(input_ids, padding):
    mask = torch.ones_like(input_ids)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    return mask


@torch.no_grad()
def step_logits(model, cache, chunk=PROMPT, mask=None):
    """Logits of the last tokens of a prompt in chunks, and of single steps."""
    input_ids, found = prompt(), []
    starts = [*range(0, PROMPT, chunk), *range(PROMPT, PROMPT + STEPS)]
    for start, stop in zip(starts, [*starts[1:], PROMPT + STEPS], strict=True):
        inputs = {"past_key_values": cache}
        if mask is not None:
            inputs["attention_mask"] = mask[:, :stop]
            inputs["position_ids"] = (mask[:, :stop].cumsum(-1) - 1).clamp_min(0)[:, start:]
        found.append(model(input_ids[:, start:stop], **inputs).logits[:, -1])
    return torch.stack(found).float()


def assert_close(ours, theirs):
    assert (ours - theirs).norm() < TOLERANCE * theirs.norm()


@every_plan
@pytest.mark.parametrize(
    ("chunk", "room"),
    [(PROMPT, None), (PROMPT, 64), (33, 64)],
    ids=["grown", "reserved", "chunks"],
)
def test_logits_are_those_of_the_reference(model, plan, chunk, room):
    if room is None and model.config.model_type == "mistral":
        pytest.skip("all its layers are stock layers")
    ours, theirs = (
        step_logits(model, new_cache(model, plan, impl=impl, max_tokens=room), chunk)
        for impl in ("triton", "reference")
    )
    assert_close(ours, theirs)


@every_plan
@pytest.mark.parametrize("room", [None, 64], ids=["grown", "reserved"])
def test_padded_rows_are_those_of_the_reference(model, plan, room):
    if room is None and model.config.model_type == "mistral":
        pytest.skip("all its layers are stock layers")
    mask = padded(prompt(), (0, 19))
    ours, theirs = (
        step_logits(model, new_cache(model, plan, impl=impl, max_tokens=room), mask=mask)
        for impl in ("triton", "reference")
    )
    assert_close(ours, theirs)


def test_normalised_tiles_give_the_logits_of_the_reference(llama):
    method = KVarN(key_bits=4, value_bits=4, tile_tokens=32, sink_tokens=2)
    plan = method.layer_plan(None, None)
    ours, theirs = (
        step_logits(llama, new_cache(llama, plan, impl=impl, max_tokens=64))
        for impl in ("triton", "reference")
    )
    assert_close(ours, theirs)


def test_exact_layers_in_pages_give_the_logits_of_the_stock_cache(model):
    """Sliding layers too, which keep all tokens in pages and see a window of them."""
    for impl in ("triton", "reference"):
        cache = new_cache(model, EXACT, impl=impl, max_tokens=64)
        assert_close(
            step_logits(model, cache), step_logits(model, DynamicCache(config=model.config))
        )
        assert cache.steps_on_device == (impl == "triton")


def test_steps_are_on_the_device_while_every_layer_takes_them_by_kernels(llama):
    token = prompt()[:, :1]
    cache = new_cache(llama, PLANS["token-8"], impl="triton", max_tokens=64)
    with torch.no_grad():
        llama(prompt()[:, :PROMPT], past_key_values=cache)
        assert not cache.steps_on_device
        llama(token, past_key_values=cache)
        assert cache.steps_on_device
        cache.activate_past_recording()
        llama(token, past_key_values=cache)
        assert not cache.steps_on_device


def test_a_mask_of_the_callers_own_is_obeyed_by_the_reference(llama):
    mask = torch.ones(2, 1, 1, PROMPT + 1, dtype=torch.bool, device=DEVICE)
    mask[..., 5:9] = False

    @torch.no_grad()
    def masked_logits(impl, mask):
        cache = new_cache(llama, PLANS["token-8"], impl=impl)
        llama(prompt()[:, :PROMPT], past_key_values=cache)
        token = prompt()[:, PROMPT : PROMPT + 1]
        return llama(token, attention_mask=mask, past_key_values=cache).logits

    obeyed = masked_logits("auto", mask)
    assert torch.equal(obeyed, masked_logits("reference", mask))
    assert not torch.equal(obeyed, masked_logits("reference", None))
    with pytest.raises(KernelUnavailableError, match="a mask that is not causal"):
        masked_logits("triton", mask)


def test_room_cannot_be_reserved_for_recurrent_layers():
    config = tiny_config("gemma3")
    config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="must be full or sliding attention"):
        QuantizedCache([EXACT] * 4, config, max_tokens=64)
