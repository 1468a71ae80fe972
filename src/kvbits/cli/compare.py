"""``kvbits compare``: several runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import Verbose


@one_line_errors
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Folders `kvbits tune` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path(
        "compare.html"
    ),
    verbose: Verbose = False,
) -> None:
    """Put finished runs of one model on one page: fronts, plans, verified numbers, provenance."""
    from kvbits.cli.output import as_rich, console
    from kvbits.report.runs import collect_runs
    from kvbits.report.runs_page import chosen, write_comparison

    page = write_comparison(runs, output)
    console().print(as_rich(chosen(collect_runs(runs))))
    typer.echo(str(page))
