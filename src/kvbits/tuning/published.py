"""A published search as a rival: the same study by its recipe, in a folder of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvbits.tuning.given import GivenRival, load_rival
from kvbits.tuning.identity import Data
from kvbits.tuning.progress import Progress
from kvbits.tuning.settings import RECIPES, TuneSettings
from kvbits.tuning.study import tune

FOLDER = "rivals"


def recipe_settings(settings: TuneSettings, recipe: str) -> TuneSettings:
    """Return a study's settings with those of a recipe; the study itself verifies the plan.

    Raises:
        ValueError: The recipe cannot search for this budget.
    """
    if settings.bits is None:
        raise ValueError(
            f"bits must be the budget where {recipe} is a rival, which searches under limits in "
            "bits, got another; give --bits"
        )
    alone = {"task_n": 0, "random_plans": 0}
    return TuneSettings(**(settings.model_dump() | RECIPES[recipe] | alone))


def recipe_rival(
    model: Any,
    tokenizer: Any,
    settings: TuneSettings,
    recipe: str,
    run_dir: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    data: Data | None = None,
) -> GivenRival:
    """Search by a published recipe under the budget of a study, or read what it found before.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        settings: Of the study that the rival is for; its budget, data and mode are shared.
        recipe: A name in ``RECIPES``.
        run_dir: Folder of that study; the rival's records lie in ``rivals/RECIPE`` there.
        progress: Told about stages and steps.
        data: As of ``tune``.

    Raises:
        ValueError: The recipe cannot search for this budget.
    """
    path = Path(run_dir) / FOLDER / recipe
    tune(model, tokenizer, recipe_settings(settings, recipe), path, progress, data=data)
    return load_rival(path)
