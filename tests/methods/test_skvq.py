"""SKVQ's reordering: like channels end up together, and that pays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvbits import CachePlan
from kvbits.calibration.clipping import RATIOS
from kvbits.calibration.reorder import ChannelRanges, clustered_order
from kvbits.codecs import Affine, Permuted, PreRope
from kvbits.errors import CalibrationError
from kvbits.methods import build_method
from kvbits.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    """Channels of very unlike ranges, small and large in turn, over all heads."""
    model = tiny_model("llama").eval()
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight.data  # [H_kv * D, hidden]
        weight *= torch.tensor([0.02, 3.0]).repeat(len(weight) // 2)[:, None]
    return model


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 90, (n,), generator=generator) for n in (200, 90, 4)]


def permutations(plan):
    for layer in plan.layers:
        (group,) = layer.groups
        assert isinstance(group.key, PreRope)
        yield group.key.inner, group.value


def test_groups_are_the_clusters_where_those_have_one_size():
    """Three ranges, shuffled: every group of four holds one of them."""
    ranges = np.array([[-1.0, 1.0], [-9.0, 8.0], [2.0, 4.0]])
    label = np.random.default_rng(0).permutation(np.arange(12) % 3)
    points = ranges[label] + np.random.default_rng(1).normal(0, 0.01, (12, 2))
    order = clustered_order(points, 4)
    assert sorted(order) == list(range(12))
    groups = [set(label[order[i : i + 4]]) for i in (0, 4, 8)]
    assert all(len(group) == 1 for group in groups)


def test_the_order_is_near_the_best_of_all():
    """Width of all groups, over every way to part eight channels into two groups of four."""
    rng = np.random.default_rng(3)
    high = rng.lognormal(0, 1.5, 8)
    points = np.stack((-high * rng.uniform(0.5, 1, 8), high), -1)

    def cost(group):
        return points[list(group), 1].max() - points[list(group), 0].min()

    everything = set(range(8))
    costs = [
        cost(group) + cost(everything - set(group))
        for group in itertools.combinations(range(8), 4)
    ]
    order = clustered_order(points, 4).tolist()
    found = cost(order[:4]) + cost(order[4:])
    assert found <= min(costs) * 1.05
    assert found < np.mean(costs)


@pytest.mark.parametrize("points", [np.zeros((8, 2)), np.ones((4, 2)) * [[0, 1]]])
def test_channels_that_are_all_alike_keep_their_order(points):
    assert clustered_order(points, 2).tolist() == list(range(len(points)))


def test_ranges_are_those_of_all_documents():
    first, second = (
        torch.randn(1, 2, 30, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    pieces, whole = ChannelRanges(), ChannelRanges()
    pieces.add(first)
    pieces.add(second)
    whole.add(torch.cat((first, second), 2))
    for within_heads in (True, False):
        expected = whole.order(4, within_heads=within_heads)
        assert torch.equal(pieces.order(4, within_heads=within_heads), expected)


@pytest.mark.parametrize("reorder", ["layer", "head"])
def test_every_layer_and_side_gets_an_order(reorder, model, documents, tmp_path):
    method = build_method("skvq", reorder=reorder, group_size=8)
    plan = method.calibrate(model, documents)
    for key, value in permutations(plan):
        for codec in (key, value):
            assert isinstance(codec, Permuted)
            heads = codec.order.tensor // 32
            is_home = bool((heads == torch.arange(2)[:, None]).all())
            assert is_home == (reorder == "head")
    assert len(plan.arrays) == 2 * len(plan.layers)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert plan == method.calibrate(model, documents)
    assert plan.effective_bits == method.plan(model.config).effective_bits  # orders are no bits


def test_small_channels_are_told_from_large_ones(model, documents):
    """Values were made of two kinds of channels in turn: half of all groups hold each."""
    plan = build_method("skvq", group_size=8).calibrate(model, documents)
    for _, value in permutations(plan):
        is_large = (value.order.tensor.flatten() % 2).view(-1, 8)
        assert (is_large == is_large[:, :1]).all()


@torch.no_grad()
@pytest.mark.parametrize("reorder", ["layer", "head"])
def test_reordering_leaves_less_error(reorder, model, documents):
    """On the small channels, whose steps large ones would set; without sinks and window."""
    settings = {"group_size": 8, "residual_length": 0, "sink_tokens": 0, "value_bits": 4}
    errors = {}
    exact = model(documents[0][None]).past_key_values
    for name in ("none", reorder):
        plan = build_method("skvq", reorder=name, **settings).calibrate(model, documents)
        cache = plan.new_cache(model)
        model(documents[0][None], past_key_values=cache)
        errors[name] = sum(
            (layer.packed.states().dense("value") - own.values)[..., ::2].square().mean().item()
            for layer, own in zip(cache.layers, exact.layers, strict=True)
        )
    assert errors[reorder] < errors["none"] / 100


def test_without_reordering_no_data_is_needed(model, documents):
    method = build_method("skvq", reorder="none")
    assert not method.needs_data
    plan = method.calibrate(model, documents)
    assert plan == method.plan(model.config)
    assert plan.layers[0].groups[0].value == Affine(
        bits=1.5, clip_ratio=0.92, parameter_dtype="float8"
    )


def test_text_shorter_than_the_sinks_is_refused(model, documents):
    with pytest.raises(CalibrationError, match="a document of more than 5 tokens, the sinks"):
        build_method("skvq").calibrate(model, documents[2:])


def test_an_order_within_heads_needs_groups():
    with pytest.raises(ValueError, match="group_size must be given when reorder='head', got None"):
        build_method("skvq", reorder="head")


def naive_errors(model, ids, index, side, ratios, bits):
    """Squared errors of a layer's attention output by ratio, from eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        made = model(ids[None], output_attentions=True, use_cache=True)
    model.set_attn_implementation("sdpa")
    weights, layer = made.attentions[index][0].double(), made.past_key_values.layers[index]
    exact = layer.values[0].double()
    assert side == "value"
    found = []
    for ratio in ratios:
        codec = Affine(bits=bits, clip_ratio=ratio, parameter_dtype="float8")
        decoded = codec.decode(codec.encode(layer.values))[0].double()
        error = (weights @ (decoded - exact).repeat_interleave(2, 0)).square().sum().item()
        found.append(error)
    return found


@pytest.mark.parametrize("bits", [1.5, 3])
def test_the_searched_ratio_is_the_one_with_which_attention_errs_least(bits, model, documents):
    """One document shorter than the sample of queries: all its queries count."""
    ids = documents[1][:60]
    settings = {"reorder": "none", "sink_tokens": 0, "value_bits": bits, "clip_ratio": "search"}
    plan = build_method("skvq", **settings).calibrate(model, [ids])
    for index in range(4):
        errors = naive_errors(model, ids, index, "value", RATIOS, bits)
        found = plan.layers[index].groups[0].value.clip_ratio
        assert errors[RATIOS.index(found)] <= min(errors) * (1 + 1e-4)  # float32 on the way


def test_clip_ratios_are_searched_behind_the_order_of_channels(model, documents, tmp_path):
    method = build_method("skvq", clip_ratio="search", group_size=8)
    calls = []
    plan = method.calibrate(model, documents, lambda: calls.append(1))
    assert len(calls) == method.passes * len(documents) == 2 * len(documents)
    ratios = {codec.inner.clip_ratio for pair in permutations(plan) for codec in pair}
    assert ratios <= set(RATIOS)
    assert len(ratios) > 1
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan


def test_clip_ratios_need_text_and_finite_states(documents):
    method = build_method("skvq", reorder="none", clip_ratio="search")
    assert method.needs_data
    broken = tiny_model("llama").eval()
    broken.model.layers[-1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"queries must be finite, .* in layer 3"):
        method.calibrate(broken, documents)
    with pytest.raises(CalibrationError, match="a document of more than 5 tokens, the sinks"):
        method.calibrate(broken, documents[2:])


@pytest.mark.parametrize("ratio", [0.0, 1.2, "seek", True])
def test_other_clip_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=r"clip_ratio must be above 0 and .*'search', got"):
        build_method("skvq", clip_ratio=ratio)
