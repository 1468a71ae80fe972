"""The hooks, what they may return, and the process they run in."""

from __future__ import annotations

import inspect

import pytest

from kvbits.errors import PolicyError
from kvbits.replay import AdaptiveQuantPolicy
from kvbits.replay.baselines import BUILT_IN
from kvbits.replay.hooks import CORE_HOOKS, HOOKS, OPTIONAL_HOOKS, checked
from kvbits.replay.process import PolicyProcess

META = {"workload": "longbench_slice", "head_dim": 64}
STATE = {"budget_bits": 3}
TWO = "from kvbits.replay import AdaptiveQuantPolicy as A\nclass P(A): pass\nclass Q(A): pass"
DEFAULTS = {
    "quantizer_family": "minmax",
    "group_size": 32,
    "sink_tokens": 0,
    "clip_ratio": 1.0,
    "quantization_level": "head",
    "quantization_method": "uniform",
    "symmetric": False,
    "outliers_ratio": 0.0,
    "use_attentions": False,
    "last_n_attentions": 1,
    "target_quantization_error": 3.0,
    "q_norm": 300.0,
}


def test_there_are_four_core_and_thirteen_optional_hooks_all_documented():
    assert len(CORE_HOOKS) == 4
    assert len(OPTIONAL_HOOKS) == 13
    for name in HOOKS:
        assert "Legal:" in inspect.getdoc(getattr(AdaptiveQuantPolicy, name))


def test_the_defaults_are_the_documented_ones():
    policy = AdaptiveQuantPolicy()
    found = {name: getattr(policy, name)(0, "key", META) for name in DEFAULTS}
    assert found == DEFAULTS
    assert policy.bit_range(0, "key", META, STATE) == (2, 3)
    assert policy.bit_range(0, "key", META, {"budget_bits": 1}) == (1, 1)
    assert policy.choose_bits(0, "key", 0, {}, {"budget_bits": 8}) == 4
    assert policy.choose_bits(0, "key", 0, {}, STATE) == 3
    assert [policy.choose_axis(0, kind) for kind in ("key", "value")] == ["channel", "token"]
    assert policy.residual_length(0, META) == 128
    assert policy.residual_length(0, {"workload": "needle_slice"}) == 32
    assert policy.calibration_mode({}, STATE) == "online"


@pytest.mark.parametrize(
    ("hook", "good", "bad"),
    [
        ("choose_bits", [1, 8, 16], [0, 9, 15, 17, 4.0, True, "4", None]),
        ("choose_axis", ["channel", "token"], ["head", 0, None]),
        ("residual_length", [0, 4096], [-1, 4097, True, 1.0]),
        ("calibration_mode", ["online", "prefill", "workload"], ["offline", 1]),
        ("quantizer_family", ["minmax", "kivi", "skvq", "qaq"], ["int4", None]),
        ("group_size", [1, 0, -1, 128], [2.0, "32", False]),
        ("sink_tokens", [0, 64], [-1, 65]),
        ("clip_ratio", [1.0, 0.5, 1], [0.0, 1.01, float("nan"), "1"]),
        ("quantization_level", ["token", "layer", "head"], ["channel"]),
        ("quantization_method", ["uniform", "normal"], ["kmeans"]),
        ("symmetric", [True, False], [0, 1, None]),
        ("outliers_ratio", [0, 0.1], [-0.01, 0.11, float("inf")]),
        ("use_attentions", [True], [1]),
        ("bit_range", [(0, 16), [2, 4]], [(3, 2), (0, 17), (1,), 4, (1.0, 2)]),
        ("last_n_attentions", [1, 9], [0, 1.5]),
        ("target_quantization_error", [0.1, 3], [0, -1.0]),
        ("q_norm", [1e-3, 300], [0.0, float("inf")]),
    ],
)
def test_hooks_take_what_is_legal_and_nothing_else(hook, good, bad):
    for value in good:
        assert checked(hook, value, 3, "value") == value
    for value in bad:
        with pytest.raises(PolicyError, match=rf"{hook} \(layer 3, kind value\) must return"):
            checked(hook, value, 3, "value")


def ask(path, hook="choose_bits", *arguments):
    with PolicyProcess(str(path)) as policy:
        return policy.ask(hook, *arguments, layer_id=2, kv_kind="key")


def test_numpy_numbers_are_taken_for_what_they_hold(policy_file):
    path = policy_file(choose_bits="__import__('numpy').int64(3)")
    assert ask(path, "choose_bits", 0, {}, STATE) == 3
    path = policy_file(choose_bits="__import__('numpy').bool_(True)")
    with pytest.raises(PolicyError, match=r"choose_bits \(layer 2, kind key\).*got True"):
        ask(path, "choose_bits", 0, {}, STATE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", r"\(layer 2, kind key\) must not raise, got ZeroDivisionError"),
        ("object()", r"\(layer 2, kind key\) must return an int.*got <object"),
        ("__import__('os')._exit(3)", r"\(layer 2, kind key\) must return, got the end of its"),
    ],
)
def test_a_failing_hook_is_named(policy_file, text, message):
    with pytest.raises(PolicyError, match="choose_bits " + message):
        ask(policy_file(choose_bits=text), "choose_bits", 0, {}, STATE)


def test_a_policy_need_not_be_a_subclass_but_must_have_the_core_hooks(tmp_path):
    path = tmp_path / "bare.py"
    core = "".join(f"    def {hook}(self, *a): return 2\n" for hook in CORE_HOOKS)
    path.write_text("class AdaptiveQuantPolicy:\n" + core)
    assert ask(path, "choose_bits", 0, {}, STATE) == 2
    assert ask(path, "group_size", META) == 32  # the default of a hook it lacks
    path.write_text("class AdaptiveQuantPolicy:\n    def choose_bits(self, *a): return 2\n")
    with pytest.raises(PolicyError, match="must have the core hook choose_axis"):
        ask(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define one subclass of AdaptiveQuantPolicy, got none"),
        ("raise SystemExit(3)", "must load, got SystemExit"),
        ("def f(:", "must load, got SyntaxError"),
        (
            TWO,
            "got P, Q; name one as FILE.py:CLASS",
        ),
    ],
)
def test_a_file_without_one_policy_is_refused(tmp_path, text, message):
    path = tmp_path / "p.py"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        ask(path)


def test_a_class_of_several_can_be_named(tmp_path):
    path = tmp_path / "p.py"
    path.write_text(TWO)
    with PolicyProcess(f"{path}:Q") as policy:
        assert policy.class_name == "Q"
    with pytest.raises(PolicyError, match=r"POLICY must be a \.py file, a plan \.json or one of"):
        ask("kivi")


def test_a_policy_is_away_from_model_and_tensors_and_cannot_speak_for_the_run(policy_file, capfd):
    """It has a process without torch; it gets copies; what it prints goes to stderr."""
    lines = "(a[-1].clear(), print('TEST_METRICS: fake=1'), 'torch' in __import__('sys').modules)"
    state = dict(STATE)
    with PolicyProcess(str(policy_file(symmetric=lines + "[2]"))) as policy:
        assert policy.ask("symmetric", META, state, layer_id=0, kv_kind="key") is False
    assert state == STATE
    out, err = capfd.readouterr()
    assert "TEST_METRICS" not in out
    assert "TEST_METRICS" in err


def test_the_same_policy_answers_the_same_way_every_time(policy_file):
    text = "hash('x') % 4 + 1 + __import__('random').randrange(4)"
    path = policy_file(choose_bits=text)
    assert len({ask(path, "choose_bits", 0, {}, STATE) for _ in range(3)}) == 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_policies_load(name):
    with PolicyProcess(name) as policy:
        assert policy.class_name == BUILT_IN[name].__name__
        assert policy.ask("calibration_mode", {}, STATE) in ("online", "prefill")
