"""How the command line fails: one line on stderr, exit code 2 for usage and 1 for the rest."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from kvbits.errors import KVBitsError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def fail(message: str, code: int = FAILURE) -> NoReturn:
    """Print one line and leave."""
    line = " ".join(str(message).split()) or "failed without a message"
    typer.echo(f"kvbits: {line}", err=True)
    raise SystemExit(code)


class OneLineGroup(TyperGroup):
    """A command group that reports wrong usage in one line instead of a panel."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; in standalone mode, leave the process with its exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            fail("interrupted", INTERRUPTED)
        except Exception as error:
            # typer brings its own copy of click from 0.17 on, so the class has no stable address.
            if not hasattr(error, "format_message"):
                raise
            _usage(error)
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> NoReturn:
    """Report a usage error with where to read on; bare ``kvbits`` has printed its help already."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        raise SystemExit(USAGE)
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    fail(message.rstrip(".") + hint, getattr(error, "exit_code", USAGE))


def one_line_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a command whose keyword ``verbose`` decides between one line and a traceback."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except (KVBitsError, ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            if kwargs.get("verbose"):
                traceback.print_exc()
            fail(_reason(error))
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)

    return run


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Take the signal by which batch systems end a job as an interrupt: it ends cleanly."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(error: BaseException) -> str:
    """Return the first paragraph of a message; libraries append pages of advice."""
    if hasattr(error, "errors"):  # pydantic: one entry per field, the first says enough
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    text = str(error).strip().split("\n\n")[0]
    is_ours = isinstance(error, KVBitsError | ValueError)
    return text if is_ours and text else f"{type(error).__name__}: {text}"
