"""Tables, sizes and progress bars in one look."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def console() -> Console:
    """Return a console on the present stdout; redirected output is not wrapped at 80 columns.

    Text is printed as it is: names such as ``kvbits[hqq]`` are no markup.
    """
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, soft_wrap=False, highlight=False, markup=False)


def table(*columns: str) -> Table:
    """Return an empty table; all but the first column are flush right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right")
    return made


def as_rich(shown: Any) -> Table:
    """Return a table of a report as one for the console; chosen rows are bold and starred."""
    made = table(*shown.header)
    mark = bool(shown.highlighted)
    for index, (name, *cells) in enumerate(shown.rows):
        is_chosen = index in shown.highlighted
        name = f"{'*' if is_chosen else ' '} {name}" if mark else name
        made.add_row(name, *cells, style="bold" if is_chosen else "")
    return made


def size(num_bytes: float) -> str:
    """Write bytes in decimal units: 2.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def progress_bars() -> Progress:
    """Return progress bars on stderr, so that stdout can be piped."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


class StageBars:
    """Draws the stages of the tuner as progress bars; use as a context manager."""

    def __init__(self) -> None:
        self._bars = progress_bars()
        self._task: Any = None

    def __enter__(self) -> StageBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """A stage begins."""
        self._task = self._bars.add_task(stage, total=total)

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage are done."""
        self._bars.advance(self._task, steps)

    def finish(self) -> None:
        """The current stage is done."""
        task = next(task for task in self._bars.tasks if task.id == self._task)
        self._bars.update(self._task, completed=task.total)


def command_line() -> str | None:
    """Return the command as it was typed, quoted for a shell; None where it was not ``kvbits``."""
    name = Path(sys.argv[0]).stem
    return shlex.join([name, *sys.argv[1:]]) if name == "kvbits" else None
