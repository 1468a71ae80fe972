"""What each engine is told, against what it takes.

Names are compared with those the releases document, written down here; where an engine is
installed, with its own source too.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from export_helpers import full, geometry, plan_of

from kvbits import CachePlan
from kvbits.errors import PlanError
from kvbits.export import ENGINES, export_plan
from kvbits.export.listing import markdown_table
from kvbits.methods import build_method

MIXED = [(8, 4)] * 2 + [(4, 2)] * 4
DOCUMENTED = {
    "vllm": "auto fp8 int8_per_token_head int4_per_token_head turboquant_k8v4 turboquant_4bit_nc "
    "turboquant_k3v4_nc turboquant_3bit_nc nvfp4",
    "sglang": "auto fp8_e4m3 nvfp4 fp4_mx_block16",
    "tensorrt-llm": "auto fp8 nvfp4",
    "lmdeploy": "none int4 int8 fp8 turbo_quant",
    "modelopt": "none FP8 NVFP4 FP8_K_NVFP4_V",
}


def names(engine):
    return {format.name for format in (*ENGINES[engine].formats, ENGINES[engine].exact)}


def installed_source(package, path):
    """Text of a file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return (Path(spec.submodule_search_locations[0]) / path).read_text()


@pytest.mark.parametrize("engine", DOCUMENTED)
def test_formats_have_the_documented_names(engine):
    assert names(engine) == set(DOCUMENTED[engine].split())


def test_vllm_knows_the_names():
    tree = ast.parse(installed_source("vllm", "config/cache.py"))
    (literal,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CacheDType"
    ]
    assert names("vllm") <= set(ast.literal_eval(literal.slice))


def test_sglang_knows_the_names():
    source = installed_source("sglang", "srt/arg_groups/fields/model.py")
    choices = re.search(r"kv_cache_dtype: A\[.*?choices=\[(.*?)\]", source, re.DOTALL)
    assert names("sglang") <= set(re.findall(r'"(.*?)"', choices[1]))


def test_lmdeploy_knows_the_names():
    policy = re.search(
        r"class QuantPolicy.*?(?=\n\n\n)", installed_source("lmdeploy", "messages.py"), re.DOTALL
    )
    known = {name.lower() for name in re.findall(r"^    (\w+) = ", policy[0], re.MULTILINE)}
    assert names("lmdeploy") <= known


def test_modelopt_takes_the_configuration():
    config = pytest.importorskip("modelopt.torch.quantization.config")
    files = export_plan(plan_of(*MIXED), "modelopt").settings.files
    config.QuantizeConfig(**yaml.safe_load(files["modelopt_quant_cfg.yaml"]))


# ----- bytes


@pytest.mark.parametrize(
    ("name", "slot_bytes"),
    # vLLM's own slot sizes: codes, an fp16 norm for keys, an fp16 scale and zero for values.
    [
        ("turboquant_k8v4", 128 + 64 + 4),
        ("turboquant_4bit_nc", 64 + 2 + 64 + 4),
        ("turboquant_k3v4_nc", 48 + 2 + 64 + 4),
        ("turboquant_3bit_nc", 48 + 2 + 48 + 4),
        ("int8_per_token_head", 2 * (128 + 4)),
        ("int4_per_token_head", 2 * (64 + 4)),
        ("nvfp4", 2 * (64 + 8)),
        ("fp8", 2 * 128),
    ],
)
def test_vllm_formats_cost_what_vllm_allocates(name, slot_bytes):
    (format,) = [format for format in ENGINES["vllm"].formats if format.name == name]
    (layer,) = full(1, head_dim=128).layers
    assert format.stored_bits(layer) == 8 * slot_bytes * layer.num_key_value_heads


@pytest.mark.parametrize(
    ("types", "bits"),  # ggml's blocks of 32: 34, 24, 22, 20 and 18 bytes
    [("q8_0", 8.5), ("q5_1", 6.0), ("q5_0", 5.5), ("q4_1", 5.0), ("q4_0", 4.5), ("iq4_nl", 4.5)],
)
def test_llama_cpp_types_cost_what_ggml_allocates(types, bits):
    (format,) = [f for f in ENGINES["llama.cpp"].formats if f.name == f"{types} {types}"]
    (layer,) = full(1).layers
    assert format.stored_bits(layer) / layer.values_per_token == bits


def test_effective_bits_are_the_mean_over_values():
    made = export_plan(plan_of(*MIXED), "modelopt")
    # FP8 keys and NVFP4 values in two layers, NVFP4 of 4.5 bits in four.
    assert made.engine_bits == pytest.approx((2 * (8 + 4.5) + 4 * 9) / 12)
    assert made.plan_bits == plan_of(*MIXED).effective_bits


# ----- what is written


def test_vllm_gets_flags_and_the_same_in_a_file():
    made = export_plan(plan_of(*MIXED), "vllm")
    assert made.settings.arguments == (
        *("--kv-cache-dtype", "int4_per_token_head"),
        *("--kv-cache-dtype-skip-layers", "0", "1"),
    )
    assert yaml.safe_load(made.settings.files["vllm.yaml"]) == {
        "kv-cache-dtype": "int4_per_token_head",
        "kv-cache-dtype-skip-layers": ["0", "1"],
    }
    assert made.layers[0].changes == ("keys 8 → 16 bits", "values 4 → 16 bits")
    assert made.layers[2].changes == ("values 2 → 4 bits",)


def test_vllm_turboquant_leaves_the_ends_exact_as_vllm_will():
    made = export_plan(plan_of(*[(3, 3)] * 12), "vllm")
    assert made.settings.arguments == (
        *("--kv-cache-dtype", "int4_per_token_head"),
    )  # 4 ends at 16 bits would be further off than one bit everywhere
    made = export_plan(plan_of(*[(3, 3)] * 100), "vllm")
    skipped = made.settings.arguments[3:]
    assert made.settings.arguments[1] == "turboquant_3bit_nc"
    assert skipped == ("0", "1", "98", "99")


def test_vllm_leaves_sliding_layers_out_of_the_format():
    model = geometry("sliding_attention", "full_attention", "full_attention")
    made = export_plan(CachePlan.uniform(model, 4, 4), "vllm")
    assert made.settings.arguments[2:] == ("--kv-cache-dtype-skip-layers", "sliding_window")
    assert [layer.layer for layer in made.layers] == [1, 2]


def test_engines_with_one_format_say_that_sliding_layers_take_it():
    model = geometry("sliding_attention", "full_attention")
    made = export_plan(CachePlan.uniform(model, 4, 4), "sglang")
    assert "layers the plan leaves to the stock cache become nvfp4 too" in made.losses


def test_tensorrt_llm_gets_a_flag_and_a_file_of_options():
    arguments, files = export_plan(plan_of((8, 8)), "tensorrt-llm").settings
    assert arguments == ("--kv_cache_dtype", "fp8")
    assert yaml.safe_load(files["tensorrt_llm.yaml"]) == {"kv_cache_config": {"dtype": "fp8"}}


def test_lmdeploy_gets_the_backend_that_has_the_policy():
    assert export_plan(plan_of((4, 4)), "lmdeploy").settings.arguments == (
        *("--quant-policy", "int4"),
    )
    assert export_plan(plan_of((4, 2)), "lmdeploy").settings.arguments == (
        *("--quant-policy", "turbo_quant", "--backend", "pytorch"),
    )


def test_llama_cpp_gets_a_type_for_each_side():
    assert export_plan(plan_of((8, 4)), "llama.cpp").settings.arguments == (
        *("--cache-type-k", "q8_0", "--cache-type-v", "q4_0", "--flash-attn", "on"),
    )
    made = export_plan(plan_of((8, 16)), "llama.cpp")
    assert made.settings.arguments == ("--cache-type-k", "q8_0", "--cache-type-v", "f16")


def test_modelopt_gets_every_layer():
    files = export_plan(plan_of((8, 8), (16, 16), (4, 4)), "modelopt").settings.files
    exported = json.loads(files["hf_quant_config.json"])["quantization"]
    # The layout of Model Optimizer's own tests of mixed KV caches.
    assert exported["kv_cache_quant_algo"] == "MIXED_PRECISION"
    assert exported["kv_cache_schema_version"] == 1
    assert exported["kv_cache_quantized_layers"] == {
        "model.layers.0.self_attn": {"quant_algo": "FP8"},
        "model.layers.2.self_attn": {"quant_algo": "NVFP4"},
    }
    entries = yaml.safe_load(files["modelopt_quant_cfg.yaml"])["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    assert [entry["quantizer_name"] for entry in entries[1:]] == [
        f"*layers.{index}.self_attn.{side}_bmm_quantizer" for index in (0, 2) for side in "kv"
    ]
    assert entries[3]["cfg"]["block_sizes"][-1] == 16


def generation_arguments(plan):
    return json.loads(export_plan(plan, "transformers").settings.files["generation_config.json"])


def test_transformers_takes_the_generation_arguments():
    from transformers import GenerationConfig

    plan = plan_of((4, 2), mode="kivi", residual_length=64)
    config = GenerationConfig(**generation_arguments(plan))
    config.validate(strict=True)
    assert config.cache_implementation == "quantized"
    assert config.cache_config["nbits"] == 4
    assert config.cache_config["residual_length"] == 64


@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 64), (64, 64), (96, 32), (32, 32)])
def test_transformers_groups_divide_the_heads(head_dim, group_size):
    plan = CachePlan.uniform(full(2, head_dim=head_dim), 4, 4)
    assert generation_arguments(plan)["cache_config"]["q_group_size"] == group_size


@pytest.mark.usefixtures("quanto_in_python")
@pytest.mark.parametrize(
    ("bits", "backend"), [(2, "quanto"), (4, "quanto"), (8, "hqq"), (8, "fp8")]
)
def test_transformers_generates_with_them(tiny_model_dir, bits, backend):
    """At odd lengths, where some backends fail at some widths."""
    import torch
    from transformers import AutoModelForCausalLM, cache_utils

    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    if backend != "fp8":
        module = {"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}[backend]
        pytest.importorskip(module)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = model.config
    plan = CachePlan.uniform(config, bits, bits)
    if backend == "fp8":
        plan = build_method("fp8").plan(config)
    arguments = generation_arguments(plan)
    assert arguments["cache_config"]["backend"] == backend
    made = model.generate(
        torch.arange(1, 8)[None], **arguments, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert made.shape == (1, 12)


def test_transformers_refuses_what_its_cache_refuses():
    model = geometry("sliding_attention", "full_attention")
    with pytest.raises(PlanError, match="a model of full-attention layers alone"):
        export_plan(CachePlan.uniform(model, 4, 4), "transformers")


def test_kvtuner_reads_back_what_it_is_given(tmp_path):
    plan = plan_of(*MIXED, mode="kivi")
    made = export_plan(plan, "kvtuner")
    path = tmp_path / "plan.yaml"
    path.write_text(made.settings.files["kvtuner.yaml"])
    again = CachePlan.from_kvtuner_yaml(path, plan.model, mode="kivi")
    assert again.layers == plan.layers
    assert all(layer.changes == () for layer in made.layers)
    assert made.engine_bits > 8  # its code stores bytes


def test_kvtuner_refuses_what_it_cannot_express():
    with pytest.raises(PlanError, match="at most 8 bits in a KVTuner file"):
        export_plan(plan_of((16, 16), (4, 4)), "kvtuner")


# ----- what is lost, for all engines


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "kvtuner"])
def test_exact_tokens_are_reported_lost(engine):
    plan = plan_of(*[(4, 4)] * 4, mode="kivi", sink_tokens=4)
    losses = " ".join(export_plan(plan, engine).losses)
    assert "the first 4 tokens" in losses
    assert "the newest 32 tokens" in losses or "the residual is empty again" in losses
    assert not export_plan(plan_of(*[(4, 4)] * 4), engine).losses


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "kvtuner"])
def test_per_channel_keys_are_reported_lost(engine):
    made = export_plan(plan_of(*[(4, 4)] * 4, mode="kivi"), engine)
    assert all("key scales per channel → per token" in layer.changes for layer in made.layers)


@pytest.mark.parametrize("engine", ENGINES)
def test_heads_of_two_widths_are_refused(engine):
    plan = CachePlan.uniform(full(2, head_dim=64, value_head_dim=32), 4, 4)
    with pytest.raises(PlanError, match="keys and values of one head_dim"):
        export_plan(plan, engine)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"engine must be one of vllm, .*, got 'vlm'"):
        export_plan(plan_of((4, 4)), "vlm")


def test_the_table_of_engines_is_that_of_the_documentation():
    usage = (Path(__file__).resolve().parents[2] / "docs" / "usage.md").read_text()
    assert markdown_table() in usage
