"""States and gradients of a model, against autograd on the model itself."""

from __future__ import annotations

import pytest
import torch

from kvbits.calibration.capture import observe
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2").eval()


def document(num_tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 90, (num_tokens,), generator=generator)


def test_states_are_what_enters_the_cache(model):
    (seen,) = observe(model, [document()], with_gradients=False)
    cache = model(document()[None]).past_key_values
    assert len(seen) == 2 * len(cache.layers)
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(seen[index, "key"].states, layer.keys)
        torch.testing.assert_close(seen[index, "value"].states, layer.values)
        assert seen[index, "key"].gradients is None


@pytest.mark.parametrize("layer", [0, 3])
def test_a_gradient_says_how_the_loss_moves(model, layer):
    """By the bias of the value projection: its gradient is the sum of those of all values."""
    (seen,) = observe(model, [document()], with_gradients=True)
    bias = model.model.layers[layer].self_attn.v_proj.bias
    ids = document()[None]
    logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (expected,) = torch.autograd.grad(loss, [bias])
    found = seen[layer, "value"].gradients.sum((0, 2)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_queries_are_those_that_meet_the_keys(family):
    """Attention computed from what was seen is what the model's output projection receives."""
    model = tiny_model(family).eval()
    received = {}
    layer = model.model.layers[1]  # full attention in all of them
    hook = layer.self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: received.setdefault("attended", inputs[0])
    )
    former = model.config._attn_implementation
    (seen,) = observe(model, [document()], with_gradients=False, with_queries=True)
    hook.remove()
    assert model.config._attn_implementation == former
    keys, values = seen[1, "key"], seen[1, "value"]
    assert values.queries is None
    repeats = keys.queries.shape[1] // keys.states.shape[1]
    dense = [x.states[0].repeat_interleave(repeats, 0) for x in (keys, values)]
    scores = keys.queries[0] @ dense[0].mT * layer.self_attn.scaling
    scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    sinks = getattr(layer.self_attn, "sinks", None)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    attended = scores.softmax(-1)[..., : dense[1].shape[1]] @ dense[1]
    expected = received["attended"][0].unflatten(-1, (len(attended), -1)).transpose(0, 1)
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)


def test_queries_come_only_when_asked_for(model):
    (seen,) = observe(model, [document()], with_gradients=False)
    assert all(observation.queries is None for observation in seen.values())


def test_a_model_without_the_interface_shows_no_queries(model, monkeypatch):
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"attention interface.*got none"):
        next(observe(model, [document()], with_gradients=False, with_queries=True))


def test_the_model_is_left_as_it_was(model):
    list(observe(model, [document()], with_gradients=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_training_mode_changes_nothing():
    model = tiny_model("llama", attention_dropout=0.5).train()
    first, second = (
        next(observe(model, [document()], with_gradients=True))[3, "value"] for _ in range(2)
    )
    assert torch.equal(first.states, second.states)
    assert torch.equal(first.gradients, second.gradients)
    assert model.training


def test_documents_come_one_by_one(model):
    documents = [document(10, seed=1), document(1), document(15, seed=2)]
    lengths = [
        seen[0, "key"].states.shape[2] for seen in observe(model, documents, with_gradients=False)
    ]
    assert lengths == [10, 15]  # one token predicts nothing


def test_too_little_text_is_refused(model):
    with pytest.raises(CalibrationError, match="documents must hold one of at least 2 tokens"):
        next(observe(model, [document(1)], with_gradients=True))


def test_states_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.layers[2].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"key_states must be finite.*layer 2"):
        next(observe(model, [document()], with_gradients=False))
