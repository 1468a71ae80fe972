"""``kvbits tune``: search a plan, verify it, and say how to use it."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbits.cli.failures import INTERRUPTED, fail, one_line_errors
from kvbits.cli.options import DeviceName, Dtype, DtypeName, Mode, ModelName, Seed, Verbose


class Strategy(StrEnum):
    """How the search chooses among the measured pairs."""

    EXACT = "exact"
    NSGA2 = "nsga2"


class Objective(StrEnum):
    """What the search minimises over the calibration domains."""

    BALANCED = "balanced"
    MINIMAX = "minimax"
    SUM = "sum"


@one_line_errors
def tune(
    model: ModelName,
    bits: Annotated[
        float, typer.Option(min=2.0, max=16.0, help="Effective bits per value at most.")
    ] = 4.0,
    strategy: Annotated[
        Strategy, typer.Option(help="exact solves a programme; nsga2 measures every trial.")
    ] = Strategy.EXACT,
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
    objective: Annotated[
        Objective,
        typer.Option(help="sum: the domains' mean; minimax: the worst one; balanced: both."),
    ] = Objective.BALANCED,
    task: Annotated[list[str] | None, typer.Option(help="Task to verify on; repeatable.")] = None,
    widths: Annotated[
        str | None, typer.Option(metavar="W,W,..", help="Code widths to choose from.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=0, help="Problems per task.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibration text of your own.")] = None,
    heldout_text: Annotated[
        Path | None, typer.Option(help="Text of the same kind to verify on.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of nsga2.")] = None,
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
        "strategy": strategy.value,
        "mode": None if mode is None else mode.value,
        "candidates": tuple(candidates) if candidates else None,
        "objective": objective.value,
        "seed": seed,
        "widths": parse_widths(widths),
        "tasks": tuple(name for item in task for name in item.split(",")) if task else None,
        "task_n": n,
        "text": None if text is None else str(text),
        "heldout_text": None if heldout_text is None else str(heldout_text),
        "trials": trials,
    }
    run_dir = output or Path("runs") / _default_name(model, given)
    try:
        _tune(model, run_dir, device, dtype.value, given)
    except KeyboardInterrupt:
        fail(
            f"stopped; results so far are in {run_dir}, and the same command continues from there",
            INTERRUPTED,
        )
    _print_result(model, run_dir)


def _default_name(model: str, given: dict[str, Any]) -> str:
    """``kvbits-tiny-kivi-exact-4``; settings of methods become a part that names can have."""
    stored = given["candidates"] or (given["mode"] or Mode.PER_TOKEN.value,)
    methods = "+".join(re.sub("[^A-Za-z0-9_-]+", "_", each) for each in stored)
    return f"{Path(model).name}-{methods}-{given['strategy']}-{given['bits']:g}"


def parse_widths(text: str | None) -> tuple[float, ...] | None:
    """Read ``8,4,1.5``.

    Raises:
        ValueError: a part is no number.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise ValueError(f"--widths must be numbers such as 8,4,2, got {text!r}")
    return tuple(float(part) if "." in part else int(part) for part in parts)


def _tune(name: str, run_dir: Path, device: str, dtype: str, given: dict[str, Any]) -> None:
    from kvbits.cli.models import load_model
    from kvbits.cli.output import StageBars
    from kvbits.report.page import write_page
    from kvbits.tuning import study
    from kvbits.tuning.settings import TuneSettings

    settings = TuneSettings(**{key: value for key, value in given.items() if value is not None})
    loaded = load_model(name, device, dtype)
    with StageBars() as progress:
        study.tune(loaded.model, loaded.tokenizer, settings, run_dir, progress)
    write_page(run_dir, model=name)


def _print_result(model: str, run_dir: Path) -> None:
    """Print the tables of the page, and how to go on."""
    from kvbits.cli.output import console
    from kvbits.report import tables
    from kvbits.report.collect import collect

    run = collect(run_dir)
    for shown in (tables.verified(run), tables.task_results(run)):
        if shown.rows:
            console().print(_as_rich(shown))
    plan = run_dir / "plan.json"
    lines = ["* the plan chosen on calibration data; every number above is held-out data", ""]
    lines += [f"plan    {plan}", f"page    {run_dir / 'report.html'}"]
    prompt = '--prompt "The history of the"'
    lines.append(f"use it  kvbits generate {model} --plan {plan} {prompt}")
    typer.echo("\n".join(lines))


def _as_rich(shown: Any) -> Any:
    from kvbits.cli.output import table

    made = table(*shown.header)
    for index, (name, *cells) in enumerate(shown.rows):
        is_chosen = index in shown.highlighted
        made.add_row(f"* {name}" if is_chosen else f"  {name}", *cells, style="bold" * is_chosen)
    return made
