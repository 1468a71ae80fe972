"""The tuner on any model: families, models on several devices, memory that does not grow."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
import transformers

from kvbits.calibration.attention import observed_attention
from kvbits.evaluation.corpora import TokenSet
from kvbits.evaluation.stream import reads_packed, stream_logits
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning import Data, TuneSettings, tune
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.fisher import profile_fisher
from kvbits.tuning.identity import weights_checksum
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, profile_errors

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = {
    "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LINEAR = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16, "linear_num_key_heads": 2,
    "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
    "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1,
    "mamba_dt_rank": 4,
}  # fmt: skip
SHARING = HYBRID | {
    "num_hidden_layers": 4, "layer_types": HYBRID["layer_types"] * 2, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "altup_num_inputs": 2, "intermediate_size": [32] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip

# family, settings beyond SMALL, layers that are packed
FAMILIES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("Llama", {}, (0, 1)),
    ("Qwen2", {}, (0, 1)),
    ("Qwen3", {"head_dim": 16}, (0, 1)),
    ("Mistral", {"sliding_window": None}, (0, 1)),
    ("Gemma2", HYBRID, (1,)),
    ("Gemma3Text", HYBRID, (1,)),
    ("Phi3", {}, (0, 1)),
    ("GptOss", HYBRID | EXPERTS, (1,)),
    ("Olmo2", {}, (0, 1)),
    ("GPTNeoX", {}, (0, 1)),
    ("Cohere", {}, (0, 1)),
    ("Qwen3Next", LINEAR, (1,)),
    ("Jamba", MAMBA, (1,)),
    ("Gemma3nText", SHARING, (1,)),
]
# Latent attention, and attention of the model's own: measured token by token.
STEPPED: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("DeepseekV2", MLA, (0, 1)),
    ("DeepseekV3", MLA | {"n_shared_experts": 1}, (0, 1)),
    ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, (0, 1)),
]


def build(family: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**(SMALL | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def token_set(split: str, seed: int, documents: int = 2, tokens: int = 16) -> TokenSet:
    ids = torch.randint(3, 64, (documents, tokens), generator=torch.Generator().manual_seed(seed))
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return TokenSet("text", "text", split, ids, counted)


DATA = Data([token_set("calibration", 0)], [token_set("heldout", 1)])


def tuned(model: Any, path: Any, **more: Any) -> Any:
    settings = {"bits": 13.0, "widths": (4,), "task_n": 0, "random_plans": 0} | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a model decodes whole layers is said once
        return tune(model, None, TuneSettings(**settings), path, data=DATA)


@pytest.mark.parametrize(
    ("family", "settings", "packed"), FAMILIES + STEPPED, ids=[f[0] for f in FAMILIES + STEPPED]
)
def test_every_family_is_introspected_measured_and_runs_its_plan(
    family, settings, packed, tmp_path
):
    model = build(family, settings)
    assert ModelGeometry.from_config(model.config).packable_layers == packed
    assert reads_packed(model) is (family not in {name for name, *_ in STEPPED})
    result = tuned(model, tmp_path)
    found = [i for i, layer in enumerate(result.plan.layers) if not layer.is_exact]
    assert found
    assert set(found) <= set(packed)
    chosen = next(point for point in result.front["points"] if point["chosen"])
    assert chosen["measured_kl"]["text"]["value"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = result.plan.new_cache(model)
        made = model.generate(torch.full((1, 6), 5), past_key_values=cache, max_new_tokens=3,
                              do_sample=False, eos_token_id=None)  # fmt: skip
    assert made.shape == (1, 9)


def test_token_by_token_is_what_decoding_shows():
    """Of a model whose attention cannot read packed states, several queries at a time."""
    model = build("DeepseekV2", MLA)
    plan = CachePlan.uniform(model.config, 4, 4)
    ids = token_set("heldout", 2).input_ids
    keep = torch.zeros(16, dtype=torch.bool)
    keep[[3, 9, 15]] = True
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cache = plan.new_cache(model)
        every = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(16)]
        streamed = list(stream_logits(model, ids, plan, chunk_tokens=8, keep=keep))
    assert [part.shape[1] for part in streamed] == [1, 2]
    expected = torch.cat(every, dim=1)[:, keep]
    assert torch.allclose(torch.cat(streamed, dim=1), expected, atol=1e-5)


# ----- several devices


@pytest.mark.parametrize("on_disk", ["model.layers.1", "model.embed_tokens"])
def test_a_model_that_is_partly_on_disk_gives_the_same_plan(on_disk, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra `sharded`")
    whole = build("Llama", {})
    expected = tuned(whole, tmp_path / "whole")
    modules = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm",
               "model.rotary_emb", "lm_head")  # fmt: skip
    places = {name: "disk" if name == on_disk else "cpu" for name in modules}
    model = accelerate.dispatch_model(
        build("Llama", {}), places, main_device="cpu", offload_dir=tmp_path / "offloaded"
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert weights_checksum(model) == weights_checksum(whole)
    result = tuned(model, tmp_path / "split")
    assert result.plan.layers == expected.plan.layers
    for name in ("sensitivity.jsonl", "errors.jsonl"):
        one, other = ((tmp_path / run / name).read_text() for run in ("whole", "split"))
        strip = [line.partition('"seconds"')[0] for line in one.splitlines()]
        assert [line.partition('"seconds"')[0] for line in other.splitlines()] == strip


# ----- memory


class Census(Silent):
    """Bytes of all tensors alive when it begins and after the last document."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.left = 0
        self.take()

    def start(self, stage: str, total: int) -> None:
        self.left = total

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left == 0:
            self.take()

    def take(self) -> None:
        gc.collect()
        storages = {}
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter):
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self.bytes.append(sum(storages.values()))


@pytest.mark.parametrize("profile", [profile_errors, profile_fisher])
def test_memory_of_capture_does_not_grow_with_the_number_of_prompts(profile, tmp_path):
    """After 16 prompts as much is held as after 2, to a twentieth of the states of one prompt."""
    model = build("Llama", {})
    candidates = of_mode(model.config, "per_token", (4,))
    states = 4 * 64 * sum(layer.values_per_token for layer in candidates.geometry.layers)
    held = []
    for documents in (2, 16):
        sets = [token_set("calibration", 0, documents, tokens=64)]
        census, run = Census(), RunDir(tmp_path / f"{documents}")
        profile(Meter(model, sets, candidates), run=run, progress=census)
        before, after = census.bytes
        held.append(after - before)
    few, many = held
    assert abs(many - few) < states / 20


def test_the_census_would_see_states_that_are_kept():
    model, kept = build("Llama", {}), []
    census = Census()
    with torch.no_grad(), observed_attention(model, kept.append, num_queries=4):
        model(token_set("calibration", 0, 1, tokens=64).input_ids, use_cache=False)
    census.take()
    layers = ModelGeometry.from_config(model.config).layers
    states = 4 * 64 * sum(layer.values_per_token for layer in layers)
    assert census.bytes[1] - census.bytes[0] > states
