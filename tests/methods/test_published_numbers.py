"""Numbers that were published, or worked out from what was: sizes of methods, errors on a tile."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from kvbits.codecs import Affine, NormScaled, Rotated, VarianceNormalised
from kvbits.codecs.levels import lloyd_max
from kvbits.methods import build_method
from kvbits.testing import tiny_model

LAYERS, HEADS, DIM = 32, 8, 128
CHANNELS = HEADS * DIM


@pytest.fixture(scope="module")
def config():
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def widths(bits):
    return {"key_bits": bits, "value_bits": bits}


@pytest.mark.parametrize(
    ("name", "settings", "key", "value"),
    [
        # b + 32 / g, with an fp16 scale and offset for g values
        ("per-token", widths(4), 4.25, 4.25),
        ("per-token", {**widths(2), "group_size": 32}, 3.0, 3.0),
        ("kivi", {"group_size": 32}, 3.0, 3.0),
        ("kivi", {"group_size": 64}, 2.5, 2.5),
        ("kivi", {"group_size": 128}, 2.25, 2.25),
        ("kivi", {**widths(4), "group_size": 32}, 5.0, 5.0),
        ("kivi", {**widths(4), "group_size": 128}, 4.25, 4.25),
        ("hadamard", widths(4), 4.25, 4.25),
        ("oscar", {}, 2.25, 2.25),
        # Kitty: an eighth of the key channels has two bits more, and is named by a byte a group
        (
            "kivi",
            {"group_size": 128, "promoted_share": 0.125},
            2.25 + 0.25 + 16 * 8 / 128**2,
            2.25,
        ),
        # fp8 metadata; 128 values of 1.5 bits are 26 bytes
        ("skvq", {"reorder": "none"}, 2.125, 26 * 8 / 128 + 0.125),
        # one fp16 norm, no groups: b + 16 / D
        ("turboquant", widths(3), 3.125, 3.125),
        # three fp16 numbers for 128 values on either side
        ("kvarn", {}, 2.375, 2.375),
        ("kvarn", {"key_bits": 4}, 4.375, 2.375),
        ("int8", {}, 8.125, 8.125),
        ("fp8", {}, 8.0, 8.0),
        ("nvfp4", {}, 4.5, 4.5),
        ("mxfp4", {}, 4.25, 4.25),
        ("quanto", widths(4), 4.5, 4.5),
        ("hqq", {**widths(3), "group_size": 128}, 3.25, 3.25),
        # the widest tier, and two slots of 24 bits
        ("qaq", {"tiers": (2, 4)}, 4.25 + 48 / 128, 4.25 + 48 / 128),
    ],
)
def test_effective_bits_are_those_of_the_formula(name, settings, key, value, config):
    plan = build_method(name, **settings).plan(config)
    (group,) = plan.layers[0].groups
    assert (group.key.stored_bits(DIM), group.value.stored_bits(DIM)) == (key, value)
    assert plan.effective_bits == pytest.approx((key + value) / 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kvquant_differs_from_its_formula_by_what_is_said(bits, config):
    """K = b + 0.32 + 32/C + 32/T and V = b + 0.32 + 64/C: 1 % outliers of a value and an index of
    16 bits, a pointer of 32 bits a token, scale and offset of 16 bits a channel or token.

    Here an outlier is 24 bits and each head has two a token, which need no pointer; values have a
    scale and an offset for every head. Ranges of keys are arrays, two float32 a channel.
    """
    key = bits + 0.32 + 32 / CHANNELS
    value = bits + 0.32 + 64 / CHANNELS
    plan = build_method("kvquant", **widths(bits), key_ranges="block").plan(config)
    block, ours = plan.layers[0].groups[0].key.inner, plan.layers[0].groups[0].value
    outliers = 24 * 2 / DIM
    per_key = block.inner.parameter_specs(DIM)[0].bits_per_item / (128 * DIM)
    assert block.stored_bits(DIM) - per_key == pytest.approx(key - 0.32 - 32 / CHANNELS + outliers)
    heads = 32 / DIM - 32 / CHANNELS
    assert ours.stored_bits(DIM) == pytest.approx(value - 0.32 + outliers - 32 / CHANNELS + heads)
    assert abs(block.stored_bits(DIM) - per_key - key) < 0.03


def test_ranges_of_keys_are_counted_once():
    """Two float32 a channel: 64 / T bits a value, twice the paper's 32 / T."""
    model = tiny_model("llama")
    text = torch.randint(5, 90, (90,), generator=torch.Generator().manual_seed(0))
    plan = build_method("kvquant", levels="uniform", outlier_share=0.0).calibrate(model, [text])
    assert plan.layers[0].groups[0].key.stored_bits(32) == 3
    assert plan.array_bytes == 4 * (2 * 32) * 8  # layers, channels, bytes


def test_kivi_makes_a_long_cache_a_fifth(config):
    """32k tokens at 2 bits in groups of 32, 128 newest ones exact: 4 GiB become about 0.76.

    Keys leave the residual in blocks of 128, so all of them are packed; values but the newest.
    """
    tokens, num_values = 32768, LAYERS * CHANNELS
    codes = (tokens + tokens - 128) * num_values // 4
    numbers = 4 * num_values * (tokens + tokens - 128) // 32
    expected = codes + numbers + 2 * 128 * num_values
    assert expected / 2**30 == pytest.approx(0.76, abs=0.005)
    found = build_method("kivi").plan(config).bytes(tokens, max_tokens=tokens)
    # Beside them: room for 128 keys of the residual, and for 128 values that are packed next.
    assert found - expected == pytest.approx(2 * 128 * num_values, rel=0.2)


def test_oscar_at_128k_is_as_published(config):
    """2.28 bits: 64 sinks and 256 newest tokens of 16 bits beside 2.25."""
    tokens = 131072
    size = build_method("oscar").plan(config).bytes(tokens, max_tokens=tokens)
    assert 8 * size / (2 * LAYERS * CHANNELS * tokens) == pytest.approx(2.28, abs=0.005)


def test_tokens_of_turboquant_take_the_bytes_of_vllm():
    """Slots of a head of 128: 134 bytes at 4 bits, 118 at K3V4, 102 at 3; values are uniform."""

    def slot(key_bits, value_bits):
        key, value = NormScaled(levels=lloyd_max(key_bits)), Affine(bits=value_bits)
        return (key.stored_bits(128) + value.stored_bits(128)) * 128 / 8

    assert [slot(4, 4), slot(3, 4), slot(3, 3)] == [134, 118, 102]


# Relative squared errors of 2 and 4 bits on a tile of 128 tokens and channels, three of which have
# offsets, with lognormal norms of tokens; computed apart from this code.
TILE = {
    "per token": (0.795, 0.0386),
    "Hadamard, per token": (0.226, 0.0091),
    "per channel": (0.220, 0.0087),
    "KVarN": (0.140, 0.0055),
    "KIVI, groups of 32": (0.117, 0.0046),
    "TurboQuant": (0.108, 0.0089),
    "TurboQuant after its mean": (0.068, 0.0056),
}


def tile_codecs(bits):
    def channel(group):
        return Affine(bits=bits, granularity="per_channel", group_size=group)

    turbo = Rotated(inner=NormScaled(levels=lloyd_max(bits)), sign_seed=0)
    return {
        "per token": Affine(bits=bits),
        "Hadamard, per token": Rotated(inner=Affine(bits=bits)),
        "per channel": channel(128),
        "KVarN": Rotated(inner=VarianceNormalised(inner=channel(128), scaled="token")),
        "KIVI, groups of 32": channel(32),
        "TurboQuant": turbo,
        "TurboQuant after its mean": turbo,
    }


@pytest.mark.parametrize(("column", "bits"), [(0, 2), (1, 4)])
@pytest.mark.parametrize("name", TILE)
def test_errors_on_a_tile_are_those_of_the_list(name, column, bits):
    """The list says of what kind its tile is, not which; ours are eight such, and their mean is
    within a tenth of all 14 numbers, which span two orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(8, 1, 128, 128, generator=generator)
    tiles *= (0.4 * torch.randn(8, 1, 128, 1, generator=generator)).exp()
    tiles[..., (3, 40, 77)] += torch.tensor([3.0, -6.0, 9.0])
    codec = tile_codecs(bits)[name]
    energy = tiles.square().mean()
    if name.endswith("mean"):
        tiles = tiles - tiles.mean(-2, keepdim=True)
    error = (codec.decode(codec.encode(tiles)) - tiles).square().mean() / energy
    assert error.item() == pytest.approx(TILE[name][column], rel=0.1)
