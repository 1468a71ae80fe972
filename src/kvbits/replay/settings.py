"""What a policy asked for, one tensor at a time: the answers of its hooks for one request."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvbits.errors import PolicyError
from kvbits.replay.hooks import KINDS, OPTIONAL_HOOKS, place
from kvbits.replay.process import PolicyProcess


class TensorSettings(NamedTuple):
    """The settings of one layer and kind; fields are named as the hooks are."""

    layer_id: int
    kv_kind: str
    choose_axis: str
    residual_length: int
    quantizer_family: str
    group_size: int
    sink_tokens: int
    clip_ratio: float
    quantization_level: str
    quantization_method: str
    symmetric: bool
    outliers_ratio: float
    use_attentions: bool
    bit_range: tuple[int, int]
    last_n_attentions: int
    target_quantization_error: float
    q_norm: float

    def refuse(self, hook: str, rule: str) -> PolicyError:
        """The error of settings that do not go together, blamed on one hook."""
        where = place(hook, self.layer_id, self.kv_kind)
        return PolicyError(f"{where} must {rule}, got {getattr(self, hook)!r}")


class Request(NamedTuple):
    """What is known of a request before decoding, and the cap on its bits."""

    meta: dict[str, Any]
    budget_bits: int

    def budget_state(self, seq_len: int, **found: Any) -> dict[str, Any]:
        """``budget_state`` as hooks see it; outside the loop nothing is spent yet."""
        start = {"step": 0, "avg_bits_so_far": 0.0, "spent_bits_this_step": 0.0}
        known = {"budget_bits": self.budget_bits, "seq_len": seq_len}
        return {**known, "num_layers": self.meta["num_layers"], **start, **found}


def ask_settings(policy: PolicyProcess, request: Request) -> list[TensorSettings]:
    """Ask all hooks but ``choose_bits`` and ``calibration_mode``: keys, then values.

    Raises:
        PolicyError: If a hook fails.
    """
    layers = range(request.meta["num_layers"])
    residual = [policy.ask("residual_length", request.meta, layer_id=layer) for layer in layers]
    return [
        _of_tensor(policy, request, layer, kind, residual[layer])
        for kind in KINDS
        for layer in layers
    ]


def _of_tensor(
    policy: PolicyProcess, request: Request, layer: int, kind: str, residual: int
) -> TensorSettings:
    found: dict[str, Any] = {
        "choose_axis": policy.ask("choose_axis", layer_id=layer, kv_kind=kind)
    }
    for hook in OPTIONAL_HOOKS:
        more = [request.budget_state(request.meta["prompt_tokens"])] if hook == "bit_range" else []
        found[hook] = policy.ask(hook, request.meta, *more, layer_id=layer, kv_kind=kind)
    low, high = (min(bits, request.budget_bits) for bits in found.pop("bit_range"))
    return TensorSettings(layer, kind, residual_length=residual, bit_range=(low, high), **found)
