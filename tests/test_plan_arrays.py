"""The arrays file beside a plan: bit for bit back, whole or not at all, and refused when wrong."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save

import kvbits
from kvbits import CachePlan
from kvbits.codecs import Affine, Array, MatrixRotated, NearestLevel, Permuted, RangeNormalised
from kvbits.errors import PlanError
from kvbits.layer_plan import LayerPlan
from kvbits.plan import files
from kvbits.testing import tiny_model

HEADS, WIDTH = 2, 32


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


def layer(index):
    generator = torch.Generator().manual_seed(index)
    order = torch.randperm(HEADS * WIDTH, generator=generator).int().view(HEADS, WIDTH)
    normal = torch.randn(1, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    matrix = torch.linalg.qr(normal).Q.float()
    return LayerPlan.uniform(
        Permuted(inner=Affine(bits=4), order=Array(f"layers.{index}.key.order", order)),
        MatrixRotated(inner=Affine(bits=3), matrix=Array(f"layers.{index}.value.matrix", matrix)),
        residual_length=5,
    )


@pytest.fixture(scope="module")
def plan(model):
    return CachePlan.from_layers(model.config, [layer(index) for index in range(4)])


@pytest.fixture
def saved(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


def arrays_path(path):
    return path.parent / json.loads(path.read_text())["arrays"]["file"]


def rewrite(path, change):
    """Change the tensors of the arrays file, and let the plan name the result."""
    tensors = load_file(arrays_path(path))
    change(tensors)
    content = save(tensors)
    arrays_path(path).write_bytes(content)
    data = json.loads(path.read_text())
    data["arrays"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(data))


def test_a_plan_comes_back_with_its_arrays(plan, saved):
    loaded = CachePlan.load(saved)
    assert loaded == plan
    assert loaded.arrays.keys() == plan.arrays.keys()
    for name, tensor in plan.arrays.items():
        assert torch.equal(loaded.arrays[name], tensor)


def test_the_plan_names_the_file_and_its_checksum(saved):
    data = json.loads(saved.read_text())
    content = arrays_path(saved).read_bytes()
    assert data["arrays"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert data["layers"][2]["groups"][0]["key"]["order"] == "layers.2.key.order"
    assert set(load_file(arrays_path(saved))) == {
        f"layers.{index}.{name}" for index in range(4) for name in ("key.order", "value.matrix")
    }


def test_array_bytes_count_every_array_once(plan, model):
    """Four orders of 64 int32 and four matrices of 32 x 32 float32; no token adds to them."""
    assert plan.array_bytes == 4 * (64 * 4 + 32 * 32 * 4)
    assert CachePlan.uniform(model.config, 4, 4).array_bytes == 0


def test_a_plan_without_arrays_has_no_file(model, tmp_path):
    CachePlan.uniform(model.config, 4, 4).save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "arrays" not in json.loads((tmp_path / "plan.json").read_text())


@torch.no_grad()
def test_a_loaded_plan_stores_the_same_bytes(plan, saved, model):
    ids = torch.randint(5, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    caches = [each.new_cache(model) for each in (plan, CachePlan.load(saved))]
    for cache in caches:
        model(ids, past_key_values=cache)
    assert caches[0].nbytes == plan.bytes(60, batch=2, state_bits=32)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for side in ("key", "value"):
            ours_dense, theirs_dense = (
                each.packed.states().dense(side) for each in (ours, theirs)
            )
            assert torch.equal(ours_dense, theirs_dense)


@torch.no_grad()
def test_a_saved_cache_holds_its_arrays(plan, model, tmp_path):
    ids = torch.randint(5, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = plan.new_cache(model)
    model(ids, past_key_values=cache)
    kvbits.save_cache(cache, tmp_path / "cache.safetensors")
    loaded = kvbits.load_cache(tmp_path / "cache.safetensors", model)
    assert loaded.plans == cache.plans
    step = ids[:, :1]
    ours, theirs = (model(step, past_key_values=each).logits for each in (cache, loaded))
    assert torch.equal(ours, theirs)


def test_two_plans_share_a_folder(plan, model, saved):
    """Neither overwrites the arrays of the other, and one of the same arrays shares the file."""
    other = CachePlan.from_layers(model.config, [layer(index) for index in (0, 5, 6, 7)])
    other.save(saved.parent / "other.json")
    plan.save(saved.parent / "again.json")
    assert CachePlan.load(saved) == plan
    assert CachePlan.load(saved.parent / "other.json") == other
    assert arrays_path(saved.parent / "again.json") == arrays_path(saved)
    assert len(list(saved.parent.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("at", [0, 1], ids=["arrays", "plan"])
def test_a_save_that_fails_leaves_the_old_plan(plan, saved, model, monkeypatch, at):
    """The disk fills while the arrays are written, or while the plan is."""
    calls = []

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fails)
    other = CachePlan.from_layers(model.config, [layer(index) for index in (4, 5, 6, 7)])
    with pytest.raises(OSError, match="No space left"):
        other.save(saved)
    assert CachePlan.load(saved) == plan
    assert not list(saved.parent.glob(".*"))


def test_a_name_of_two_arrays_is_refused(model):
    twice = LayerPlan.uniform(
        Permuted(inner=Affine(bits=4), order=layer(0).groups[0].key.order), Affine(bits=4)
    )
    other = Array("layers.0.key.order", torch.arange(64, dtype=torch.int32).view(2, 32))
    layers = [
        twice,
        LayerPlan.uniform(Permuted(inner=Affine(bits=4), order=other), Affine(bits=4)),
        *[LayerPlan.uniform(Affine(bits=4), Affine(bits=4))] * 2,
    ]
    with pytest.raises(PlanError, match=r"names of their own, got two of 'layers\.0\.key\.order'"):
        CachePlan.from_layers(model.config, layers)


def test_arrays_of_another_number_of_heads_are_refused(model):
    order = Array("o", torch.arange(4 * 32, dtype=torch.int32).view(4, 32))
    wrong = LayerPlan.uniform(Permuted(inner=Affine(bits=4), order=order), Affine(bits=4))
    with pytest.raises(
        PlanError,
        match=r"layers\[0\]\.groups\[0\]\.key: o must have shape \[2, 32\], got \[4, 32\]",
    ):
        CachePlan.from_layers(model.config, [wrong] * 4)


# ----- files that are wrong


def refused(path, message):
    with pytest.raises(PlanError, match=message) as caught:
        CachePlan.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(saved):
    arrays_path(saved).unlink()
    refused(saved, r"path must name a readable file of arrays, got .*No such file")


def test_a_damaged_file_is_refused(saved):
    content = bytearray(arrays_path(saved).read_bytes())
    content[-1] ^= 1
    arrays_path(saved).write_bytes(content)
    refused(saved, r"arrays\.sha256 must be the checksum of arrays-.*damaged or of another plan")


def test_the_file_of_another_plan_is_refused(saved, model, tmp_path):
    other = CachePlan.from_layers(model.config, [layer(index) for index in (4, 5, 6, 7)])
    other.save(tmp_path / "other" / "plan.json")
    arrays_path(saved).write_bytes(arrays_path(tmp_path / "other" / "plan.json").read_bytes())
    refused(saved, "damaged or of another plan")


def test_a_link_is_refused(saved, tmp_path):
    target = tmp_path / "elsewhere"
    path = arrays_path(saved)
    path.rename(target)
    os.symlink(target, path)
    refused(saved, r"arrays\.file must not be a link")


def test_a_folder_is_refused(saved):
    path = arrays_path(saved)
    path.unlink()
    path.mkdir()
    refused(saved, "which is not a file")


@pytest.mark.parametrize(
    "name",
    [
        *("../arrays.safetensors", "/etc/arrays.safetensors", "a/b.safetensors", ".safetensors"),
        *("..\\\\a.safetensors", "plan.json", "", "a.safetensors\n", "C:a.safetensors"),
    ],
)
def test_a_name_that_is_not_bare_is_refused(saved, name):
    data = json.loads(saved.read_text())
    data["arrays"]["file"] = name
    saved.write_text(json.dumps(data))
    refused(saved, r"arrays\.file must .*match pattern")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"file": "a.safetensors"}, r"arrays\.sha256 must be given, got nothing"),
        ({"file": "a.safetensors", "sha256": "0" * 63}, r"arrays\.sha256 must .*pattern"),
        ({"file": "a.safetensors", "sha256": "0" * 64, "url": "x"}, r"arrays\.url must not be"),
        ("a.safetensors", r"arrays must be .*got 'a\.safetensors'"),
    ],
)
def test_a_malformed_record_is_refused(saved, record, message):
    data = json.loads(saved.read_text())
    data["arrays"] = record
    saved.write_text(json.dumps(data))
    refused(saved, message)


def test_what_is_no_safetensors_file_is_refused(saved):
    content = b"not safetensors at all"
    arrays_path(saved).write_bytes(content)
    data = json.loads(saved.read_text())
    data["arrays"]["sha256"] = hashlib.sha256(content).hexdigest()
    saved.write_text(json.dumps(data))
    refused(saved, r"arrays\.file must hold arrays, got arrays-.*header")


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    def change(tensors):
        tensors[name] = make(tensors.get(name))

    return change


ORDER, MATRIX = "layers.1.key.order", "layers.1.value.matrix"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop(ORDER),
            r"layers\[1\].*order must be an Array, or the name of one .*'layers\.1\.key\.order'",
        ),
        (put("extra", lambda _: torch.ones(1)), r"only arrays that codecs name, got 'extra' too"),
        (
            put(ORDER, lambda x: x[:1]),
            r"layers\.1\.key\.order must hold every number from 0 to 31",
        ),
        (
            put(ORDER, lambda x: x.T.contiguous()),
            r"layers\.1\.key\.order must have shape \[2, 32\]",
        ),
        (put(ORDER, lambda x: x.long()), r"layers\.1\.key\.order must be int32 or float32"),
        (put(ORDER, lambda x: x.float()), r"layers\.1\.key\.order must be int32, got float32"),
        (put(MATRIX, lambda x: x * torch.nan), r"layers\.1\.value\.matrix must be finite"),
        (put(MATRIX, lambda x: x * 1.001), r"layers\.1\.value\.matrix must be orthogonal"),
        (put(MATRIX, lambda x: x[:, :16, :16].contiguous()), r"matrix must be orthogonal"),
        (
            put(MATRIX, lambda _: torch.eye(16)[None]),
            r"matrix must have shape \[1, 32, 32\], got \[1, 16, 16\]",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(saved, change, message):
    rewrite(saved, change)
    refused(saved, message)


def test_the_text_of_a_plan_alone_has_no_arrays(saved):
    with pytest.raises(PlanError, match=r"arrays\.file must lie beside the plan"):
        CachePlan.from_json(saved.read_text())


def test_a_codec_that_names_an_array_of_no_file_is_refused(saved):
    data = json.loads(saved.read_text())
    del data["arrays"]
    saved.write_text(json.dumps(data))
    refused(saved, "order must be an Array, or the name of one in the file beside the plan")


def test_a_plan_of_ranges_comes_back(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(HEADS, WIDTH, generator=generator)
    codec = RangeNormalised(
        inner=NearestLevel(levels=(-1.0, -0.5, 0.25, 1.0)),
        middle=Array("middle", middle),
        half_range=Array("half_range", middle.abs() + 1),
    )
    plan = CachePlan.from_layers(model.config, [LayerPlan.uniform(codec, Affine(bits=2))] * 4)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert plan.array_bytes == 2 * HEADS * WIDTH * 4  # all layers share them
