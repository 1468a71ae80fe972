"""KVTuner's YAML: what it says is kept, and what it leaves open must be given."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbits import CachePlan
from kvbits.codecs import Affine
from kvbits.errors import PlanError
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import HeadGroup, LayerPlan

FULL = LayerGeometry(
    layer_type="full_attention", num_key_value_heads=4, key_head_dim=32, value_head_dim=32
)
SLIDING = FULL.model_copy(update={"layer_type": "sliding_attention", "sliding_window": 16})
MODEL = ModelGeometry(
    architecture="toy", num_attention_heads=8, hidden_size=256, layers=(FULL, FULL, FULL)
)
HYBRID = MODEL.model_copy(update={"layers": (FULL, SLIDING, FULL)})
PER_LAYER = """
0: {nbits_key: 8, nbits_value: 4}
1: {nbits_key: 4, nbits_value: 2}
2:
  nbits_value: 2
  nbits_key: 2
"""
HEAD_PAIRS = [(8, 4), (4, 2), (8, 4), (4, 4)]
PER_HEAD = yaml.safe_dump(
    {
        layer: {
            head: {"nbits_key": key, "nbits_value": value}
            for head, (key, value) in enumerate(HEAD_PAIRS)
        }
        for layer in range(3)
    }
)


@pytest.fixture
def read(tmp_path):
    """Import YAML text for a model."""

    def read_text(text: str, model: ModelGeometry = MODEL, mode: Any = "per_token") -> CachePlan:
        path = tmp_path / "preset.yaml"
        path.write_text(text)
        return CachePlan.from_kvtuner_yaml(path, model, mode=mode)

    return read_text


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_layers_become_pairs_in_the_mode_that_is_given(read, mode):
    plan = read(PER_LAYER, mode=mode)
    assert plan.layers == CachePlan.from_pairs(MODEL, [(8, 4), (4, 2), (2, 2)], mode).layers
    assert plan.provenance is not None
    assert (plan.provenance.method, plan.provenance.mode) == ("kvtuner", mode)


def test_mode_must_be_given(tmp_path):
    """A KIVI preset read as per-token would run, and be another plan."""
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'mode'"):
        CachePlan.from_kvtuner_yaml(tmp_path / "x.yaml", MODEL)  # type: ignore[call-arg]


def test_unknown_mode_is_refused(read):
    with pytest.raises(ValueError, match="mode must be one of per_token, kivi, got 'pertoken'"):
        read(PER_LAYER, mode="pertoken")


def test_heads_with_equal_pairs_share_a_group(read):
    assert read(PER_HEAD).layers[0] == LayerPlan(
        groups=(
            HeadGroup(heads=(0, 2), key=Affine(bits=8), value=Affine(bits=4)),
            HeadGroup(heads=(1,), key=Affine(bits=4), value=Affine(bits=2)),
            HeadGroup(heads=(3,), key=Affine(bits=4), value=Affine(bits=4)),
        )
    )


def test_equal_heads_are_one_group_of_all_heads(read):
    same = yaml.safe_dump(
        {i: {h: {"nbits_key": 8, "nbits_value": 4} for h in range(4)} for i in range(3)}
    )
    assert read(same).layers == CachePlan.uniform(MODEL, 8, 4).layers


def test_effective_bits_average_over_heads(read):
    nominal = sum(key + value for key, value in HEAD_PAIRS) / 8
    assert (
        read(PER_HEAD).effective_bits == nominal + 1
    )  # 32 bits of scale and offset per 32 values


def test_sliding_layers_may_be_left_out(read):
    text = "0: {nbits_key: 8, nbits_value: 4}\n2: {nbits_key: 4, nbits_value: 2}\n"
    assert read(text, HYBRID).pairs == [(8, 4), (16, 16), (4, 2)]


def test_sliding_layers_may_not_be_packed(read):
    with pytest.raises(PlanError, match=r"layers\[1\] must keep both sides at 16 bits"):
        read(PER_LAYER, HYBRID)


def test_settings_reach_the_codecs(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(PER_LAYER)
    plan = CachePlan.from_kvtuner_yaml(path, MODEL, mode="kivi", residual_length=128)
    assert {layer.residual_length for layer in plan.layers} == {128}


widths = st.sampled_from([2, 3, 4, 8])
head_pairs = st.lists(
    st.lists(st.tuples(widths, widths), min_size=4, max_size=4), min_size=3, max_size=3
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=head_pairs, mode=st.sampled_from(["per_token", "kivi"]))
def test_export_and_import_are_inverse(tmp_path, pairs, mode):
    path = tmp_path / "preset.yaml"
    data = {
        layer: {
            head: {"nbits_key": key, "nbits_value": value}
            for head, (key, value) in enumerate(heads)
        }
        for layer, heads in enumerate(pairs)
    }
    path.write_text(yaml.safe_dump(data))
    plan = CachePlan.from_kvtuner_yaml(path, MODEL, mode=mode)
    plan.to_kvtuner_yaml(path)
    assert CachePlan.from_kvtuner_yaml(path, MODEL, mode=mode) == plan


def test_export_is_plain_kvtuner_yaml_with_integer_keys(read, tmp_path):
    path = tmp_path / "out.yaml"
    plan = read("0: {nbits_key: 8, nbits_value: 4}\n2: {nbits_key: 4, nbits_value: 2}\n", HYBRID)
    plan.to_kvtuner_yaml(path)
    assert path.read_text().startswith("# written by kvbits; quantization mode: per_token\n")
    assert yaml.safe_load(path.read_text()) == {
        0: {"nbits_key": 8, "nbits_value": 4},
        2: {"nbits_key": 4, "nbits_value": 2},
    }


def test_export_refuses_what_kvtuner_cannot_express(tmp_path):
    """KVTuner overflows int8 above 8 bits and returns garbage without an error."""
    plan = CachePlan.from_pairs(MODEL, [(4, 4), (8, 16), (4, 4)])
    with pytest.raises(
        PlanError, match=r"layers\[1\] must have widths of at most 8 bits .* got 16"
    ):
        plan.to_kvtuner_yaml(tmp_path / "out.yaml")
    assert not list(tmp_path.iterdir())


def pair_lines(count: int, start: int = 0) -> str:
    return "".join(
        f"{layer}: {{nbits_key: 4, nbits_value: 4}}\n" for layer in range(start, start + count)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            pair_lines(2) + '"2": {nbits_key: 4, nbits_value: 4}\n',
            r"^layers must have integer keys, got '2'; write them without quotes$",
            id="string key",
        ),
        pytest.param(
            pair_lines(1) + "yes: {nbits_key: 4, nbits_value: 4}\n",
            r"^layers must have integer keys, got True",
            id="truth value as key",
        ),
        pytest.param(
            pair_lines(2),
            r"^layers must be complete, got none for 2; the file is for another model$",
            id="missing layer",
        ),
        pytest.param(
            pair_lines(4),
            r"^layers must be numbered 0 to 2 for this model, got 3; the file is for another",
            id="extra layer",
        ),
        pytest.param(
            pair_lines(3, start=-1), r"^layers must be numbered 0 to 2 .* got -1", id="negative"
        ),
        pytest.param(
            pair_lines(2) + "2: {nbits_key: 5, nbits_value: 4}\n",
            r"^nbits_key of layer 2 must be one of 2, 3, 4, 8, 16, got 5$",
            id="bad width",
        ),
        pytest.param(
            pair_lines(2) + "2: {nbits_key: 4, nbits_value: '4'}\n",
            r"^nbits_value of layer 2 must be one of .* got '4'$",
            id="width as text",
        ),
        pytest.param(
            pair_lines(2) + "2: {nbits_key: 4, nbits_value: [4]}\n",
            r"^nbits_value of layer 2 must be one of .* got \[4\]$",
            id="width as list",
        ),
        pytest.param(
            pair_lines(2) + "2: {nbits_key: 4}\n",
            r"^layer 2 must have exactly nbits_key and nbits_value, got \{'nbits_key': 4\}$",
            id="missing side",
        ),
        pytest.param(
            pair_lines(2) + "2: {nbits_key: 4, nbits_value: 4, axis: 0}\n",
            r"^layer 2 must have exactly nbits_key and nbits_value, got",
            id="unknown field",
        ),
        pytest.param(
            pair_lines(2) + "2: [4, 4]\n", r"^layer 2 must have exactly", id="layer as a list"
        ),
        pytest.param(pair_lines(2) + "2:\n", r"^layers must give widths for 2", id="empty layer"),
        pytest.param(
            pair_lines(2) + "2: {0: {nbits_key: 4, nbits_value: 4}}\n",
            r"^heads of layer 2 must be complete, got none for 1, 2, 3",
            id="missing heads",
        ),
        pytest.param(
            PER_HEAD + "  4: {nbits_key: 4, nbits_value: 4}\n",
            r"^heads of layer 2 must be numbered 0 to 3 for this model, got 4",
            id="extra head",
        ),
        pytest.param(
            pair_lines(2) + "2: {}\n", r"^heads of layer 2 must be complete", id="no heads"
        ),
        pytest.param(
            pair_lines(3) + "1: {nbits_key: 8, nbits_value: 8}\n",
            r"^1 must be given once, got it twice",
            id="repeated layer",
        ),
        pytest.param("", r"^layers must be a mapping .* got None$", id="empty file"),
        pytest.param("- 1\n", r"^layers must be a mapping .* got \[1\]$", id="list"),
        pytest.param("0: {", r"must hold valid YAML, got .* at line 1$", id="no YAML"),
        pytest.param("{[1]: 2}", r"must hold valid YAML, got .*unhashable", id="unhashable key"),
        pytest.param("\x00", r"must hold valid YAML", id="control character"),
        pytest.param(
            "0: !!python/object/apply:os.system ['true']",
            r"must hold valid YAML, got .*could not determine a constructor",
            id="code",
        ),
        pytest.param(
            "a: &a [x, x]\nb: [*a, *a]\n", r"^file must not use YAML aliases", id="aliases"
        ),
        pytest.param("[" * 20_000, r"must hold valid YAML, got .*", id="deep nesting"),
    ],
)
def test_bad_file_is_refused_in_one_sentence(read, text, message):
    with pytest.raises(PlanError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="path must name a readable plan file"):
        CachePlan.from_kvtuner_yaml(tmp_path / "none.yaml", MODEL, mode="kivi")


def test_published_preset_keeps_its_average_bits(read):
    """Llama-3.1-8B, KIVI mode, preset 4_1: 3.25 nominal bits, one more with its metadata."""
    ranges = {
        (8, 4): [13, 17],
        (4, 4): [1, 2, 3, 7, 29, 31],
        (4, 2): [5, 6, *range(8, 13), 14, 15, 16, *range(18, 25), 26, 28, 30],
        (2, 2): [0, 4, 25, 27],
    }
    data = {
        layer: {"nbits_key": key, "nbits_value": value}
        for (key, value), layers in ranges.items()
        for layer in layers
    }
    llama = FULL.model_copy(
        update={"num_key_value_heads": 8, "key_head_dim": 128, "value_head_dim": 128}
    )
    model = MODEL.model_copy(update={"layers": (llama,) * 32})
    plan = read(yaml.safe_dump(data), model, "kivi")
    assert sum(map(sum, plan.pairs)) / 64 == 3.25
    assert plan.effective_bits == 4.25
