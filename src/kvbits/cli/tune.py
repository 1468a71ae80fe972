"""``kvbits tune``: search a plan, verify it, and say how to use it."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbits.cli.failures import INTERRUPTED, fail, one_line_errors
from kvbits.cli.options import (
    DeviceName,
    Dtype,
    DtypeName,
    Memory,
    Mode,
    ModelName,
    Seed,
    Verbose,
)
from kvbits.cli.sharing import (
    Parallel,
    Sharing,
    Storage,
    Study,
    Workers,
    tune_shared,
    with_parallel,
)


class Strategy(StrEnum):
    """How the search chooses among the measured candidates."""

    EXACT = "exact"
    EXACT_PLUS = "exact+"
    MOEAD = "moead"
    NSGA2 = "nsga2"
    TPE = "tpe"
    UNIFORM = "uniform"
    LADDER = "ladder"
    RANDOM = "random"


class Granularity(StrEnum):
    """What has a width of its own."""

    SIDE = "side"
    LAYER = "layer"
    HEAD = "head"


class DropRule(StrEnum):
    """What of a paired difference in accuracy is limited."""

    ESTIMATE = "estimate"
    INTERVAL = "interval"


class Sensitivity(StrEnum):
    """What says how much a layer can lose."""

    KL = "kl"
    FISHER = "fisher"
    E_O = "e_o"
    ACCURACY = "accuracy"


class Objective(StrEnum):
    """What the search minimises over the calibration domains."""

    BALANCED = "balanced"
    MINIMAX = "minimax"
    SUM = "sum"


class Count(StrEnum):
    """Which tokens of documents with questions count."""

    ANSWERS = "answers"
    ALL = "all"


class Recipe(StrEnum):
    """Published ways to search; the values are those of ``kvbits.tuning.settings.RECIPES``."""

    KVTUNER = "kvtuner"


@one_line_errors
def tune(
    model: ModelName,
    bits: Annotated[
        float | None,
        typer.Option(min=1.0, max=16.0, help="Budget in effective bits per value; default: 4."),
    ] = None,
    memory: Memory = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Budget: nats per token in the worst domain; finds the smallest plan."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Budget: how much worse than 16 bits at the first --task, such as 1%; finds the "
            "smallest plan.",
        ),
    ] = None,
    drop_rule: Annotated[
        DropRule | None,
        typer.Option(
            help="What --max-drop limits: the measured drop (estimate, the default) or the far "
            "end of its 95 % interval."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Count sizes at this many tokens a row, exact ones included."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of --context tokens.")] = None,
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            help="exact (default) solves a programme; exact+ measures and corrects it; moead, "
            "nsga2 and tpe measure every trial; the rest are rules to compare with."
        ),
    ] = None,
    recipe: Annotated[
        Recipe | None,
        typer.Option(help="A published search: strategy, widths, trials and limits at once."),
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Where scales are shared; default: per_token.")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[:NAME=VALUE,..]",
            help="In place of a mode: a method a layer may be stored by; repeatable.",
        ),
    ] = None,
    granularity: Annotated[
        Granularity | None,
        typer.Option(
            help="side (default): keys and values apart; layer: one width for both; head: every "
            "key/value head apart too."
        ),
    ] = None,
    sensitivity: Annotated[
        Sensitivity | None,
        typer.Option(
            help="What the programme adds up. kl (default): a pass for every side; fisher: one "
            "backward pass for all; e_o: attention outputs; accuracy: of the first --task."
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="minimax (default): the worst domain; sum: their weighted mean; balanced: both."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,..", help="Weights of text, reasoning and recall in the mean."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task to verify on; repeatable.")] = None,
    widths: Annotated[
        str | None, typer.Option(metavar="W,W,..", help="Code widths to choose from.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=0, help="Problems per task.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibration text of your own.")] = None,
    heldout_text: Annotated[
        Path | None, typer.Option(help="Text of the same kind to verify on.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN[=SOURCE]",
            help="In place of text, reasoning and recall: a built-in domain (those, code, chat), "
            "or one from a file, hf:DATASET or task:NAME; repeatable.",
        ),
    ] = None,
    count: Annotated[
        Count | None,
        typer.Option(help="Tokens whose KL counts: answers (default), or all of a document."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Plans to measure.")] = None,
    workers: Workers = 1,
    storage: Storage = None,
    study: Study = None,
    parallel: Parallel = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|PLAN|RECIPE",
            help="Also verify the plan of this run, this plan file, or what a published recipe "
            "finds for the same budget; repeatable, also for a finished run.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default under runs/.")
    ] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    verbose: Verbose = False,
) -> None:
    """Find the bits of every layer. Stopped at any point, the same command goes on."""
    given = {
        "bits": bits,
        "memory": memory,
        "max_kl": max_kl,
        "max_drop": parse_share("--max-drop", max_drop),
        "drop_rule": _value(drop_rule),
        "context": context,
        "batch": batch,
        "strategy": _value(strategy),
        "mode": _value(mode),
        "candidates": tuple(candidates) if candidates else None,
        "granularity": _value(granularity),
        "sensitivity": _value(sensitivity),
        "objective": _value(objective),
        "domain_weights": parse_numbers("--weights", weights),
        "seed": seed,
        "widths": parse_numbers("--widths", widths),
        "tasks": tuple(name for item in task for name in item.split(",")) if task else None,
        "task_n": n,
        "text": None if text is None else str(text),
        "heldout_text": None if heldout_text is None else str(heldout_text),
        "calibration": tuple(calibration) if calibration else None,
        "count": _value(count),
        "trials": trials,
        "parallel": parallel,
    }
    given = {key: value for key, value in given.items() if value is not None}
    sharing = Sharing.of(workers, storage, study)
    run_dir = output or Path("runs") / _default_name(model, given, recipe)
    try:
        _tune(model, run_dir, device, dtype.value, given, recipe, sharing, rival or [])
    except KeyboardInterrupt:
        fail(
            f"stopped; results so far are in {run_dir}, and the same command continues from there",
            INTERRUPTED,
        )
    _print_result(model, run_dir)


def _value(choice: StrEnum | None) -> str | None:
    return None if choice is None else choice.value


def _default_name(model: str, given: dict[str, Any], recipe: Recipe | None) -> str:
    """``kvbits-tiny-kivi-exact-4``; what names cannot have becomes an underscore."""
    stored = given.get("candidates") or (given.get("mode", Mode.PER_TOKEN.value),)
    search = given.get("strategy") or (recipe or Strategy.EXACT).value
    names = ("memory", "max_kl", "max_drop")
    budgets = [f"{name}-{given[name]:g}" for name in names if name in given]
    parts = [Path(model).name, "+".join(stored), search, *budgets]
    if not budgets:
        parts.append(f"{given.get('bits', 4):g}")
    return re.sub("[^A-Za-z0-9_.+-]+", "_", "-".join(parts))


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read ``8,4,1.5``.

    Raises:
        ValueError: a part is no number.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise ValueError(f"{option} must be numbers such as 8,4,2, got {text!r}")
    return tuple(float(part) if "." in part else int(part) for part in parts)


def parse_share(option: str, text: str | None) -> float | None:
    """Read ``1%`` or ``0.01``.

    Raises:
        ValueError: the text is neither, or not between 0 and 1.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise ValueError(f"{option} must be a share such as 1% or 0.01, got {text!r}")
    return share


def _tune(
    name: str,
    run_dir: Path,
    device: str,
    dtype: str,
    given: dict[str, Any],
    recipe: Recipe | None,
    sharing: Sharing,
    rivals: list[str],
) -> None:
    from kvbits.cli.models import load_model
    from kvbits.cli.output import StageBars, command_line
    from kvbits.report.page import write_page
    from kvbits.tuning import study
    from kvbits.tuning.given import load_rival
    from kvbits.tuning.published import recipe_rival, recipe_settings
    from kvbits.tuning.settings import RECIPES, TuneSettings

    settings = TuneSettings(**given, **_of_recipe(given, recipe, RECIPES))
    settings = with_parallel(settings, run_dir, settings.population if sharing.is_shared else 1)
    if sharing.is_shared and rivals:
        raise ValueError(
            "--rival must be given without --workers and --storage, got both; add it to the "
            "finished run"
        )
    published = [rival for rival in rivals if rival in RECIPES and not Path(rival).exists()]
    others = [load_rival(path) for path in rivals if path not in published]
    for rival in published:
        recipe_settings(settings, rival)  # refuse what cannot be searched for before any work
    if sharing.is_shared:
        tune_shared(name, run_dir, device, dtype, settings, sharing)
    else:
        loaded = load_model(name, device, dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
        with StageBars() as progress:
            for rival in published:
                others.append(recipe_rival(model, tokenizer, settings, rival, run_dir, progress))
            command = command_line()
            study.tune(
                model, tokenizer, settings, run_dir, progress, given=others, command=command
            )
    write_page(run_dir, model=name)


def _of_recipe(
    given: dict[str, Any], recipe: Recipe | None, recipes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        ValueError: An option would change one of them.
    """
    settings = recipes[recipe.value] if recipe else {}
    changed = sorted(settings.keys() & given.keys())
    if recipe and changed:
        raise ValueError(
            f"--{changed[0]} must not be given with --recipe {recipe.value}, which sets it to "
            f"{settings[changed[0]]}"
        )
    return settings


def _print_result(model: str, run_dir: Path) -> None:
    """Print the tables of the page, and how to go on."""
    from kvbits.cli.output import as_rich, console
    from kvbits.report import tables, verdict
    from kvbits.report.collect import collect

    run = collect(run_dir)
    for shown in (tables.verified(run), tables.task_results(run)):
        if shown.rows:
            console().print(as_rich(shown))
    plan = run_dir / "plan.json"
    bought = [f"{name:<7} {value}" for name, value in tables.bought(run)]
    lines = ["* the plan chosen on calibration data; every number above is held-out data", ""]
    lines += [*verdict.sentences(run), ""]
    lines += [*bought, f"plan    {plan}", f"page    {run_dir / 'report.html'}"]
    prompt = '--prompt "The history of the"'
    lines.append(f"use it  kvbits generate {model} --plan {plan} {prompt}")
    typer.echo("\n".join(lines))
