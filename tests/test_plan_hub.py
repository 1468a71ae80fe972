"""Plans go to the hub and come back; the hub is a server on this machine."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import torch
import yaml
from hub_stub import HubStub

from kvbits import CachePlan
from kvbits.codecs import Affine, Array, Permuted
from kvbits.errors import PlanError
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import LayerPlan
from kvbits.plan import Dataset, Metric

LAYER = LayerGeometry(
    layer_type="full_attention", num_key_value_heads=2, key_head_dim=64, value_head_dim=64
)
MODEL = ModelGeometry(
    architecture="qwen2", num_attention_heads=4, hidden_size=256, layers=(LAYER,) * 4
)


@pytest.fixture
def plan():
    made = CachePlan.from_pairs(MODEL, [(8, 4), (4, 2), (4, 2), (16, 16)], mode="kivi")
    metric = Metric(
        name="kl_nats",
        value=0.00125,
        standard_error=0.0003,
        dataset=Dataset(name="held|out", checksum="ab"),
        num_samples=64,
    )
    return made.with_metrics([metric])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = HubStub()
    yield server
    server.shutdown()
    server.server_close()


def test_a_plan_comes_back_as_it_was(plan, hub):
    url = plan.push_to_hub("someone/plan", token="hf_secret", endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/someone/plan/commit/{hub.sha('someone/plan', 0)}"
    assert CachePlan.from_hub("someone/plan", endpoint=hub.endpoint) == plan
    assert "Bearer hf_secret" in hub.tokens
    (commit,) = hub.repositories["someone/plan"]
    assert sorted(commit) == ["README.md", "plan.json"]
    assert b"hf_secret" not in b"".join(commit.values())


def test_arrays_go_with_their_plan(hub):
    order = Array("order", torch.arange(128, dtype=torch.int32).flip(0).view(2, 64))
    keys = Permuted(inner=Affine(bits=4, group_size=32), order=order)
    plan = CachePlan.from_layers(MODEL, [LayerPlan.uniform(keys, Affine(bits=4))] * 4)
    plan.push_to_hub("someone/plan", token="t", endpoint=hub.endpoint)
    (commit,) = hub.repositories["someone/plan"]
    assert len(commit) == 3
    back = CachePlan.from_hub("someone/plan", endpoint=hub.endpoint)
    assert back == plan
    assert torch.equal(back.arrays["order"], plan.arrays["order"])


def test_a_revision_gives_the_plan_of_then(plan, hub):
    plan.push_to_hub("someone/plan", token="t", endpoint=hub.endpoint)
    later = CachePlan.uniform(MODEL, 4, 4)
    later.push_to_hub("someone/plan", token="t", endpoint=hub.endpoint)
    first = hub.sha("someone/plan", 0)
    assert CachePlan.from_hub("someone/plan", endpoint=hub.endpoint) == later
    assert CachePlan.from_hub("someone/plan", revision=first, endpoint=hub.endpoint) == plan


def test_the_card_says_what_the_plan_is(plan, hub):
    plan.model_copy(update={"model_id": "Qwen/Qwen2-0.5B"}).push_to_hub(
        "someone/plan", token="t", endpoint=hub.endpoint
    )
    text = hub.repositories["someone/plan"][0]["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "kvbits",
        "tags": ["kvbits", "kv-cache"],
        "base_model": "Qwen/Qwen2-0.5B",
    }
    # K4V2 of KIVI mode at 32 per group: 3 bits of codes and 1 of scales.
    assert "| 1-2 | K4V2 | 4.00 |" in body
    assert f"| 32,768 | {plan.bytes(32768):,} | {4 * 2 * 2 * 64 * 2 * 32768:,} |" in body
    assert "| kl_nats | 0.00125 | 0.0003 | held\\|out | 64 |" in body
    assert 'CachePlan.from_hub("someone/plan")' in body
    assert f"made for the geometry {plan.fingerprint}" in body


def test_a_local_folder_is_no_base_model(plan, hub):
    plan.model_copy(update={"model_id": "kvbits-tiny"}).push_to_hub(
        "someone/plan", token="t", endpoint=hub.endpoint
    )
    assert b"base_model" not in hub.repositories["someone/plan"][0]["README.md"]


@pytest.mark.parametrize("repo_id", ["someone/missing", "no/such/name", "someone/empty"])
def test_what_cannot_be_fetched_is_one_sentence(hub, repo_id):
    hub.repositories["someone/empty"] = [{"other.txt": b"x"}]
    with pytest.raises(PlanError, match="repo_id must name a repository") as caught:
        CachePlan.from_hub(repo_id, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_what_the_hub_forbids_is_one_sentence(plan, hub):
    with pytest.raises(PlanError, match=r"got 'someone/forbidden': .*you may not"):
        plan.push_to_hub("someone/forbidden", token="t", endpoint=hub.endpoint)


def test_a_server_that_is_not_there_is_one_sentence(plan, hub):
    with pytest.raises(PlanError, match="got 'someone/plan': "):
        plan.push_to_hub("someone/plan", token="t", endpoint="http://127.0.0.1:1")


def test_a_fetched_plan_is_parsed_strictly(plan, hub):
    text = json.loads(plan.model_dump_json()) | {"surprise": 1}
    hub.repositories["someone/plan"] = [{"plan.json": json.dumps(text).encode()}]
    with pytest.raises(PlanError, match="surprise must not be given"):
        CachePlan.from_hub("someone/plan", endpoint=hub.endpoint)
