"""The loop: exact where nothing is quantized, the same every time, fresh in every step."""

from __future__ import annotations

import functools

import pytest
import torch
from replay_helpers import load_tiny, short_slice
from transformers import DynamicCache

from kvbits.errors import PolicyError, UnsupportedModelError
from kvbits.replay.harness import replay_example
from kvbits.replay.metrics import TIMES
from kvbits.replay.model import Queries, cache_of, entries_of, next_logits, watched_queries
from kvbits.replay.run import replay_slice, trace_of
from kvbits.testing import tiny_model


def comparable(outcome):
    """Everything but times and dates."""
    found = trace_of(outcome)
    del found["created"]
    for name in TIMES:
        del found["metrics"][name]
    return found


@pytest.mark.parametrize("mode", ["teacher", "free"])
@pytest.mark.parametrize("hooks", [{"choose_bits": "16"}, {"residual_length": "4096"}])
def test_a_policy_that_changes_nothing_is_exact(workload, policy_file, mode, hooks):
    path = policy_file(**hooks)
    outcome = replay_slice(workload(path, budget_bits=16, mode=mode))
    assert outcome.metrics["greedy_match_ratio"] == 1
    assert outcome.metrics["kl_nats"] == 0
    assert outcome.metrics["cache_error"] == 0
    assert outcome.metrics["quality_main"] == 100
    assert outcome.metrics["quality_delta_vs_ref"] == 0
    assert outcome.metrics["avg_bits_per_kv_token"] == 16
    assert outcome.metrics["num_steps"] == 10


@torch.no_grad()
def test_a_cache_of_clones_gives_the_same_logits(tiny):
    model, cache = tiny[0], cache_of([])
    next_logits(model, range(60), cache)
    entries = entries_of(cache)
    restored = next_logits(model, [5], cache_of(entries))
    assert torch.equal(restored, next_logits(model, [5], cache))
    assert entries[0].shape[2] == 60  # clones do not grow with the cache


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_sliding_layers_mask_what_they_no_longer_see(family):
    """Entries are kept beyond the window of 16, and the step sees none of them."""
    model, ids = tiny_model(family), list(range(40))
    cache, stock = cache_of([]), DynamicCache(config=model.config)
    next_logits(model, ids, cache)
    next_logits(model, ids, stock)
    restored = next_logits(model, [7], cache_of(entries_of(cache)))
    torch.testing.assert_close(
        restored, next_logits(model, [7], stock), rtol=1e-4, atol=1e-5
    )  # float32 sums over more, masked, tokens


def test_the_reference_is_greedy_decoding(tiny, workload):
    """The tokens that are fed are those that transformers generates."""
    made = workload("uniform_quant_2bit")
    example = made.slice.examples[0]
    ids = torch.tensor([made.ids(example)])
    expected = tiny[0].generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert [step.token for step in replay_example(made, example).steps] == expected.tolist()


def test_free_decoding_follows_the_policy(workload):
    made = workload("uniform_quant_2bit", mode="free")
    steps = replay_example(made, made.slice.examples[0]).steps
    assert [step.token for step in steps[1:]] == [step.chosen for step in steps[:-1]]
    teacher = replay_example(made._replace(mode="teacher"), made.slice.examples[0]).steps
    assert steps[0] == teacher[0]
    assert replay_slice(made).metrics["task_score"] == 0  # random weights find no answer


# A policy that remembers: it must carry nothing from one example to the next.
REMEMBERS = "(self.__dict__.update(n=getattr(self, 'n', 0) + 1), 1 + self.n % 4)[1]"


def test_results_are_the_same_in_every_run_and_order(workload, policy_file):
    made = workload(policy_file(choose_bits=REMEMBERS))
    first = comparable(replay_slice(made))
    assert comparable(replay_slice(made)) == first
    backwards = made.slice._replace(examples=made.slice.examples[::-1])
    other = comparable(replay_slice(made._replace(slice=backwards)))
    assert other["examples"] == first["examples"][::-1]


@pytest.mark.slow  # two processes that import torch
def test_results_do_not_depend_on_workers(workload, tiny_model_dir, policy_file):
    made = workload(policy_file(choose_bits=REMEMBERS))
    load = functools.partial(load_tiny, str(tiny_model_dir))
    found = comparable(replay_slice(made, num_workers=2, load_model=load))
    assert found == comparable(replay_slice(made))


def test_entries_are_quantized_once_however_many_steps(workload, policy_file):
    """Clipping twice would shrink entries: the error must not grow with the steps."""
    path = policy_file(clip_ratio="0.8", choose_bits="2", residual_length="0")
    made = workload(path, slice=short_slice(num_steps=8))
    for example in made.slice.examples:
        errors = [step.tensors[-1].error for step in replay_example(made, example).steps]
        assert max(errors) < 1.02 * min(errors)


def test_bits_are_cut_down_to_the_budget_and_counted(workload, policy_file):
    made = workload(policy_file(choose_bits="16", residual_length="0", choose_axis="'token'"))
    outcome = replay_slice(made)
    assert outcome.metrics["avg_bits_per_kv_token"] == 4
    assert outcome.metrics["budget_clamps"] == 10 * 6 * 2  # steps, tensors, heads
    assert outcome.metrics["over_budget"] == 0


def test_windows_beyond_the_budget_are_marked(workload, policy_file):
    for residual, is_over in ((128, 0), (256, 1)):
        path = policy_file(residual_length=str(residual), choose_axis="'token'")
        metrics = replay_slice(workload(path)).metrics
        assert metrics["ref_bits_4096"] == 4 + 12 * residual / 4096
        assert metrics["over_budget"] == is_over


def test_heads_may_differ_and_short_memory_is_estimated(workload, policy_file):
    path = policy_file(choose_bits="4 if a[2] else 2", residual_length="0", choose_axis="'token'")
    outcome = replay_slice(workload(path))
    assert outcome.metrics["avg_bits_per_kv_token"] == 3
    most = max(step.num_tokens for each in outcome.examples for step in each.steps)
    expected = 2 * 3 * most * 2 * 32 * 3 / 8 / 2**20  # sides, layers, tokens, heads, dims, bits
    assert outcome.metrics["peak_kv_memory_mb"] == pytest.approx(expected)


def test_calibration_freezes_statistics(workload, policy_file):
    """The source is named, and frozen statistics give the same answer in every step."""
    text = "(3 if a[3]['source'] == {!r} and a[3]['seq_len'] == {} else 1)"
    for mode in ("prefill", "workload"):
        made = workload("default")
        lengths = [len(made.ids(example)) for example in made.slice.examples]
        if mode == "workload":
            lengths[1] = lengths[0]
        for example, length in zip(made.slice.examples, lengths, strict=True):
            path = policy_file(calibration_mode=repr(mode), choose_bits=text.format(mode, length))
            result = replay_example(made._replace(policy=str(path)), example)
            chosen = {bits for step in result.steps for t in step.tensors for bits in t.chosen}
            assert chosen == {3}
            assert result.calibration_seconds > 0


def test_the_budget_state_adds_up(workload, policy_file):
    """Keys come first; what was spent is the mean of what was decided."""
    check = (
        "(2 if a[1] == 'key' else 4) if (a[4]['spent_bits_this_step'] =="
        " (0 if (a[0], a[1]) == (0, 'key') else 2 if a[1] == 'key' else"
        " (3 * 2 + a[0] * 4) / (3 + a[0])) and"
        " a[4]['avg_bits_so_far'] == (3 if a[4]['step'] > 1 else 0)) else None"
    )
    made = workload(policy_file(choose_bits=check, residual_length="0", choose_axis="'token'"))
    assert replay_slice(made).metrics["avg_bits_per_kv_token"] == 3


def test_an_illegal_answer_in_the_loop_ends_the_run(workload, policy_file):
    path = policy_file(choose_bits="9 if (a[0], a[1]) == (2, 'value') else 4")
    with pytest.raises(PolicyError, match=r"choose_bits \(layer 2, kind value\) must return"):
        replay_slice(workload(path))


def test_qaq_with_attention_runs_on_the_models_own_attention(workload, policy_file, tiny):
    hooks = {"quantizer_family": "'qaq'", "use_attentions": "True", "residual_length": "0"}
    path = policy_file(**hooks, last_n_attentions="3", outliers_ratio="0.05")
    outcome = replay_slice(workload(path))
    first = outcome.examples[0].steps[0].tensors[0]
    assert first.chosen == ()
    assert 2 <= first.bits <= 5
    assert outcome.metrics["cache_error"] > 0
    assert tiny[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("level", ["token", "layer", "head"])
def test_qaq_levels_quantize_the_whole_cache(workload, policy_file, level):
    path = policy_file(
        quantizer_family="'qaq'", quantization_level=repr(level), residual_length="0",
        choose_bits="3 + (a[0] + a[2]) % 2",
    )  # fmt: skip
    bits = [t.bits for t in replay_slice(workload(path)).examples[0].steps[0].tensors]
    expected = {"token": [3, 3, 3], "layer": [3, 3, 3], "head": [3.5, 3.5, 3.5]}[level]
    assert bits == 2 * expected


@torch.no_grad()
def test_weights_are_those_of_eager_attention(tiny_model_dir):
    model, _ = load_tiny(str(tiny_model_dir))
    queries, cache = Queries(4), cache_of([])
    with watched_queries(model, queries):
        next_logits(model, range(40), cache)
        next_logits(model, [7], cache)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*range(40), 7]])
    weights = model(ids, output_attentions=True).attentions
    for layer in range(3):
        found = queries.largest_weights(layer, entries_of(cache)[layer], 3)
        expected = weights[layer][0, :, -3:].unflatten(0, (2, 2)).amax((1, 2))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # float32 sums


def test_models_without_plain_caches_are_refused(workload):
    model = tiny_model("qwen2")
    model.config.layer_types = ["linear_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="layer 0 must keep keys and values"):
        replay_slice(workload("default", model=model))


def test_a_prompt_beyond_the_model_is_refused(workload, tiny):
    made = workload("default", slice=short_slice(num_steps=400))
    with pytest.raises(ValueError, match=r"--model must take .* tokens for example own-0"):
        replay_slice(made)
