"""A pass restarted from stored hidden states gives the logits of the full pass."""

from __future__ import annotations

import pytest
import torch
from evaluation_helpers import logits_of, one_layer
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kvbits.evaluation.restart import layer_list
from kvbits.evaluation.stream import capture_layer_inputs


@pytest.fixture(scope="module")
def layer_inputs(model, input_ids):
    return capture_layer_inputs(model, input_ids)


def hybrid_model():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("chunk_tokens", [40, 150])
@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize("layer", [1, 2])
def test_restarted_and_full_passes_give_equal_logits(
    model, input_ids, layer_inputs, layer, mode, chunk_tokens
):
    plan = one_layer(model, layer, mode=mode)
    full = logits_of(model, input_ids, plan, chunk_tokens=chunk_tokens)
    restarted = logits_of(
        model,
        input_ids,
        plan,
        chunk_tokens=chunk_tokens,
        start_layer=layer,
        layer_inputs=layer_inputs,
    )
    # the stored states come from a pass with other chunks: float64 rounding before the restart,
    # float32 rounding of the packed layer's attention after it
    assert (restarted - full).abs().max() <= 8 * torch.finfo(torch.float32).eps * full.abs().max()
    if chunk_tokens == 150:
        assert torch.equal(restarted, full)


def test_skipped_layers_are_really_not_run(model, input_ids, layer_inputs):
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        logits_of(model, input_ids, one_layer(model, 2), start_layer=2, layer_inputs=layer_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [2]


def test_the_model_is_whole_after_an_error(model, input_ids, layer_inputs):
    originals = list(model.model.layers)
    plan = one_layer(model, 1)

    def fail(*_):
        raise RuntimeError("planted")

    hook = originals[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="planted"):
            logits_of(model, input_ids, plan, start_layer=1, layer_inputs=layer_inputs)
    finally:
        hook.remove()
    assert list(model.model.layers) == originals


def test_a_quantized_layer_cannot_be_skipped(model, input_ids, layer_inputs):
    with pytest.raises(ValueError, match="start_layer must not skip a quantized layer, got 2"):
        logits_of(model, input_ids, one_layer(model, 1), start_layer=2, layer_inputs=layer_inputs)


def test_captured_states_are_those_entering_each_layer(model, input_ids, layer_inputs):
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states
    assert layer_inputs.num_layers == 3
    for found, expected in zip(layer_inputs.states, states, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert layer_inputs.nbytes == 3 * 2 * 150 * 128 * 8  # layers, rows, tokens, width, float64


@pytest.mark.parametrize("chunk_tokens", [30, 100])
def test_models_with_sliding_layers_restart_or_run_in_full(chunk_tokens):
    """In one chunk they restart; in several, the sliding layers' states are needed: all run."""
    model = hybrid_model()
    ids = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(0))
    inputs = capture_layer_inputs(model, ids, chunk_tokens=chunk_tokens)
    plan = one_layer(model, 3)
    full = logits_of(model, ids, plan, chunk_tokens=chunk_tokens)
    restarted = logits_of(
        model, ids, plan, chunk_tokens=chunk_tokens, start_layer=3, layer_inputs=inputs
    )
    assert torch.equal(restarted, full)


def test_layers_are_found_by_structure():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    assert layer_list(llama) is llama.model.layers
    gemma = hybrid_model()
    assert layer_list(gemma) is gemma.model.layers


def test_a_model_of_unknown_structure_is_measured_in_full(make_model, input_ids):
    model = make_model()
    model.model.other = nn.ModuleList(nn.Identity() for _ in range(3))
    assert layer_list(model) is None
    assert capture_layer_inputs(model, input_ids) is None
