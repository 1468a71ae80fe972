"""How the tuner tells a caller where it stands; the command line draws bars with it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about stages and their steps, in order; stages never overlap."""

    def start(self, stage: str, total: int) -> None:
        """A stage of ``total`` steps begins; steps done by an earlier run count as done."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` steps of the current stage are done."""

    def finish(self) -> None:
        """The current stage is done."""


class Silent:
    """Says nothing."""

    def start(self, stage: str, total: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self) -> None: ...
