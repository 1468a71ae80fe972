from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from kvbits.codecs import Affine, Identity
from kvbits.methods import build_method
from kvbits.plan import CachePlan
from kvbits.tuning.calibrated import calibrating
from kvbits.tuning.candidates import check_names, of_methods, of_mode
from kvbits.tuning.costs import cost_table
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return AutoConfig.from_pretrained(tiny_model_dir)


def labels(candidates) -> list[str]:
    return [column.label for column in candidates.columns]


def column(candidates, label: str) -> int:
    return labels(candidates).index(label)


def test_a_mode_and_its_method_store_the_same(config):
    mode, method = of_mode(config, "per_token", (4, 2)), of_methods(config, ["per-token"], (4, 2))
    assert labels(mode) == labels(method) == ["K16V16", "K4V4", "K4V2", "K2V4", "K2V2"]
    choice = (0, 2, 3)
    assert mode.plan(choice).layers == method.plan(choice).layers
    assert mode.labels(choice) == ("K16V16", "K4V2", "K2V4")


def test_layers_of_a_mixed_plan_are_those_of_each_method_s_own_plan(config):
    candidates = of_methods(config, ["kvarn", "kivi:residual_length=32"], (4, 2))
    choice = (
        column(candidates, "kvarn K4V2"),
        column(candidates, "kivi:residual_length=32 K2V4"),
        0,
    )
    plan = candidates.plan(choice)
    kvarn = build_method("kvarn", key_bits=4, value_bits=2).plan(config)
    kivi = build_method("kivi", key_bits=2, value_bits=4, residual_length=32).plan(config)
    assert plan.layers[:2] == (kvarn.layers[0], kivi.layers[1])
    assert plan.layers[2].is_exact
    assert CachePlan.from_json(plan.model_dump_json()).layers == plan.layers


def test_sizes_are_those_of_the_plans_sinks_and_residual_included(config):
    candidates = of_methods(config, ["kvarn", "turboquant"], (3, 2))
    for context in (None, 777):
        costs = cost_table(candidates, context=context)
        for choice in ((1, 5, 8), (4, 0, 7)):
            plan = candidates.plan(choice)
            stored = plan.effective_bits if context is None else plan.effective_bits_at(context)
            assert costs.effective_bits(choice) == pytest.approx(stored, rel=1e-12)


def test_isolating_a_side_keeps_its_codec_and_window_and_nothing_else(config):
    candidates = of_methods(config, ["kvarn", "per-token"], (4,))
    option = next(each for each in candidates.sides if each.label == "kvarn V4")
    plan = candidates.isolated(1, option)
    kvarn = build_method("kvarn", key_bits=4, value_bits=4).plan(config).layers[1]
    assert [layer.is_exact for layer in plan.layers] == [True, False, True]
    assert plan.layers[1].groups[0].key == Identity()
    assert plan.layers[1].groups[0].value == kvarn.groups[0].value
    assert plan.layers[1].sink_tokens == kvarn.sink_tokens == 128


def test_methods_take_the_widths_they_have(config):
    candidates = of_methods(config, ["turboquant", "skvq", "fp8"], (8, 4, 1.5))
    found = labels(candidates)
    assert [label for label in found if label.startswith("turbo")] == ["turboquant K4V4"]
    assert [label for label in found if label.startswith("fp8")] == ["fp8 K8V8"]
    assert "skvq K8V1.5" in found
    assert len(found) == 1 + 1 + 9 + 1


def test_a_width_that_the_settings_fix_stays(config):
    found = labels(of_methods(config, ["kivi:key_bits=2,promoted_share=0.125"], (4, 3)))
    assert found == ["K16V16", "K2V4", "K2V3"]


@pytest.mark.parametrize(
    ("names", "widths", "message"),
    [
        (["awq"], (4,), r"candidates must be among per-token, .*, got 'awq'"),
        (["kivi", "kivi"], (4,), "once each, got 'kivi' twice"),
        (["kivi:residual"], (4,), "must be METHOD or METHOD:name=value,.*got 'kivi:residual'"),
        (["kivi:residual_size=3"], (4,), "residual_size must not be given"),
        (["kivi", "turboquant"], (8,), "widths must hold one that turboquant has as key_bits"),
    ],
)
def test_candidates_that_cannot_be_are_refused(names, widths, message):
    with pytest.raises(ValueError, match=message):
        check_names(names, widths)


def test_a_plan_whose_layers_differ_is_no_candidate(config):
    def make(name, method):
        exact = CachePlan.uniform(config, 4, 4)
        other = exact.layers[0].model_copy(
            update={
                "groups": (exact.layers[0].groups[0].model_copy(update={"key": Affine(bits=2)}),)
            }
        )
        return CachePlan.from_layers(config, (other, *exact.layers[1:]))

    with pytest.raises(ValueError, match="one pair of widths, got 'per-token', which has 2"):
        of_methods(config, ["per-token"], (4,), make)


def test_calibrated_codecs_are_fitted_once_and_read_again(tiny_model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from kvbits.evaluation.corpora import TokenSet
    from kvbits.methods import KVQuant

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    data = [TokenSet("text", "text", "calibration", ids, torch.ones_like(ids, dtype=torch.bool))]
    make = calibrating(model, data, run=RunDir(tmp_path), progress=Silent())
    name = "kvquant:block_tokens=16,levels=activations"
    first = of_methods(model.config, [name, "kivi"], (3, 2), make)
    monkeypatch.setattr(KVQuant, "calibrate", None)  # a second calibration would fail
    again = of_methods(model.config, [name, "kivi"], (3, 2), make)
    choice = (column(first, f"{name} K3V2"),) * 3
    assert again.plan(choice) == first.plan(choice)
    assert first.plan(choice) != of_methods(model.config, [name, "kivi"], (3, 2)).plan(choice)
    assert len(list((tmp_path / "calibrated").glob("*.json"))) == 2


# ----- heads


def by_head(config, mode="per_token", widths=(4, 2)):
    return of_mode(config, mode, widths, granularity="head")


def test_every_head_of_a_layer_chooses_alone(config):
    """The tiny model has 3 layers of 2 key/value heads."""
    candidates = by_head(config)
    assert candidates.layers == ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1")
    choice = (1, 1, 2, 4, 0, 3)
    plan = candidates.plan(choice)
    assert plan.layers[0] == of_mode(config, "per_token", (4, 2)).plan((1, 0, 0)).layers[0]
    assert [group.heads for group in plan.layers[1].groups] == [(0,), (1,)]
    assert [(g.key.bits, g.value.bits) for g in plan.layers[2].groups] == [(16, 16), (2, 4)]
    assert candidates.labels(choice) == ("K4V4", "K4V2 K2V2", "K16V16 K2V4")
    assert candidates.plan((0,) * 6).layers[0].is_exact
    assert CachePlan.from_json(plan.model_dump_json()).layers == plan.layers


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize("choice", [(1, 1, 2, 4, 0, 3), (0, 0, 4, 4, 1, 2), (0, 4, 3, 0, 0, 0)])
def test_sizes_of_heads_add_up_to_those_of_the_plan(config, mode, choice):
    """At a context pages and tables of heads that share a codec may take less, never more."""
    candidates = by_head(config, mode)
    plan = candidates.plan(choice)
    assert cost_table(candidates).effective_bits(choice) == pytest.approx(plan.effective_bits)
    counted = cost_table(candidates, context=777, batch=2).effective_bits(choice)
    stored = plan.effective_bits_at(777, 2)
    assert stored <= counted * (1 + 1e-12)
    assert counted <= stored * 1.05


def test_isolating_a_head_leaves_its_neighbours_exact(config):
    candidates = by_head(config)
    option = next(each for each in candidates.sides if each.label == "K2")
    layer = candidates.isolated("1.1", option).layers[1]
    assert {group.heads: (group.key.bits, group.value.bits) for group in layer.groups} == {
        (1,): (2, 16),
        (0,): (16, 16),
    }


def test_heads_cannot_mix_methods_that_keep_different_tokens_exact(config):
    with pytest.raises(ValueError, match="must be given with methods that keep the same tokens"):
        of_methods(config, ["kivi", "per-token"], (4,), granularity="head")
