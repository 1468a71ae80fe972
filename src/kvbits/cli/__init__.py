"""The ``kvbits`` command; one file per subcommand.

Nothing here imports torch, transformers or the rest of kvbits: each command loads what it needs
when it runs, so that ``kvbits --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvbits._version import __version__
from kvbits.cli import bench
from kvbits.cli.compare import compare
from kvbits.cli.evaluate import evaluate
from kvbits.cli.export import export
from kvbits.cli.failures import OneLineGroup
from kvbits.cli.generate import generate
from kvbits.cli.grid import grid
from kvbits.cli.harness import compare_evals, eval_
from kvbits.cli.inspect import inspect
from kvbits.cli.methods import calibrate, methods
from kvbits.cli.replay import replay, replay_parse
from kvbits.cli.report import report
from kvbits.cli.score import score
from kvbits.cli.tune import tune

app = typer.Typer(
    cls=OneLineGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find how few bits each layer of a KV cache needs, and run the model on that cache.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"kvbits {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


for command in (inspect, methods, calibrate, tune, generate, evaluate, replay, report, export):
    app.command()(command)
app.command()(compare)
app.command("eval")(eval_)
app.command()(compare_evals)
app.command()(grid)
app.command()(score)
app.command("replay-parse")(replay_parse)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; the entry point ``kvbits``."""
    # OpenMP threads that wait by spinning take the core from the one they wait for: on two cores
    # shared with other programs, generating was many times slower. OpenMP reads it as torch loads.
    # Benchmarks measure what a program that uses the library gets, which waits as OpenMP likes.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="kvbits")
