"""The chosen formats are the nearest ones: compared with enumeration."""

from __future__ import annotations

import itertools
import random

import pytest
from export_helpers import full, geometry, plan_of

from kvbits import CachePlan
from kvbits.errors import PlanError
from kvbits.export import ENGINES, export_plan
from kvbits.methods import build_method

WIDTHS = (2, 3, 4, 8)


def bits_of(engine, name):
    """(key, value) widths of a format."""
    formats = {f.name: (f.key.bits, f.value.bits) for f in (*engine.formats, engine.exact)}
    return formats[name]


def distance(pairs, given):
    return sum(abs(k - a) + abs(v - b) for (k, v), (a, b) in zip(pairs, given, strict=True))


def is_wide(pairs, given):
    return all(a >= k and b >= v for (k, v), (a, b) in zip(pairs, given, strict=True))


def assignments(engine, num_layers, skipped):
    """Every assignment of formats' names the engine could be told, by its reach."""
    names, exact = [f.name for f in engine.formats], engine.exact.name
    if engine.reach == "layer":
        yield from itertools.product([*names, exact], repeat=num_layers)
    for name in [*names, exact]:
        if engine.reach == "model":
            yield (name,) * num_layers
        elif engine.reach == "model_or_exact":
            forced = skipped if name.startswith("turboquant") else ()
            for mask in itertools.product([name, exact], repeat=num_layers):
                if all(mask[index] == exact for index in forced):
                    yield mask


@pytest.mark.parametrize("allow_narrower", [False, True])
@pytest.mark.parametrize("name", ["vllm", "sglang", "tensorrt-llm", "modelopt", "lmdeploy"])
def test_no_other_assignment_is_nearer(name, allow_narrower):
    engine, draw = ENGINES[name], random.Random(name)
    for _ in range(8):
        pairs = [(draw.choice(WIDTHS), draw.choice(WIDTHS)) for _ in range(5)]
        made = export_plan(plan_of(*pairs), name, allow_narrower=allow_narrower)
        given = [bits_of(engine, layer.format) for layer in made.layers]
        possible = [
            [bits_of(engine, format) for format in names]
            for names in assignments(engine, len(pairs), skipped=(0, 1, 3, 4))
        ]
        allowed = [g for g in possible if allow_narrower or is_wide(pairs, g)]
        assert given in allowed
        assert distance(pairs, given) == min(distance(pairs, g) for g in allowed)


def test_among_equal_widths_the_same_kind_of_code_wins():
    config = full(4)
    assert export_plan(CachePlan.uniform(config, 8, 8), "vllm").layers[0].format == (
        "int8_per_token_head"
    )
    layers = build_method("fp8").layer_plan(config.layers[0], None)
    plan = CachePlan.from_layers(config, [layers] * 4)
    assert export_plan(plan, "vllm").layers[0].format == "fp8"
    layers = build_method("mxfp4").layer_plan(config.layers[0], None)
    plan = CachePlan.from_layers(config, [layers] * 4)
    assert export_plan(plan, "sglang").layers[0].format == "fp4_mx_block16"


def test_rotated_formats_are_left_out_where_heads_are_no_power_of_two():
    made = export_plan(CachePlan.uniform(full(6, head_dim=96), 4, 4), "vllm")
    assert {layer.format for layer in made.layers} == {"nvfp4"}


def test_a_plan_that_would_only_stay_exact_is_refused():
    plan = plan_of((16, 16), (4, 4))
    with pytest.raises(PlanError, match="only 16 bits throughout would do"):
        export_plan(plan, "sglang")
    made = export_plan(plan, "sglang", allow_narrower=True)
    assert [layer.format for layer in made.layers] == ["fp8_e4m3", "fp8_e4m3"]
    assert made.layers[0].changes == ("keys 16 → 8 bits", "values 16 → 8 bits")


def test_an_exact_plan_stays_exact():
    made = export_plan(plan_of((16, 16), (16, 16)), "sglang")
    assert made.settings.arguments == ("--kv-cache-dtype", "auto")
    assert made.engine_bits == made.plan_bits == 16


def test_heads_of_a_layer_take_the_widest():
    model = geometry("full_attention", "full_attention")
    plan = CachePlan.from_pairs(model, [(4, 4), (4, 4)])
    wide = CachePlan.uniform(model, 8, 4).layers[0].groups[0]
    narrow = plan.layers[0].groups[0]
    groups = (
        wide.model_copy(update={"heads": (0,)}),
        narrow.model_copy(update={"heads": (1,)}),
    )
    mixed = plan.layers[0].model_copy(update={"groups": groups})
    made = export_plan(CachePlan.from_layers(model, [mixed, plan.layers[1]]), "modelopt")
    assert [layer.format for layer in made.layers] == ["FP8_K_NVFP4_V", "NVFP4"]
    assert "heads alike, as the widest" in made.layers[0].changes
