"""``kvbits export``: a plan as flags or files of a serving engine, and what that loses."""

from __future__ import annotations

import json
import shlex
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import AsJson, Verbose

if TYPE_CHECKING:
    from kvbits.export import Export, LayerChange


@one_line_errors
def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, such as plan.json.")],
    to: Annotated[
        str,
        typer.Option(
            help="vllm, tensorrt-llm, sglang, modelopt, lmdeploy, llama.cpp, transformers or "
            "kvtuner."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for files; default: print them.")
    ] = None,
    allow_narrower: Annotated[
        bool, typer.Option(help="Take the nearest widths, even below the plan's.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a plan for a serving engine, in the nearest formats it has; say what is lost."""
    from kvbits.export import export_plan
    from kvbits.plan import CachePlan

    made = export_plan(CachePlan.load(plan), to, allow_narrower=allow_narrower)
    if output is not None:
        _write(made, output)
    if as_json:
        typer.echo(json.dumps(_as_json(made), indent=2))
        return
    _print_layers(made)
    for name, text in made.settings.files.items():
        place = f"written to {output / name}" if output is not None else f"{name}:\n{text}"
        typer.echo(place.rstrip())
    if made.settings.arguments:
        typer.echo(f"arguments: {shlex.join(made.settings.arguments)}")


def _write(made: Export, folder: Path) -> None:
    from kvbits.plan.files import write_text

    for name, text in made.settings.files.items():
        write_text(folder / name, text)


def _as_json(made: Export) -> dict[str, object]:
    return {
        "engine": made.engine,
        "arguments": list(made.settings.arguments),
        "files": dict(made.settings.files),
        "layers": [layer._asdict() for layer in made.layers],
        "plan_bits": made.plan_bits,
        "engine_bits": made.engine_bits,
        "losses": list(made.losses),
        "notes": list(made.notes),
    }


def _print_layers(made: Export) -> None:
    from kvbits.cli.output import console, table
    from kvbits.plan.summary import ranges

    rows = table("layers", "plan", made.engine, "bits", "there", "what changes")
    for column in (*rows.columns[:3], rows.columns[5]):
        column.justify = "left"

    def but_layer(row: LayerChange) -> tuple[object, ...]:
        return row[1:]

    for _, same in groupby(made.layers, but_layer):
        run = list(same)
        first, indices = run[0], ranges([row.layer for row in run])
        bits = f"{first.plan_bits:.2f}", f"{first.engine_bits:.2f}"
        changes = "; ".join(first.changes) or "nothing"
        rows.add_row(indices, first.wanted, first.format, *bits, changes)
    console().print(rows)
    typer.echo(f"effective bits: {made.plan_bits:.2f} in the plan, {made.engine_bits:.2f} there")
    for loss in made.losses:
        typer.echo(f"lost: {loss}")
    for note in made.notes:
        typer.echo(f"note: {note}")
