"""The same decisions on the real packed cache, where a plan can say them.

A replay asks what a cache quantized afresh would choose; the packed cache stores every token once.
Where a policy's bits do not change from step to step, both must choose the same tokens, which
checks the one against the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch

from kvbits.attention.hf import enable
from kvbits.codecs import Affine, AnyCodec, Identity
from kvbits.errors import PlanError
from kvbits.layer_plan import HeadGroup, LayerPlan
from kvbits.plan import CachePlan
from kvbits.replay.harness import ExampleResult, Workload
from kvbits.replay.hooks import EXACT_BITS
from kvbits.replay.model import cache_of, entries_of, next_logits
from kvbits.replay.settings import TensorSettings
from kvbits.replay.slices import Example

PACKABLE_BITS = (2, 3, 4, 8, EXACT_BITS)


class Agreement(NamedTuple):
    """How often the packed cache chose what the replay did.

    Attributes:
        num_agreed: Steps with the same choice.
        num_steps: Steps of examples that a plan can say.
        refused: Why the others cannot be said, by example.
    """

    num_agreed: int
    num_steps: int
    refused: dict[str, str]


@torch.no_grad()
def run_packed(workload: Workload, examples: Iterable[ExampleResult]) -> Agreement:
    """Run the decisions of a replay through ``CachePlan.new_cache`` and compare choices."""
    by_name = {example.example_id: example for example in workload.slice.examples}
    agreed = steps = 0
    refused = {}
    for result in examples:
        try:
            plan = plan_of(result, workload.model.config)
        except PlanError as error:
            refused[result.example_id] = str(error)
            continue
        choices = packed_choices(workload, by_name[result.example_id], result, plan)
        agreed += sum(
            choice == step.chosen for choice, step in zip(choices, result.steps, strict=True)
        )
        steps += len(choices)
    return Agreement(agreed, steps, refused)


def packed_choices(
    workload: Workload, example: Example, result: ExampleResult, plan: CachePlan
) -> list[int]:
    """What the packed cache chooses after each token the replay fed.

    Flushes wait until a step is over, so that a token meets the cache as the replay shows it: what
    was packed before the token came. In teacher mode the entries of a token are those of the exact
    run, as in the replay; in free mode they are the packed run's own, as when it is deployed.
    """
    model = workload.model
    cache, exact = plan.new_cache(model, impl="reference"), cache_of([])
    is_teacher = workload.mode == "teacher"
    choices = []
    for layer in cache.packed_layers.values():
        layer.is_recording = True
    for ids in (workload.ids(example), *([step.token] for step in result.steps)):
        with enable(model):
            choices.append(int(next_logits(model, ids, cache).argmax()))
        if is_teacher:
            next_logits(model, ids, exact)
        if is_teacher and len(choices) > 1:
            _replace_newest(cache, exact)
        for layer in cache.packed_layers.values():
            layer.crop(0)  # lets flushes happen
    return choices[1:]


def _replace_newest(cache: Any, exact: Any) -> None:
    """Put the exact run's newest entries in the place of the packed run's."""
    cache.crop(-1)
    newest = [x[:, :, -1:] for x in entries_of(exact)]
    half = len(newest) // 2
    for layer, (key, value) in enumerate(zip(newest[:half], newest[half:], strict=True)):
        cache.update(key, value, layer)


def plan_of(result: ExampleResult, config: Any) -> CachePlan:
    """The plan that says what a policy decided for one example.

    Raises:
        PlanError: If no plan can: the reason is the message.
    """
    chosen = {tuple(tensor.chosen for tensor in step.tensors) for step in result.steps}
    if len(chosen) != 1:
        raise PlanError(
            f"bits must be the same in every step to be packed, got {len(chosen)} choices"
        )
    bits = next(iter(chosen))
    half = len(bits) // 2
    layers = [_layer(result.settings[layer::half], bits[layer::half]) for layer in range(half)]
    return CachePlan.from_layers(config, layers)


def _layer(sides: Sequence[TensorSettings], bits: Sequence[tuple[int, ...]]) -> LayerPlan:
    """The layer plan of keys and values that were decided so."""
    key, value = sides
    if key.sink_tokens != value.sink_tokens:
        raise PlanError("sink_tokens must be the same on both sides to be packed, got two")
    pairs = list(zip(*bits, strict=True))
    if not pairs:
        raise PlanError("use_attentions must be False to be packed, got True")
    groups, head = [], 0
    for pair, run in groupby(pairs):
        heads = tuple(range(head, head + len(list(run))))
        head = heads[-1] + 1
        named = None if len(heads) == len(pairs) else heads
        codecs = [_codec(each, bits) for each, bits in zip(sides, pair, strict=True)]
        groups.append(HeadGroup(heads=named, key=codecs[0], value=codecs[1]))
    return LayerPlan(
        groups=tuple(groups),
        sink_tokens=key.sink_tokens,
        residual_length=key.residual_length,
        flush=_flush(key, value),
    )


def _flush(key: TensorSettings, value: TensorSettings) -> Literal["joint", "independent"]:
    """The flush rule that keeps as many tokens exact as the families of both sides do."""
    axes = key.choose_axis, value.choose_axis
    is_kivi = {key.quantizer_family, value.quantizer_family} == {"kivi"}
    if axes == ("channel", "token") and (is_kivi or key.residual_length == 0):
        return "independent"
    if axes == ("token", "token") or (
        axes == ("channel", "channel") and key.group_size == value.group_size
    ):
        return "joint"
    raise PlanError(
        f"axes must be flushed as a plan can to be packed, got {axes[0]} keys and {axes[1]} "
        f"values with residual_length={key.residual_length} in the {key.quantizer_family} family"
    )


def _codec(settings: TensorSettings, bits: int) -> AnyCodec:
    if bits == EXACT_BITS:
        return Identity()
    if bits not in PACKABLE_BITS:
        raise PlanError(f"bits must be 2, 3, 4, 8 or 16 to be packed, got {bits}")
    if settings.quantizer_family == "qaq" or settings.symmetric or settings.outliers_ratio:
        raise PlanError(
            "quantizer_family must round between the ends of a range to be packed, got "
            f"{settings.quantizer_family}, symmetric={settings.symmetric}, "
            f"outliers_ratio={settings.outliers_ratio}"
        )
    if settings.group_size < 1:
        raise PlanError(f"group_size must be at least 1 to be packed, got {settings.group_size}")
    return Affine(
        bits=bits,
        granularity="per_channel" if settings.choose_axis == "channel" else "per_token",
        group_size=settings.group_size,
        clip_ratio=settings.clip_ratio,
        parameter_dtype="float32",
    )
