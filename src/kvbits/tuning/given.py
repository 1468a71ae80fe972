"""Rivals from elsewhere: plans of other runs, such as a published recipe's, to verify beside."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvbits.errors import PlanError, RecordError
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import Candidates
from kvbits.tuning.settings import RECIPES
from kvbits.tuning.tables import Choice, Row, place_of


class GivenRival(NamedTuple):
    """A plan to compare with: its name on the page, where it came from, and the plan."""

    name: str
    source: str
    plan: CachePlan


def load_rival(path: str | os.PathLike[str]) -> GivenRival:
    """Read a plan file, or the plan of a finished run.

    A run of a published recipe is named after the recipe, any other after its folder.

    Raises:
        RecordError: A folder holds no finished run.
        PlanError: The plan cannot be read.
    """
    source = Path(path)
    if not source.is_dir():
        return GivenRival(source.stem, str(path), CachePlan.load(source))
    if not (source / "plan.json").is_file():
        raise RecordError(
            f"rival must be a plan file or a finished run, got {source} without plan.json; "
            "finish it with the command that began it"
        )
    recipe = _recipe(source / "study.json")
    name = source.name if recipe is None else f"{recipe} recipe"
    return GivenRival(name, str(path), CachePlan.load(source / "plan.json"))


def _recipe(study: Path) -> str | None:
    """The published recipe whose settings a study has, if any."""
    try:
        settings = json.loads(study.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, recipe in RECIPES.items():
        if all(_as_json(settings.get(key)) == _as_json(value) for key, value in recipe.items()):
            return name
    return None


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_given(given: Sequence[GivenRival], candidates: Candidates) -> None:
    """Refuse rivals that could not be verified, before anything is measured.

    Raises:
        PlanError: One cannot be told in the study's candidates.
        ValueError: Two have one name.
    """
    names = [rival.name for rival in given]
    for rival in given:
        if names.count(rival.name) > 1:
            raise ValueError(
                f"rivals must have different names, got {rival.name!r} twice; rename a file or "
                "folder"
            )
        as_choice(rival, candidates)


def as_choice(rival: GivenRival, candidates: Candidates) -> Choice:
    """Return the candidates that store the model as the rival does.

    Raises:
        PlanError: It is for another model, or stores a layer as no candidate of the study does.
    """
    rival.plan.check(candidates.config)
    return tuple(_column(rival, candidates, row) for row in candidates.layers)


def _column(rival: GivenRival, candidates: Candidates, row: Row) -> int:
    """The candidate of a row; heads have one each only if their layer stores all alike."""
    layer = place_of(row).layer
    wanted = rival.plan.layers[layer]
    for column in range(len(candidates.columns)):
        if candidates.layer_plan(row, column) == wanted:
            return column
    labels = ", ".join(column.label for column in candidates.columns)
    raise PlanError(
        f"rival must store every layer as a candidate of the study ({labels}), got "
        f"{rival.source} with another codec, sinks or residual in layer {layer}; tune with its "
        "--mode and --widths, or set two finished runs side by side with kvbits compare"
    )
