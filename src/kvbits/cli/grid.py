"""``kvbits grid``: heat maps of what was recalled, by length and depth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import Verbose

if TYPE_CHECKING:
    from kvbits.report.grid import Grid


@one_line_errors
def grid(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders `kvbits score` wrote.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Page to write, complete in itself.")
    ] = Path("grid.html"),
    verbose: Verbose = False,
) -> None:
    """Draw the passkey and needle grids of one or several runs on one page, and print them."""
    from kvbits.report.grid import read_grids, write_page

    found = [each for run in runs for each in read_grids(run)]
    print_grids(found)
    typer.echo(str(write_page(found, output)))


def show(results: dict[str, Any], output: Path | None) -> bool:
    """Print the grids in results and write their page beside them; False if there are none."""
    from kvbits.report.grid import grids_of, write_page

    found = grids_of(results)
    print_grids(found)
    if found and output is not None:
        write_page(found, output / f"{results['settings']['benchmark']}.html")
    return bool(found)


def print_grids(grids: Iterable[Grid]) -> None:
    """Print every grid as a table, a row a depth."""
    from kvbits.cli.output import console
    from kvbits.cli.output import table as new_table
    from kvbits.report.grid import table

    for each in grids:
        text = table(each)
        rows = new_table(*text.header)
        for row in text.rows:
            rows.add_row(*row)
        console().print(text.caption)
        console().print(rows)
