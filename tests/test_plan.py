"""Plans: what they cost, what a file may hold, and one clear sentence for everything else."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbits import CachePlan
from kvbits.codecs import Affine, Identity
from kvbits.errors import PlanError
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import HeadGroup, LayerPlan
from kvbits.plan import MODES, WIDTHS, Dataset, Metric, Provenance, files
from kvbits.plan.cache_plan import SCHEMA_VERSION

FULL = LayerGeometry(
    layer_type="full_attention", num_key_value_heads=2, key_head_dim=32, value_head_dim=32
)
SLIDING = FULL.model_copy(update={"layer_type": "sliding_attention", "sliding_window": 16})
MODEL = ModelGeometry(
    architecture="toy", num_attention_heads=4, hidden_size=128, layers=(FULL, SLIDING, FULL, FULL)
)
PAIRS = [(8, 4), (16, 16), (4, 2), (4, 2)]
PLAN = CachePlan.from_pairs(MODEL, PAIRS)

bits = st.sampled_from([2, 3, 4, 8])
positive = st.integers(1, 10**9)
text = st.text(min_size=1, max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
affine_keys = st.builds(
    Affine,
    bits=bits,
    granularity=st.just("per_channel"),
    group_size=st.sampled_from([16, 32, 128]),
    symmetric=st.booleans(),
)
affine_values = st.builds(
    Affine,
    bits=bits,
    group_size=st.sampled_from([None, 8, 32]),
    parameter_dtype=st.sampled_from(["float16", "float32"]),
)
codecs = st.one_of(affine_values, st.just(Identity()))


@st.composite
def layer_plans(draw: st.DrawFn) -> LayerPlan:
    groups = [
        HeadGroup(heads=heads, key=draw(st.one_of(affine_keys, codecs)), value=draw(codecs))
        for heads in draw(st.sampled_from([(None,), ((0,), (1,)), ((0, 1),), ((1,), (0,))]))
    ]
    return LayerPlan(
        groups=tuple(groups),
        sink_tokens=draw(st.integers(0, 8)),
        residual_length=draw(st.integers(0, 300)),
    )


datasets = st.builds(
    Dataset, name=text, checksum=text, split=st.none() | text, num_tokens=st.none() | positive
)
metrics = st.builds(
    Metric,
    name=text,
    value=numbers,
    dataset=st.none() | datasets,
    num_samples=st.none() | positive,
)
provenances = st.builds(
    Provenance,
    method=text,
    datasets=st.lists(datasets, max_size=2).map(tuple),
    seed=st.none() | st.integers(),
    versions=st.dictionaries(text, text, max_size=2),
)


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    exact = LayerPlan.uniform(Identity(), Identity())
    return CachePlan(
        model=MODEL,
        model_id=draw(st.none() | text),
        layers=tuple(
            draw(layer_plans()) if layer.is_packable else exact for layer in MODEL.layers
        ),
        provenance=draw(st.none() | provenances),
        metrics=tuple(draw(st.lists(metrics, max_size=2))),
    )


# Making


@pytest.mark.parametrize("mode", MODES)
def test_pairs_are_the_inverse_of_from_pairs(mode):
    plan = CachePlan.from_pairs(MODEL, PAIRS, mode)
    assert plan.pairs == PAIRS
    assert CachePlan.from_pairs(MODEL, plan.pairs, mode) == plan


def test_uniform_packs_only_layers_that_can_be_packed():
    assert CachePlan.uniform(MODEL, 4, 2).pairs == [(4, 2), (16, 16), (4, 2), (4, 2)]


def test_per_token_mode_keeps_nothing_exact_and_shares_a_scale_per_head():
    layer = CachePlan.uniform(MODEL, 4, 2).layers[0]
    assert layer == LayerPlan.uniform(Affine(bits=4), Affine(bits=2))


def test_kivi_mode_is_per_channel_keys_and_per_token_values_in_groups_of_32():
    layer = CachePlan.uniform(MODEL, 4, 2, "kivi").layers[0]
    key = Affine(bits=4, granularity="per_channel", group_size=32)
    assert layer == LayerPlan.uniform(key, Affine(bits=2, group_size=32), residual_length=32)


def test_kivi_values_use_one_scale_where_32_does_not_divide_the_head():
    narrow = FULL.model_copy(update={"value_head_dim": 48})
    model = MODEL.model_copy(update={"layers": (narrow,)})
    assert CachePlan.uniform(model, 4, 2, "kivi").layers[0].groups[0].value == Affine(bits=2)


def test_settings_change_the_mode():
    plan = CachePlan.uniform(
        MODEL,
        4,
        2,
        "kivi",
        group_size=64,
        value_group_size=16,
        residual_length=128,
        sink_tokens=4,
        flush="independent",
        symmetric=True,
        parameter_dtype="float32",
    )
    shared: dict[str, Any] = {"symmetric": True, "parameter_dtype": "float32"}
    assert plan.layers[0] == LayerPlan.uniform(
        Affine(bits=4, granularity="per_channel", group_size=64, **shared),
        Affine(bits=2, group_size=16, **shared),
        sink_tokens=4,
        residual_length=128,
        flush="independent",
    )


def test_config_and_its_geometry_give_the_same_plan(tiny_model_dir):
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
    plan = CachePlan.uniform(config, 4, 4)
    assert plan.layers == CachePlan.uniform(ModelGeometry.from_config(config), 4, 4).layers
    assert plan.model_id == tiny_model_dir.name, "a plan must not publish a local path"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, 4), {}, ValueError, r"^key_bits must be one of 2, 3, 4, 8, 16, got 5$"),
        ((4, True), {}, ValueError, r"^value_bits must be one of .*, got True$"),
        ((4, 4, "kiwi"), {}, ValueError, r"^mode must be one of per_token, kivi, got 'kiwi'$"),
        ((4, 4), {"residual": 3}, TypeError, r"^settings must be among .*, got 'residual'$"),
        (
            (4, 4),
            {"residual_length": -1},
            ValueError,
            r"^residual_length must be greater than or equal to 0, got -1$",
        ),
        ((4, 4), {"group_size": 0}, ValueError, r"^group_size must be at least 1, got 0$"),
        (
            (4, 4),
            {"group_size": 5},
            PlanError,
            r"^layers\[0\].groups\[0\].key: group_size must divide head_dim=32, got 5; use None",
        ),
        (
            (4, 4, "kivi"),
            {"flush": "independent", "residual_length": 40},
            ValueError,
            r"^residual_length must be a multiple of the key block.* got 40$",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CachePlan.uniform(MODEL, *arguments, **options)


def test_wrong_number_of_pairs_is_refused():
    with pytest.raises(PlanError, match=r"pairs must have one entry for each of the 4 layers"):
        CachePlan.from_pairs(MODEL, PAIRS[:3])


def test_triple_is_no_pair():
    with pytest.raises(ValueError, match=r"pairs must be \(key_bits, value_bits\), got \(4, 2, 1"):
        CachePlan.from_pairs(MODEL, [(4, 2, 1)] * 4)


def test_packing_a_sliding_layer_is_refused():
    with pytest.raises(
        PlanError, match=r"^layers\[1\] must keep both sides at 16 bits because it is a sliding"
    ):
        CachePlan.from_pairs(MODEL, [(4, 4)] * 4)


def test_plan_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        PLAN.layers = ()  # type: ignore[misc]


# Files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_any_plan_survives_its_json(plan):
    again = CachePlan.from_json(plan.model_dump_json())
    assert again == plan
    assert again.model_dump_json() == plan.model_dump_json()


def test_saved_file_loads_and_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "run" / "plan.json"
    PLAN.save(path)
    PLAN.with_metrics([Metric(name="kl_nats", value=0.01, standard_error=0.002)]).save(path)
    loaded = CachePlan.load(path)
    assert loaded.layers == PLAN.layers
    assert loaded.metrics[0].value == 0.01
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    before = path.read_text()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        CachePlan.uniform(MODEL, 8, 8).save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def edit(*path: str | int, to: Any = None, remove: bool = False) -> Callable[[Any], None]:
    """An edit of the parsed file at ``path``."""

    def apply(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        if remove:
            del data[path[-1]]
        else:
            data[path[-1]] = to

    return apply


KEY = ("layers", 0, "groups", 0, "key")
EXTRA_LAYER = json.loads(PLAN.layers[0].model_dump_json())
REFUSALS: list[tuple[str, Callable[[Any], None], str]] = [
    ("unknown field", edit("laiers", to=[]), r"^laiers must not be given, got \[\]"),
    (
        "unknown field of a layer",
        edit("layers", 2, "residual_lenght", to=0),
        r"^layers\[2\]\.residual_lenght must not be given, got 0",
    ),
    (
        "unknown field of a codec",
        edit(*KEY, "clip", to=1),
        r"^layers\[0\]\.groups\[0\]\.key\.clip must not be given, got 1",
    ),
    (
        "missing layer",
        edit("layers", 3, remove=True),
        r"^layers must have 4 entries, one per layer of the model, got 3; add the missing layers$",
    ),
    (
        "extra layer",
        lambda data: data["layers"].append(EXTRA_LAYER),
        r"^layers must have 4 entries, .* got 5; remove the extra layers$",
    ),
    ("no layers at all", edit("layers", to=[]), r"^layers must have at least 1 entries, got 0$"),
    ("layers of the wrong shape", edit("layers", to={}), r"^layers must be .*, got \{\}$"),
    ("layer that is no object", edit("layers", 0, to=4), r"^layers\[0\] must be .*, got 4$"),
    ("missing field", edit("model", remove=True), r"^model must be given, got nothing$"),
    (
        "missing field of a layer",
        edit("layers", 1, "groups", remove=True),
        r"^layers\[1\]\.groups must be given, got nothing$",
    ),
    (
        "unknown codec",
        edit(*KEY, "kind", to="vector"),
        r"^layers\[0\]\.groups\[0\]\.key\.kind must be one of affine, .*, got 'vector'; a",
    ),
    (
        "codec without a kind",
        edit(*KEY, "kind", remove=True),
        r"^layers\[0\]\.groups\[0\]\.key\.kind must be given, got nothing$",
    ),
    (
        "bad width",
        edit(*KEY, "bits", to=5),
        r"^layers\[0\]\.groups\[0\]\.key\.bits must be 1\.5, 2, 3, 4 or 8, got 5$",
    ),
    (
        "width as text",
        edit(*KEY, "bits", to="4"),
        r"^layers\[0\]\.groups\[0\]\.key\.bits must be 1\.5, 2, 3, 4 or 8, got '4'$",
    ),
    (
        "group that does not divide the head",
        edit(*KEY, "group_size", to=7),
        r"^layers\[0\]\.groups\[0\]\.key: group_size must divide head_dim=32, got 7",
    ),
    (
        "per channel without a group",
        edit(*KEY, "granularity", to="per_channel"),
        r"^layers\[0\]\.groups\[0\]\.key: group_size must be given when granularity='per_channel'",
    ),
    (
        "heads the layer does not have",
        edit("layers", 0, "groups", 0, "heads", to=[0, 1, 2]),
        r"^layers\[0\]\.groups must name the 2 key/value heads of the layer, got 3$",
    ),
    (
        "a head named twice",
        edit("layers", 0, "groups", 0, "heads", to=[1, 1]),
        r"^layers\[0\]: heads of all groups must list 0\.\.n-1 once each, got \[1, 1\]$",
    ),
    (
        "packed sliding layer",
        edit("layers", 1, to=EXTRA_LAYER),
        r"^layers\[1\] must keep both sides at 16 bits because it is a sliding_attention layer",
    ),
    (
        "negative residual",
        edit("layers", 0, "residual_length", to=-1),
        r"^layers\[0\]\.residual_length must be greater than or equal to 0, got -1$",
    ),
    (
        "truth value for a number",
        edit("layers", 0, "sink_tokens", to=True),
        r"^layers\[0\]\.sink_tokens must be a valid integer, got True$",
    ),
    (
        "future schema",
        edit("schema_version", to=SCHEMA_VERSION + 1),
        r"^schema_version must be at most 1, got 2; upgrade kvbits to read it$",
    ),
    (
        "schema of another type",
        edit("schema_version", to="1"),
        r"^schema_version must be a positive integer, got '1'$",
    ),
    ("no schema", edit("schema_version", remove=True), r"^schema_version must be a positive"),
    (
        "another kind of file",
        edit("format", to="front"),
        r"^format must be 'kvbits-cache-plan', got 'front'; plan.json is not a kvbits plan$",
    ),
    (
        "geometry edited by hand",
        edit("model", "layers", 0, "key_head_dim", to=64),
        r"^fingerprint must match the model section, .* the file was edited by hand$",
    ),
    (
        "long value",
        edit("extra", to="x" * 10_000),
        r"^extra must not be given, got 'x{50,60}\.\.\.; no such",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSALS]
)
def test_damaged_plan_is_refused_in_one_sentence(change, message):
    data = copy.deepcopy(json.loads(PLAN.model_dump_json()))
    change(data)
    with pytest.raises(PlanError, match=message) as caught:
        CachePlan.from_json(json.dumps(data), source="plan.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"plan.json must hold valid JSON, got expecting property name .* line 1 column 2$"),
        (b"", r"plan.json must hold valid JSON"),
        (b"[]", r"plan.json must hold a JSON object, got \[\]$"),
        (b"3", r"plan.json must hold a JSON object, got 3$"),
        (b'{"a": 1, "a": 2}', r"^a must be given once per object, got it twice$"),
        (b'{"a": NaN}', r"^numbers must be finite, got NaN$"),
        (b'{"a": -Infinity}', r"^numbers must be finite, got -Infinity$"),
        (b"[" * 100_000, r"JSON that is nested too deeply$"),
        (b"9" * 5000, r"plan.json must hold a plan, got .*limit"),
        (b"\xff\xfe", r"^path must name a UTF-8 text file, .* with byte 0xff at 0$"),
    ],
)
def test_file_that_is_no_json_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        CachePlan.load(path)
    assert "\n" not in str(caught.value)


def test_repeated_key_deep_inside_is_found():
    """json.loads would silently take the last one: a plan could read as 8 bits and run at 2."""
    text = PLAN.model_dump_json().replace('"bits":8', '"bits":8,"bits":2', 1)
    with pytest.raises(PlanError, match=r"^bits must be given once per object"):
        CachePlan.from_json(text)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(PlanError, match=r"path must name a readable plan file, .*No such file"):
        CachePlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="which is not a file"):
        CachePlan.load(tmp_path)


def test_huge_file_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_FILE_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("the file was read"))
    with pytest.raises(PlanError, match=r"at most 16777216 bytes, got .* with 16777217$"):
        CachePlan.load(path)


# Fit


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"architecture": "other"}, r"must have architecture='toy' .* got 'other'; make a plan"),
        ({"hidden_size": 64}, r"must have hidden_size=128 as the plan was made for, got 64"),
        ({"layers": MODEL.layers[:2]}, r"must have num_hidden_layers=4 .* got 2"),
        (
            {"layers": (*MODEL.layers[:3], FULL.model_copy(update={"num_key_value_heads": 4}))},
            r"must have layers\[3\]\.num_key_value_heads=2 .* got 4",
        ),
    ],
)
def test_plan_for_another_model_is_refused(update, message):
    with pytest.raises(PlanError, match=message):
        PLAN.check(MODEL.model_copy(update=update))


def test_plan_fits_its_own_model():
    PLAN.check(MODEL)
    assert PLAN.model == MODEL


# Cost


@settings(max_examples=50, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    pairs=st.tuples(*[st.tuples(*[st.sampled_from(WIDTHS)] * 2)] * 2),
)
def test_effective_bits_grow_with_bits(mode, pairs):
    """Scale and offset cost at most 2 bits here, so 8 bits stay below 16."""
    low, high = sorted(pairs, key=sum)
    plans = [CachePlan.uniform(MODEL, *pair, mode) for pair in (low, high)]
    assert plans[0].effective_bits >= sum(low) / 2
    if low[0] <= high[0] and low[1] <= high[1]:
        assert plans[0].effective_bits <= plans[1].effective_bits
        assert plans[0].bytes(4096) <= plans[1].bytes(4096)


def test_effective_bits_of_known_plans():
    assert CachePlan.uniform(MODEL, 16, 16).effective_bits == 16
    assert CachePlan.uniform(MODEL, 4, 4).effective_bits == 5  # 32 bits per 32 values
    assert CachePlan.uniform(MODEL, 2, 2, "kivi").effective_bits == 3
    assert PLAN.effective_bits == (8 + 4 + 4 + 2 + 4 + 2) / 6 + 1


def test_effective_bits_at_a_context_come_from_allocated_bytes():
    plan = CachePlan.uniform(MODEL, 2, 2, "kivi")
    sliding = 2 * 15 * SLIDING.values_per_token
    allocated = 8 * (plan.bytes(1000, 3) - 3 * sliding) / (3 * 1000 * 3 * FULL.values_per_token)
    assert plan.effective_bits_at(1000, 3) == pytest.approx(allocated, rel=1e-12)
    assert plan.effective_bits_at(31) == pytest.approx(16 * 64 / 31), "room for a whole residual"
    assert plan.effective_bits_at(10**6) == pytest.approx(plan.effective_bits, rel=0.07)


def test_bytes_of_16_bits_are_the_stock_cache():
    plan = CachePlan.uniform(MODEL, 16, 16)
    expected = 2 * 2 * (3 * 100 + 15) * FULL.values_per_token
    assert plan.bytes(100, 2) == plan.bytes_16bit(100, 2) == PLAN.bytes_16bit(100, 2) == expected


def test_model_without_packable_layers_stays_at_16_bits():
    model = MODEL.model_copy(update={"layers": (SLIDING,)})
    plan = CachePlan.uniform(model, 4, 4)
    assert (plan.effective_bits, plan.effective_bits_at(10)) == (16, 16)


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-5, 1)])
def test_sizes_must_be_positive(context, batch):
    for cost in (PLAN.bytes, PLAN.bytes_16bit, PLAN.effective_bits_at):
        with pytest.raises(ValueError, match=r"(context|batch) must be at least 1, got"):
            cost(context, batch)


def test_pairs_of_a_plan_per_head_are_refused():
    groups = (
        HeadGroup(heads=(0,), key=Affine(bits=8), value=Affine(bits=4)),
        HeadGroup(heads=(1,), key=Affine(bits=4), value=Affine(bits=2)),
    )
    layers = (LayerPlan(groups=groups), *PLAN.layers[1:])
    plan = CachePlan(model=MODEL, layers=layers)
    with pytest.raises(PlanError, match=r"layers\[0\] must have one head group .* got 2"):
        _ = plan.pairs
    assert plan.describe().startswith("K8V4/K4V2 0; ")


def test_description_is_one_readable_line():
    assert str(PLAN) == "K8V4 0; stock sliding_attention 1; K4V2 2-3; 5.00 effective bits"


# The live cache


def tiny_models() -> list[Any]:
    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    mla = {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 3,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    }
    hybrid = {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    }
    return [
        transformers.Qwen2Config(**small),
        transformers.Gemma3TextConfig(**(small | hybrid)),
        transformers.DeepseekV2Config(**(small | mla)),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", tiny_models(), ids=lambda config: config.model_type)
def test_live_cache_holds_exactly_the_bytes_of_the_formula(config, mode):
    """Batch 1 and 3, odd lengths, mixed widths, after prefill and after decode steps."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    exact = (16, 16)
    mixed = itertools.cycle([(8, 4), (2, 16), (3, 2)])
    geometry = ModelGeometry.from_config(config)
    pairs = [next(mixed) if layer.is_packable else exact for layer in geometry.layers]
    plan = CachePlan.from_pairs(config, pairs, mode)
    for batch, length in itertools.product((1, 3), (1, 63, 97)):
        cache = plan.new_cache(model)
        input_ids = torch.randint(1, 64, (batch, length))
        with torch.no_grad():
            for step in range(3):
                model(input_ids=input_ids, past_key_values=cache)
                input_ids = input_ids[:, :1]
                assert cache.nbytes == plan.bytes(length + step, batch, state_bits=32)
    assert cache.nbytes < cache.peak_nbytes


def test_layers_that_reuse_a_cache_get_none_of_their_own():
    """transformers 5.17 builds 20 cache layers for this model of 35, later ones 35."""
    model = torch.nn.Identity()
    model.config = transformers.Gemma3nTextConfig()
    plan = CachePlan.uniform(model.config, 4, 4)
    cache = plan.new_cache(model)
    assert len(cache.layers) == len(transformers.DynamicCache(config=model.config).layers)
    assert sorted(cache.packed_layers) == list(plan.model.packable_layers)


def test_new_cache_refuses_another_model(tiny_model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(PlanError, match=r"the model must have architecture='toy'"):
        PLAN.new_cache(model)
