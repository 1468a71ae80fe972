"""The qaq family against plain numpy and the published numbers of its error rule."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from replay_helpers import close, random_states, settings

from kvbits.replay.families import Attention
from kvbits.replay.qaq import Qaq

QAQ = Qaq()


def plan(kind="key", **changes):
    return settings(kind, quantizer_family="qaq", **changes)


def around_mean(x, bits):
    """Section 5.4 (4) of the specification on one unit."""
    middle, step = x.mean(dtype=np.float32), np.float32((x.max() - x.min()) / 2**bits)
    codes = np.clip(np.round((x - middle) / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes * step + middle


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_head_units_are_rounded_around_their_mean(bits):
    x = random_states(tokens=9)
    found = QAQ.quantize(x, plan(), [bits, 3])
    for token in range(9):
        close(found.states[0, token], around_mean(x[0, token].numpy(), bits))
        close(found.states[1, token], around_mean(x[1, token].numpy(), 3))
    assert found.bits == (bits + 3) / 2
    assert found.parameter_bits == 9 * 2 * 32


def test_layer_units_take_the_least_bits_of_their_heads():
    x = random_states(tokens=9)
    found = QAQ.quantize(x, plan(quantization_level="layer"), [4, 2])
    for token in range(9):
        unit = x[:, token].reshape(-1).numpy()
        close(found.states[:, token].reshape(-1), around_mean(unit, 2))
    assert found.bits == 2


def test_symmetric_units_are_rounded_around_zero():
    x = random_states(tokens=5)
    found = QAQ.quantize(x, plan(symmetric=True), [3, 3])
    step = 2 * np.abs(x.numpy()).max(2, keepdims=True) / np.float32(8)
    close(found.states, np.clip(np.round(x.numpy() / step), -4, 3) * step)


@pytest.mark.parametrize("ratio", [0.0, 0.05])
def test_normal_levels_are_quantiles(ratio):
    x = random_states(tokens=4, dim=64)
    found = QAQ.quantize(x, plan(quantization_method="normal", outliers_ratio=ratio), [2, 2])
    bounds = [NormalDist().inv_cdf((i + 1) / 4) for i in range(3)]
    levels = np.array([NormalDist().inv_cdf((i + 0.5) / 4) for i in range(4)])
    unit, decoded = x[1, 2].double().numpy(), found.states[1, 2].numpy()
    order, cut = np.sort(unit), max(1, math.ceil(ratio / 2 * 64)) if ratio else 0
    apart = np.zeros(64, bool)
    if ratio:
        high = order[math.floor((1 - ratio / 2) * 64) - 1]
        apart = (unit <= order[cut - 1]) | (unit > high)
    rest = unit[~apart]
    z = (rest - rest.mean()) / rest.std(ddof=1)
    expected = levels[np.searchsorted(bounds, z)] * rest.std(ddof=1) + rest.mean()
    close(torch.tensor(decoded[~apart]), expected)
    np.testing.assert_array_equal(decoded[apart], x[1, 2].numpy()[apart])


def attention(weights, num_tokens, num_newest=0):
    return Attention(weights, num_tokens, num_newest)


@pytest.mark.parametrize(("target", "expected"), [(1, 0.745), (3, 0.802), (10, 0.860)])
def test_the_error_of_keys_is_the_published_one(target, expected):
    weights = torch.ones(2, 7)
    each = plan(target_quantization_error=float(target))
    error = math.sqrt(12) * QAQ._deviation(torch.zeros(7, 2, 16), each, attention(weights, 1024))
    assert error.shape == (7, 2)
    assert f"{error[0, 0].item():.3f}" == f"{expected:.3f}"


@pytest.mark.parametrize(("weight", "expected"), [(0.01, "32.476"), (0.5, "0.650")])
def test_the_error_of_values_falls_with_attention(weight, expected):
    seen = attention(torch.full((2, 7), weight), 1024)
    error = math.sqrt(12) * QAQ._deviation(torch.zeros(7, 2, 16), plan("value"), seen)
    assert f"{error[3, 1].item():.3f}" == expected


def test_a_key_unit_of_range_twenty_gets_four_bits():
    x = torch.linspace(0, 20, 16).expand(1, 3, 16).contiguous()
    seen = attention(torch.ones(1, 3), 1024)
    found = QAQ.quantize(x, plan(use_attentions=True, bit_range=(0, 8)), [4], seen)
    assert found.bits == 4
    close(found.states[0, 0], around_mean(x[0, 0].numpy(), 4))


def test_bits_follow_attention_and_the_newest_tokens_get_the_most():
    x = torch.linspace(-1, 1, 16).expand(2, 4, 16).contiguous()
    weights = torch.tensor([[1e-9, 0.9, 1e-9, 1e-9], [0.9, 1e-9, 1e-9, 1e-9]])
    each = plan("value", use_attentions=True, bit_range=(0, 8), target_quantization_error=0.5)
    found = QAQ.quantize(x, each, [8], attention(weights, 1024, num_newest=1))
    # A weight of 0.9 allows an error of 0.0601, which takes 5 bits over a range of 2.
    assert found.bits == (2 * 5 + 2 * 8 + 4 * 1) / 8
    close(found.states[0, 1], around_mean(x[0, 1].numpy(), 5))
    close(found.states[0, 2], around_mean(x[0, 2].numpy(), 1))
    close(found.states[1, 3], around_mean(x[1, 3].numpy(), 8))


def test_no_bits_leave_the_mean_and_the_outliers():
    x = torch.full((1, 2, 20), 3.0)
    x[0, :, 4] = 50.0
    each = plan(use_attentions=True, bit_range=(0, 0), outliers_ratio=0.1)
    found = QAQ.quantize(x, each, [0], attention(torch.ones(1, 2), 64))
    torch.testing.assert_close(found.states, x, rtol=0, atol=0)
    assert found.bits > 0


def test_units_over_heads_take_the_largest_weight_of_theirs():
    weights = torch.tensor([[0.01, 0.02], [0.5, 0.01]])
    each = plan("value", quantization_level="layer")
    error = math.sqrt(12) * QAQ._deviation(torch.zeros(2, 1, 32), each, attention(weights, 1024))
    assert error[0, 0].item() == pytest.approx(0.650, abs=5e-4)
    assert error[1, 0].item() == pytest.approx(32.476 / 2, abs=5e-4)


def test_sixteen_bits_keep_a_unit():
    x = random_states(tokens=3)
    found = QAQ.quantize(x, plan(), [16, 16])
    torch.testing.assert_close(found.states, x, rtol=0, atol=0)
