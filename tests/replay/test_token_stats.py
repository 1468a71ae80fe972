"""``token_stats`` against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from replay_helpers import minmax, random_states, settings

from kvbits.replay.token_stats import token_stats


def test_every_number_is_what_its_name_says():
    x = random_states(tokens=30)
    plan = settings(group_size=16)
    found = token_stats(x, plan, (5, 26), "online")
    assert len(found) == 2
    for head in range(2):
        part = x[head, 5:26].numpy().astype(np.float64)
        size = np.abs(part)
        expected = {
            "seq_len": 30,
            "quant_tokens": 21,
            "protected_tokens": 9,
            "head_dim": 16,
            "mean": part.mean(),
            "std": part.std(),
            "min": part.min(),
            "max": part.max(),
            "absmax": size.max(),
            "rms": np.sqrt((part**2).mean()),
            "channel_range_mean": (part.max(0) - part.min(0)).mean(),
            "token_range_mean": (part.max(1) - part.min(1)).mean(),
            "channel_outlier": size.max(0).max() / (np.median(size.max(0)) + 1e-8),
            "token_outlier": size.max(1).max() / (np.median(size.max(1)) + 1e-8),
        }
        for bits in (2, 4):
            rows = [minmax(row.numpy(), bits) for row in x[head, 5:26]]
            expected[f"err{bits}"] = np.linalg.norm(part - np.array(rows)) / np.linalg.norm(part)
        assert found[head].pop("source") == "online"
        assert found[head] == pytest.approx(expected, rel=1e-5, abs=1e-7)  # float32 sums
        assert all(type(value) in (int, float) for value in found[head].values())


def test_the_probe_reads_axis_and_group_size_but_no_clipping():
    x = random_states(tokens=32)
    by_channel = settings(choose_axis="channel", group_size=32)
    (first, _) = token_stats(x, by_channel, (0, 32), "online")
    columns = np.array([minmax(column, 4) for column in x[0].numpy().T]).T
    error = np.linalg.norm(x[0].numpy() - columns) / np.linalg.norm(x[0].numpy())
    assert first["err4"] == pytest.approx(error, rel=1e-5)
    (clipped, _) = token_stats(x, by_channel._replace(clip_ratio=0.5), (0, 32), "online")
    assert clipped == first


def test_an_empty_slice_is_all_zeros():
    found = token_stats(random_states(tokens=10), settings(), (4, 4), "prefill")[0]
    assert found.pop("source") == "prefill"
    assert (found.pop("seq_len"), found.pop("protected_tokens")) == (10, 10)
    assert found.pop("head_dim") == 16
    assert set(found.values()) == {0}
