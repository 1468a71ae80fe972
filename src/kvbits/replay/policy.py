"""The class a policy is a subclass of: four hooks it must have and thirteen it may have.

A policy decides how the cache of a model is quantized, tensor by tensor. It sees numbers and
strings in dicts and never the model or a tensor; what it returns is checked, and anything illegal
ends the run.

``kv_kind`` is ``"key"`` or ``"value"``, ``layer_id`` counts from 0, ``head_group`` is the index of
a key/value head. The dicts are the caller's own copies.

``request_meta`` (known before decoding): workload, dataset, example_id, model_id (str);
prompt_chars, prompt_tokens, max_new_tokens, num_layers, num_kv_heads, num_query_heads, head_dim.

``budget_state``: budget_bits (the cap on bits of an entry), step (0 outside the loop), seq_len,
num_layers, avg_bits_so_far (mean of the finished steps of this request, 0.0 at first) and
spent_bits_this_step (mean of the tensors decided in this step, weighted by their entries).

``workload_meta``: name, source_family, model_id (str); num_examples, max_new_tokens,
min_prompt_tokens, mean_prompt_tokens, max_prompt_tokens, num_layers, num_kv_heads, head_dim.

``token_stats`` of the entries of one head that may be quantized, all 0.0 if there are none:
seq_len, quant_tokens, protected_tokens, head_dim (int); mean, std, min, max, absmax, rms;
channel_range_mean (mean over channels of max - min over tokens) and token_range_mean (the other
way round); channel_outlier (largest channel absmax over the median one) and token_outlier; err2
and err4 (relative error of these entries at 2 and 4 bits, with the axis and group size of the
plan); source: ``"online"``, ``"prefill"`` or ``"workload"``.
"""

from __future__ import annotations

from typing import Any


class AdaptiveQuantPolicy:
    """A policy that gives every entry the bits of the budget, at most 4, as KIVI would.

    Override what you want to decide yourself; ``docs/replay.md`` has an example. The class needs
    no constructor arguments. It is built anew for every example, so that examples do not depend on
    each other and may run in any order.
    """

    # ----- the four core hooks

    def choose_bits(
        self,
        layer_id: int,
        kv_kind: str,
        head_group: int,
        token_stats: dict[str, Any],
        budget_state: dict[str, Any],
    ) -> int:
        """Bits of the entries of one head in this step; asked for every step.

        Keys of all layers come first, then values. Legal: 1 to 8, or 16 to keep entries as they
        are; more than the budget is cut down to it, and counted.
        """
        return min(4, int(budget_state["budget_bits"]))

    def choose_axis(self, layer_id: int, kv_kind: str) -> str:
        """What entries share a scale; asked once per request.

        Legal: ``"channel"`` (``group_size`` consecutive tokens of one channel) or ``"token"``
        (``group_size`` neighbouring channels of one token, heads laid side by side).
        """
        return "channel" if kv_kind == "key" else "token"

    def residual_length(self, layer_id: int, request_meta: dict[str, Any]) -> int:
        """Newest tokens that stay exact, for keys and values alike; asked once per request.

        Legal: 0 to 4096. The family decides how it applies: ``kivi`` keeps ``T mod R`` keys.
        """
        return 128 if str(request_meta["workload"]).startswith("longbench_") else 32

    def calibration_mode(self, workload_meta: dict[str, Any], budget_state: dict[str, Any]) -> str:
        """Where ``token_stats`` come from; asked before anything else.

        Legal: ``"online"`` (the cache of every step), ``"prefill"`` (the cache after the prompt,
        then frozen) or ``"workload"`` (the prompt of the first example, frozen for all).
        """
        return "online"

    # ----- the optional hooks: asked once per request, layer and kind

    def quantizer_family(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> str:
        """Which rules hold. Legal: ``"minmax"``, ``"kivi"``, ``"skvq"``, ``"qaq"``."""
        return "minmax"

    def group_size(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> int:
        """Entries that share a scale. Legal: any int; 0 or less is the whole axis. Not qaq."""
        return 32

    def sink_tokens(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> int:
        """First tokens that stay exact. Legal: 0 to 64; 0 with kivi."""
        return 0

    def clip_ratio(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> float:
        """Factor on both ends of a group's range. Legal: above 0, at most 1. minmax and skvq."""
        return 1.0

    def quantization_level(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> str:
        """What shares statistics in qaq. Legal: ``"head"``, ``"layer"``, ``"token"`` (of one token
        the dims of one head; all heads of a layer; all layers)."""
        return "head"

    def quantization_method(
        self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]
    ) -> str:
        """How qaq places levels. Legal: ``"uniform"``, ``"normal"`` (quantiles of a normal)."""
        return "uniform"

    def symmetric(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> bool:
        """Whether ranges are centred on zero. Legal: a bool; needs 2 bits. minmax and qaq."""
        return False

    def outliers_ratio(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> float:
        """Share of every group that stays exact, half from each end. Legal: 0 to 0.1. minmax and
        qaq."""
        return 0.0

    def use_attentions(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> bool:
        """Whether qaq derives the bits of every unit from attention, in place of ``choose_bits``.
        Legal: a bool; True only with qaq and ``"uniform"``."""
        return False

    def bit_range(
        self,
        layer_id: int,
        kv_kind: str,
        request_meta: dict[str, Any],
        budget_state: dict[str, Any],
    ) -> tuple[int, int]:
        """Least and most bits where attention decides. Legal: 0 <= low <= high <= 16; both are cut
        down to the budget."""
        budget = int(budget_state["budget_bits"])
        return min(2, budget), budget

    def last_n_attentions(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> int:
        """Newest queries whose attention counts. Legal: at least 1. qaq with use_attentions."""
        return 1

    def target_quantization_error(
        self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]
    ) -> float:
        """Error that qaq aims at. Legal: above 0. qaq with use_attentions."""
        return 3.0

    def q_norm(self, layer_id: int, kv_kind: str, request_meta: dict[str, Any]) -> float:
        """Squared norm of a query that qaq assumes for keys. Legal: above 0. qaq keys with
        use_attentions."""
        return 300.0
