"""Families against plain numpy, and the bits they cost against a published table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from replay_helpers import close, minmax, random_states, settings, settings_of

from kvbits.errors import PolicyError
from kvbits.replay.baselines import BUILT_IN
from kvbits.replay.step import FAMILIES, check_settings, relative_norm


@pytest.mark.parametrize("bits", range(1, 9))
def test_channel_groups_are_minmax_of_consecutive_tokens(bits):
    x = random_states()
    found = FAMILIES["minmax"].quantize(
        x, settings(choose_axis="channel", group_size=16), [bits] * 2
    )
    expected = x.numpy().copy()
    for head in range(2):
        for channel in range(16):
            for start in (0, 16, 32):  # the last two tokens are in no group
                part = (head, slice(start, start + 16), channel)
                expected[part] = minmax(expected[part], bits)
    close(found.states, expected)
    assert found.bits == bits
    assert found.parameter_bits == 2 * 16 * 3 * 32


@pytest.mark.parametrize(("group", "clip"), [(32, 1.0), (24, 0.92), (0, 1.0), (128, 0.9)])
def test_token_groups_span_heads_and_end_with_a_short_one(group, clip):
    x = random_states()
    plan = settings(group_size=group, clip_ratio=clip)
    found = FAMILIES["minmax"].quantize(x, plan, [3, 3])
    rows = x.numpy().transpose(1, 0, 2).reshape(50, 32).copy()
    size = min(group, 32) if group > 0 else 32
    for row in rows:
        for start in range(0, 32, size):
            row[start : start + size] = minmax(row[start : start + size], 3, clip)
    close(found.states, rows.reshape(50, 2, 16).transpose(1, 0, 2))
    assert found.parameter_bits == 50 * math.ceil(32 / size) * 32


def test_heads_of_other_bits_share_no_group():
    x = random_states(heads=3)
    plan = settings(group_size=48)
    together = FAMILIES["minmax"].quantize(x, plan, [4, 4, 2])
    torch.testing.assert_close(
        together.states[:2],
        FAMILIES["minmax"].quantize(x[:2], plan, [4, 4]).states,
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        together.states[2:], FAMILIES["minmax"].quantize(x[2:], plan, [2]).states, rtol=0, atol=0
    )
    assert together.bits == pytest.approx(10 / 3)


def test_symmetric_ranges_have_as_many_codes_on_either_side():
    x = random_states(heads=1)[:, :, :8]
    plan = settings(group_size=8, symmetric=True, clip_ratio=0.9)
    found = FAMILIES["minmax"].quantize(x, plan, [3])
    rows = x[0].numpy()
    step = np.float32(0.9) * np.abs(rows).max(1, keepdims=True) / np.float32(3)
    close(found.states[0], np.clip(np.round(rows / step), -3, 3) * step)
    assert found.parameter_bits == 50 * 16


def test_outliers_stay_exact_count_16_bits_and_leave_the_range_to_the_rest():
    x = random_states(heads=1, tokens=4, dim=40)
    found = FAMILIES["minmax"].quantize(x, settings(group_size=40, outliers_ratio=0.1), [2])
    for before, after in zip(x[0].numpy(), found.states[0].numpy(), strict=True):
        order = np.sort(before)
        apart = (before <= order[1]) | (before > order[37])  # ranks 2 and 38 of 40
        assert apart.sum() == 4
        np.testing.assert_array_equal(after[apart], before[apart])
        close(torch.tensor(after[~apart]), minmax(before[~apart], 2))
    assert found.bits == pytest.approx(2 * 0.9 + 16 * 0.1)


def test_a_constant_group_comes_back():
    x = torch.full((2, 32, 16), 3.7)
    for name in ("minmax", "skvq", "qaq"):
        found = FAMILIES[name].quantize(x, settings(group_size=16), [2, 2])
        torch.testing.assert_close(found.states, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (256, {"kivi_overlap_4bit": ("4.0", "10.0", "7.0"), "kivi_overlap_2bit": "5.5",
               "skvq_overlap_2bit": "9.2734", "uniform_quant_4bit": "4.0"}),
        (1024, {"kivi_overlap_4bit": ("4.0", "5.5", "4.75"), "kivi_overlap_2bit": "2.875",
                "skvq_overlap_2bit": "3.8184", "uniform_quant_4bit": "4.0"}),
        (1500, {"kivi_overlap_4bit": ("4.736", "5.024", "4.880"), "kivi_overlap_2bit": "3.0267",
                "skvq_overlap_2bit": "3.2413", "uniform_quant_4bit": "4.0"}),
        (4096, {"kivi_overlap_4bit": ("4.0", "4.375", "4.1875"), "kivi_overlap_2bit": "2.21875",
                "skvq_overlap_2bit": "2.4546", "uniform_quant_4bit": "4.0"}),
    ],
)  # fmt: skip
def test_average_bits_are_those_of_the_specification(num_tokens, expected):
    for name, texts in expected.items():
        policy = BUILT_IN[name]()
        pair = []
        for kind in ("key", "value"):
            each = settings_of(policy, kind)
            family = FAMILIES[each.quantizer_family]
            pair.append(family.average_bits(family.read(each), num_tokens, policy.bits))
        numbers = [*pair, sum(pair) / 2] if isinstance(texts, tuple) else [sum(pair) / 2]
        for number, text in zip(
            numbers, [texts] if isinstance(texts, str) else texts, strict=True
        ):
            assert f"{number:.{len(text.split('.')[1])}f}" == text


def synthetic():
    """Keys with four large channels, Gaussian values, 1024 tokens."""
    keys, values = random_states(2, 1024, 64, 1), random_states(2, 1024, 64, 2)
    keys[:, :, [3, 17, 40, 59]] *= 12
    keys[:, :, [3, 17, 40, 59]] += 20
    return {"key": keys, "value": values}


def cache_error(name):
    policy, errors = BUILT_IN[name](), []
    for kind, x in synthetic().items():
        each = settings_of(policy, kind)
        family = FAMILIES[each.quantizer_family]
        start, stop = family.quantizable(each, x.shape[1])
        out = x.clone()
        out[:, start:stop] = family.quantize(x[:, start:stop], each, [policy.bits] * 2).states
        errors.append(relative_norm(x, out))
    return sum(errors) / 2


def test_per_channel_keys_are_worth_it_where_channels_differ():
    assert cache_error("kivi_overlap_4bit") < cache_error("uniform_quant_4bit")
    assert cache_error("kivi_overlap_2bit") < cache_error("uniform_quant_2bit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer_family": "kivi"}, r"choose_axis \(layer 0, kind key\) must be 'channel'"),
        (
            {"quantizer_family": "kivi", "choose_axis": "channel", "residual_length": 40},
            r"residual_length \(layer 0, kind key\) must be a multiple of the group size 64",
        ),
        (
            {"quantizer_family": "kivi", "choose_axis": "channel", "sink_tokens": 1},
            r"sink_tokens \(layer 0, kind key\) must be 0",
        ),
        (
            {"quantizer_family": "kivi", "kv_kind": "value", "group_size": 48},
            "group_size .* must divide the head dimension 64",
        ),
        ({"quantizer_family": "skvq", "choose_axis": "channel"}, "choose_axis .* must be 'token'"),
        ({"use_attentions": True}, "use_attentions .* must be False with the minmax family"),
        (
            {"quantizer_family": "qaq", "use_attentions": True, "quantization_method": "normal"},
            "use_attentions .* must be False with the method 'normal'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(PolicyError, match=message):
        check_settings([settings(**changes)], 64)


def test_one_bit_needs_an_offset():
    with pytest.raises(PolicyError, match=r"symmetric .* must be False with 1 bit"):
        FAMILIES["minmax"].check_bits(settings(symmetric=True), 1)


def test_token_units_need_layers_that_agree():
    plan = settings(quantizer_family="qaq", quantization_level="token")
    check_settings([plan, plan._replace(layer_id=1, choose_axis="channel")], 64)
    with pytest.raises(PolicyError, match=r"quantization_level .* layer 1 does not"):
        check_settings([plan, plan._replace(layer_id=1, outliers_ratio=0.01)], 64)


def test_a_family_reads_only_its_own_hooks():
    plan = settings(
        quantizer_family="kivi", choose_axis="channel", residual_length=64, clip_ratio=0.5,
        symmetric=True, outliers_ratio=0.1,
    )  # fmt: skip
    (read,) = check_settings([plan], 64)
    assert (read.clip_ratio, read.symmetric, read.outliers_ratio) == (1.0, False, 0.0)
