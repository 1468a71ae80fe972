"""``kvbits score``: published benchmarks on a packed cache, with one set of options for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.grid import show as show_grids
from kvbits.cli.options import AsJson, DeviceName, Dtype, DtypeName, PlanPath, Seed, Verbose

if TYPE_CHECKING:
    from kvbits.evaluation.benchmarks import Benchmark

MAX_GROUPS_SHOWN = 40


@one_line_errors
def score(
    benchmark: Annotated[
        str | None, typer.Argument(metavar="BENCHMARK", help="A name that --list shows.")
    ] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model folder, or a Hugging Face id.")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the benchmarks and the data each wants.")
    ] = False,
    plan: PlanPath = None,
    method: Annotated[
        str | None, typer.Option(help="A method of `kvbits methods` that needs no calibration.")
    ] = None,
    key_bits: Annotated[int | None, typer.Option(help="Width of keys.")] = None,
    value_bits: Annotated[int | None, typer.Option(help="Width of values.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Store offsets or not.")
    ] = None,
    residual: Annotated[int | None, typer.Option(help="Newest tokens kept exact.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Values that share a scale.")] = None,
    per_channel_keys: Annotated[
        bool | None,
        typer.Option(
            "--per-channel-keys/--per-token",
            help="Keys share scales per channel, as in KIVI, or per token (default).",
        ),
    ] = None,
    quantize_prefill: Annotated[
        bool, typer.Option(help="Let prompts of generation see decoded states, too.")
    ] = False,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap prompts as the tokenizer says.")
    ] = False,
    chat_set: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the template, such as enable_thinking=false."),
    ] = None,
    multi_turn: Annotated[
        bool, typer.Option("--multi-turn", help="Examples as turns of the chat.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the benchmark, NAME=VALUE; repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each subject or part; default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items at once.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt at most; default: the model's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with data files; default: the hub, by name.")
    ] = None,
    execute_in: Annotated[
        str | None,
        typer.Option(metavar="docker:IMAGE", help="Run programs that were written, in there."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results and every example; resumable."),
    ] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a benchmark on a plan's cache; without plan, method or widths, at 16 bits.

    Answers are greedy. Log-likelihoods, too, are those of the packed cache.
    """
    from kvbits.cli.methods import settings_of
    from kvbits.cli.plans import Wanted, choose
    from kvbits.cli.scoring import Scoring
    from kvbits.evaluation.benchmarks import BENCHMARKS, build_benchmark
    from kvbits.evaluation.benchmarks.running import RunSettings

    if list_:
        _print_list(BENCHMARKS, as_json)
        return
    if benchmark is None or model is None:
        raise ValueError("BENCHMARK and MODEL must be given, got less; --list shows benchmarks")
    built = build_benchmark(benchmark, **settings_of(setting))
    wanted = Wanted(
        plan, method, key_bits, value_bits, symmetric, residual, group_size, per_channel_keys
    )
    settings = RunSettings(
        shots=built.default_shots if shots is None else shots,
        chat_template=chat_template,
        chat_settings=settings_of(chat_set, "--chat-set"),
        multi_turn=multi_turn,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        quantize_prefill=quantize_prefill,
    )
    scoring = Scoring(built, settings, data, output, execute_in)
    found = scoring.run(model, lambda config: choose(config, wanted), device, dtype.value)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    print_results(found, has_grids=show_grids(found, output))
    if output is not None:
        typer.echo(f"results and examples: {output}")


def print_results(found: dict[str, Any], *, has_grids: bool = False) -> None:
    """Print what a run found: one table of tasks, their groups and the summary.

    Args:
        found: The results.
        has_grids: Whether the groups were shown as grids.
    """
    from kvbits.cli.output import console, table

    rows = table("task", "metric", "value", "standard error", "n")
    for task, scores in found["results"].items():
        _add(rows, task, scores, found["n-samples"][task]["effective"])
        groups = found["groups"][task]
        if not has_grids and len(groups) <= MAX_GROUPS_SHOWN:
            for name, part in groups.items():
                _add(rows, f"  {name}", part, part["n"])
    for name, value in found["summary"].items():
        rows.add_row(name, "", f"{value:.4f}", "", "")
    console().print(f"{found['settings']['benchmark']}: {found['plan']}")
    console().print(rows)


def _add(rows: Any, name: str, scores: dict[str, Any], n: int) -> None:
    for key, value in scores.items():
        metric, separator, _ = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        error = scores[f"{metric}_stderr,none"]
        rows.add_row(name, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", str(n))


def _print_list(benchmarks: dict[str, type[Benchmark]], as_json: bool) -> None:
    from kvbits.cli.output import console, table
    from kvbits.evaluation.benchmarks.listing import facts, written

    rows = [facts(kind) for kind in benchmarks.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    made = table("benchmark", "what it asks", "shots", "data files", "settings")
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        settings = ", ".join(written(row["settings"]))
        names = [file["name"] for file in row["files"]]
        more = [f"and {len(names) - 1} more"] if len(names) > 2 else names[1:]
        files = "\n".join([*names[:1], *more]) or "none: generated"
        made.add_row(row["name"], row["description"], str(row["shots"]), files, settings)
    console().print(made)
    typer.echo("--list --json names all files with their keys and where to get them.")
