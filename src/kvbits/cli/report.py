"""``kvbits report``: write the page of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import Verbose


@one_line_errors
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder `kvbits tune` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write; default RUN/report.html.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write the report page of a run from its records; the model is not needed."""
    from kvbits.report.page import write_page

    typer.echo(str(write_page(run_dir, output)))
