from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from kvbits.calibration.attention import Observed, observed_attention
from kvbits.codecs import Affine, Identity
from kvbits.errors import CalibrationError
from kvbits.geometry import ModelGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.plan.modes import layer_plan
from kvbits.tuning.attention_errors import (
    ErrorSums,
    decoded_states,
    layer_errors,
    relative_error,
)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def observe(model, ids, num_queries=64):
    seen: list[Observed] = []
    with observed_attention(model, seen.append, num_queries=num_queries), torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return seen, logits


def gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, sliding_window=8,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


def test_observing_changes_no_logits_and_leaves_no_trace(model):
    ids = torch.randint(1, 257, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    former = model.config._attn_implementation
    seen, logits = observe(model, ids)
    assert [o.layer_idx for o in seen] == [0, 1, 2]
    assert (logits - before).abs().max() < 1e-4  # float32 sums in another order
    assert model.config._attn_implementation == former


def test_attention_is_restored_after_an_error(model):
    former = model.config._attn_implementation

    def fail(_):
        raise CalibrationError("stop")

    with (
        pytest.raises(CalibrationError, match="stop"),
        observed_attention(model, fail, num_queries=4),
    ):
        model(torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert model.config._attn_implementation == former


def test_sinks_and_sliding_windows_are_part_of_the_attention():
    model = gpt_oss()
    ids = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    seen, logits = observe(model, ids)
    assert (logits - before).abs().max() < 1e-4
    assert all(o.sink_logits is not None for o in seen)
    weights = seen[0].weights(seen[0].key_states)  # layer 0 slides over 8 tokens
    assert (weights[0, -1] > 0).sum() <= 8
    assert (weights.sum(-1) < 1).all()


def test_queries_are_a_sample_that_ends_at_the_last_position(model):
    ids = torch.randint(1, 257, (1, 100), generator=torch.Generator().manual_seed(0))
    every = observe(model, ids, num_queries=1000)[0][0]
    some = observe(model, ids, num_queries=7)[0][0]
    assert every.query.shape[1] == 100
    assert some.query.shape[1] == 7
    assert torch.equal(some.query[:, -1], every.query[:, -1])
    assert torch.equal(some.mask[-1], every.mask[-1])


def test_exact_codecs_have_no_error_and_fewer_bits_more(model):
    ids = torch.randint(1, 257, (1, 96), generator=torch.Generator().manual_seed(0))
    observed = observe(model, ids)[0][1]
    geometry = ModelGeometry.from_config(model.config).layers[1]
    pairs = [(16, 16), (8, 8), (4, 4), (2, 2)]
    errors = layer_errors(observed, [layer_plan(geometry, [p], "per_token", {}) for p in pairs])
    assert tuple(errors[0]) == (0.0, 0.0, 0.0, 0.0)
    for name in errors[0]._fields:
        values = [getattr(error, name) for error in errors]
        assert values == sorted(values)
        assert len(set(values)) == 4


def test_errors_follow_their_formulas_on_a_layer_written_out_by_hand():
    """One head, one channel, two tokens; the value codec is exact, so only keys matter."""
    keys = torch.tensor([[[1.0, 0.0], [0.2, 1.0]]])
    values = torch.tensor([[[1.0], [3.0]]])
    observed = Observed(
        0, torch.tensor([[[2.0, 1.0]]]), keys, values, torch.zeros(1, 2), 1.0, None, None
    )
    codec = Affine(bits=2)
    plan = LayerPlan.uniform(codec, Identity())
    new_keys = decoded_states(codec, keys)
    new = torch.softmax(new_keys[0] @ torch.tensor([2.0, 1.0]), 0)
    old = torch.softmax(keys[0] @ torch.tensor([2.0, 1.0]), 0)
    (errors,) = layer_errors(observed, [plan])
    assert errors.e_v == 0.0
    assert errors.e_a == pytest.approx(float((new - old).abs().mean()), rel=1e-5)
    exact = float(old @ values[0, :, 0])
    assert errors.e_o == pytest.approx(abs(float(new @ values[0, :, 0]) - exact) / exact, rel=1e-4)


def test_relative_error_is_finite_at_zero_and_ignores_nothing_else():
    exact = torch.tensor([0.0, 1.0, 2.0, 1.0])
    near = exact + 0.01
    floor = 0.01 * exact.abs().mean()
    expected = (0.01 / floor + 0.01 + 0.005 + 0.01) / 4
    assert relative_error(exact, near) == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(torch.zeros(4), torch.zeros(4)) == 0.0


def test_tokens_short_of_a_block_stay_exact():
    states = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    codec = Affine(bits=2, granularity="per_channel", group_size=32)
    decoded = decoded_states(codec, states)
    assert torch.equal(decoded[:, 32:], states[:, 32:])
    assert not torch.equal(decoded[:, :32], states[:, :32])
    assert torch.equal(decoded_states(codec, states[:, :20]), states[:, :20])


def test_sums_are_means_over_documents_and_skip_other_layers(model):
    geometry = ModelGeometry.from_config(model.config).layers[1]
    plans = [[layer_plan(geometry, [(4, 2)], "per_token", {})]]
    sums = ErrorSums(plans, [1])
    single = []
    for seed in range(2):
        ids = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(seed))
        for observed in observe(model, ids)[0]:
            sums.observe(observed)
            if observed.layer_idx == 1:
                single.append(torch.tensor(layer_errors(observed, plans[0]), dtype=torch.float64))
    assert torch.allclose(sums.means()[0], torch.stack(single).mean(0))


def test_states_that_are_not_finite_are_refused_with_their_layer(model):
    ids = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(0))
    observed = observe(model, ids)[0][2]
    geometry = ModelGeometry.from_config(model.config).layers[2]
    sums = ErrorSums([[layer_plan(geometry, [(16, 16)], "per_token", {})]], [2])
    broken = observed._replace(value_states=observed.value_states * float("nan"))
    with pytest.raises(CalibrationError, match="states of layer 2 must be finite"):
        sums.observe(broken)
