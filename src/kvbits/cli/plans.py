"""Which cache a command runs on: a plan file, a published method, or a pair of widths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kvbits.plan import CachePlan
    from kvbits.plan.modes import Mode


class Wanted(NamedTuple):
    """Options of a command that say which cache; None is not given.

    Attributes:
        plan: A plan file.
        method: A method of ``kvbits methods`` that needs no calibration.
        key_bits: Width of keys.
        value_bits: Width of values.
        symmetric: Store no offset.
        residual_length: Newest tokens kept exact.
        group_size: Values that share a scale.
        per_channel_keys: Whether keys share scales per channel, without a method.
    """

    plan: Path | None = None
    method: str | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    symmetric: bool | None = None
    residual_length: int | None = None
    group_size: int | None = None
    per_channel_keys: bool | None = None


FLAGS = {
    "method": "--method",
    "key_bits": "--key-bits",
    "value_bits": "--value-bits",
    "symmetric": "--symmetric or --asymmetric",
    "residual_length": "--residual",
    "group_size": "--group-size",
    "per_channel_keys": "--per-channel-keys or --per-token",
}


def choose(config: Any, wanted: Wanted) -> CachePlan | None:
    """The plan that is asked for, checked against the model; None is full precision.

    Args:
        config: The transformers config of the model.
        wanted: What was given.

    Raises:
        ValueError: If options contradict each other or do not suit the method.
        PlanError: If the plan does not fit the model.
    """
    from kvbits.plan import CachePlan

    given = {name: getattr(wanted, name) for name in FLAGS if getattr(wanted, name) is not None}
    if wanted.plan is not None:
        if given:
            raise ValueError(f"--plan must be given alone, got {FLAGS[next(iter(given))]} with it")
        plan = CachePlan.load(wanted.plan)
        plan.check(config)
        return plan
    if wanted.method is not None:
        return _of_method(config, given)
    if not given:
        return None
    return _uniform(config, given)


def _of_method(config: Any, given: dict[str, Any]) -> CachePlan:
    from kvbits.methods import build_method

    name = given.pop("method")
    if "per_channel_keys" in given:
        raise ValueError(
            f"{FLAGS['per_channel_keys']} must be given without --method, got {name!r} too, "
            "which says itself how it shares scales"
        )
    if given.get("symmetric") is False:  # how methods are, unless they have the choice
        del given["symmetric"]
    built = build_method(name, **given)
    if built.needs_data:
        raise ValueError(
            f"--method must need no calibration here, got {name!r}; make its plan with "
            "kvbits calibrate and pass that as --plan"
        )
    return built.plan(config)


def _uniform(config: Any, given: dict[str, Any]) -> CachePlan:
    from kvbits.plan import CachePlan

    try:
        key_bits, value_bits = given.pop("key_bits"), given.pop("value_bits")
    except KeyError as error:
        raise ValueError(
            f"--key-bits and --value-bits must be given together, got no {FLAGS[error.args[0]]}"
        ) from None
    mode: Mode = "kivi" if given.pop("per_channel_keys", False) else "per_token"
    return CachePlan.uniform(config, key_bits, value_bits, mode=mode, **given)
