"""Whether layer plans fit a model's geometry, and whether two geometries are the same."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.errors import PlanError
from kvbits.geometry import LayerGeometry, ModelGeometry
from kvbits.layer_plan import SIDES, LayerPlan
from kvbits.memory import head_dim, num_group_heads


def check_layers(layers: Sequence[LayerPlan], model: ModelGeometry) -> None:
    """Refuse layer plans that the layers of ``model`` cannot be stored with.

    Raises:
        PlanError: If layers are missing or extra, a layer that cannot be packed has a packed
            codec, head groups do not name every head, or a codec does not suit the head_dim.
    """
    expected = len(model.layers)
    if len(layers) != expected:
        raise PlanError(
            f"layers must have {expected} entries, one per layer of the model, got {len(layers)}; "
            f"{'add the missing' if len(layers) < expected else 'remove the extra'} layers"
        )
    for index, (plan, layer) in enumerate(zip(layers, model.layers, strict=True)):
        _check_layer(f"layers[{index}]", plan, layer)


def _check_layer(name: str, plan: LayerPlan, layer: LayerGeometry) -> None:
    if plan.is_exact:
        return
    if not layer.is_packable:
        raise PlanError(
            f"{name} must keep both sides at 16 bits because it is a {layer.layer_type} layer, "
            "got a packed codec; use identity codecs there"
        )
    named = plan.num_grouped_heads
    if named is not None and named != layer.num_key_value_heads:
        raise PlanError(
            f"{name}.groups must name the {layer.num_key_value_heads} key/value heads of the "
            f"layer, got {named}"
        )
    for number, group in enumerate(plan.groups):
        for side in SIDES:
            codec, width = group.codec(side), head_dim(layer, side)
            try:
                codec.check_heads(num_group_heads(group, layer), width)
            except ValueError as error:
                raise PlanError(f"{name}.groups[{number}].{side}: {error}") from None


def check_same_geometry(plan: ModelGeometry, model: ModelGeometry) -> None:
    """Refuse a model whose geometry is not the one a plan was made for.

    Raises:
        PlanError: With the first field that differs.
    """
    for field in ("architecture", "num_attention_heads", "hidden_size", "num_hidden_layers"):
        _check_same(field, getattr(plan, field), getattr(model, field))
    for index, (ours, theirs) in enumerate(zip(plan.layers, model.layers, strict=True)):
        for field in LayerGeometry.model_fields:
            _check_same(f"layers[{index}].{field}", getattr(ours, field), getattr(theirs, field))


def _check_same(field: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise PlanError(
            f"the model must have {field}={ours!r} as the plan was made for, got {theirs!r}; "
            "make a plan for this model"
        )
