"""``kvbits replay`` and ``kvbits replay-parse``: measure a cache policy; read the output."""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import USAGE, fail, one_line_errors
from kvbits.cli.options import DeviceName, Dtype, DtypeName, Seed, Verbose
from kvbits.errors import PolicyError

if TYPE_CHECKING:
    from kvbits.cli.models import Loaded
    from kvbits.replay.harness import Workload
    from kvbits.replay.run import Outcome

DEFAULT_MODEL = "models/kvbits-tiny"
ALL_SLICES = "all"


class ReplayModeName(StrEnum):
    """Which cache decides what comes next; the values are those of ``replay.harness``."""

    TEACHER = "teacher"
    FREE = "free"


@one_line_errors
def replay(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help="Policy file, FILE.py:CLASS, a plan file of `kvbits tune`, or a built-in name.",
        ),
    ],
    slice_name: Annotated[
        str, typer.Option("--slice", help="Workload to replay; `all` takes every one.")
    ] = ALL_SLICES,
    budget_bits: Annotated[
        int, typer.Option(min=1, max=16, help="Most bits of a cached value.")
    ] = 4,
    model: Annotated[str, typer.Option(help="Model folder, or a Hugging Face id.")] = (
        DEFAULT_MODEL
    ),
    mode: Annotated[
        ReplayModeName,
        typer.Option(help="teacher: the exact cache chooses tokens; free: the policy's does."),
    ] = ReplayModeName.TEACHER,
    packed: Annotated[
        bool, typer.Option(help="Run the decisions on the packed cache too, and compare.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes; results are the same.")] = 1,
    max_examples: Annotated[
        int, typer.Option(min=0, help="First examples only, to try things; 0 takes all.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of trace and metrics.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Append the metrics to this file, a line a slice.")
    ] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    verbose: Verbose = False,
) -> None:
    """Replay a cache policy on small workloads, and print a TEST_METRICS line for each."""
    from kvbits.cli.models import load_model
    from kvbits.evaluation.jsonl import append_json_line
    from kvbits.replay.harness import Workload
    from kvbits.replay.process import PolicyProcess
    from kvbits.replay.run import policy_name, record_of, write_outcome
    from kvbits.replay.slices import SLICES, load_slice

    slices = [load_slice(name) for name in _names(slice_name, list(SLICES))]
    outcomes: list[Outcome] = []
    try:
        PolicyProcess(policy, seed).close()  # a file that does not load should fail at once
        loaded = load_model(model, device, dtype.value)
        for each in slices:
            taken = each._replace(examples=each.examples[: max_examples or None])
            name = Path(model).name if Path(model).is_dir() else model
            workload = Workload(
                loaded.model, loaded.tokenizer, name, taken, policy, budget_bits, mode.value, seed
            )
            load = functools.partial(_load, model, device, dtype.value)
            outcomes.append(_replay(workload, packed, workers, load))
    except PolicyError as error:
        fail(str(error), USAGE)
    folder = output or Path("runs") / "replay" / Path(policy_name(policy)).stem
    for outcome in outcomes:
        write_outcome(outcome, folder)
        if record is not None:
            append_json_line(record, record_of(outcome))
        _print_outcome(outcome)
    if len(outcomes) > 1:
        _print_summary(outcomes)
    typer.echo(f"trace and metrics are in {folder}", err=True)


def _names(name: str, known: list[str]) -> list[str]:
    return known if name == ALL_SLICES else [name]


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, for a process that replays some of the examples."""
    from kvbits.cli.models import load_model

    loaded: Loaded = load_model(model, device, dtype)
    return loaded.model, loaded.tokenizer


def _replay(workload: Workload, packed: bool, workers: int, load: Any) -> Outcome:
    from kvbits.cli.output import progress_bars
    from kvbits.replay.run import replay_slice

    with progress_bars() as bars:
        bar = bars.add_task(workload.slice.name, total=len(workload.slice.examples))
        return replay_slice(
            workload,
            packed=packed,
            num_workers=workers,
            load_model=load,
            progress=lambda: bars.advance(bar),
        )


def _print_outcome(outcome: Outcome) -> None:
    """The lines programs read; what else there is to say goes to stderr."""
    from kvbits.replay.metrics import metrics_line
    from kvbits.replay.run import policy_name

    workload = outcome.workload
    typer.echo(
        f"REPLAY: workload={workload.slice.name} policy={policy_name(workload.policy)} "
        f"model={workload.model_id} mode={workload.mode}"
    )
    typer.echo(metrics_line(outcome.metrics))
    agreement = outcome.agreement
    if agreement is None:
        return
    typer.echo(
        f"packed cache: {agreement.num_agreed} of {agreement.num_steps} choices agree", err=True
    )
    for name, reason in agreement.refused.items():
        typer.echo(f"packed cache: example {name} was left out: {reason}", err=True)


def _print_summary(outcomes: list[Outcome]) -> None:
    from kvbits.cli.output import console, table

    rows = table("slice", "quality", "match", "cache error", "bits", "with scales", "over budget")
    for outcome in outcomes:
        found = outcome.metrics
        rows.add_row(
            outcome.workload.slice.name,
            f"{found['quality_main']:.3f}",
            f"{100 * found['greedy_match_ratio']:.1f} %",
            f"{found['cache_error']:.4f}",
            f"{found['avg_bits_per_kv_token']:.3f}",
            f"{found['avg_bits_with_meta']:.3f}",
            "yes" if found["over_budget"] else "no",
        )
    console().print(rows)


@one_line_errors
def replay_parse(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Output of `kvbits replay`.")],
    verbose: Verbose = False,
) -> None:
    """Print the last TEST_METRICS line of a file as JSON; fail if a field is missing."""
    import json

    from kvbits.replay.metrics import parse_workload

    typer.echo(json.dumps(parse_workload(file.read_text()), indent=2))
