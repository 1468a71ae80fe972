"""Who measures: this process alone, or several that share what they measure.

Every stage of a study is a set of steps that do not depend on one another, each with a record as
its result. A stage hands its steps to a team and takes their records in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:  # what settings import may use a team, and identity imports settings
    from kvbits.tuning.identity import Data
    from kvbits.tuning.rundir import RunDir

Record: TypeAlias = Mapping[str, Any]
Step = TypeVar("Step", bound=Hashable)


class Kind(NamedTuple):
    """One kind of measurement.

    Attributes:
        name: Unique in a study.
        objectives: Fields of its records that are to be small, for tools that read the storage.
    """

    name: str
    objectives: tuple[str, ...] = ()


class Team(Protocol):
    """Measures steps, each once."""

    def join(
        self, identity: Mapping[str, Any], run: RunDir, data: Data
    ) -> AbstractContextManager[None]:
        """Work on a study, whose identity all of the team must share."""

    def measure(
        self,
        kind: Kind,
        steps: Iterable[Step],
        one: Callable[[Step], Record],
        known: Mapping[Step, Record],
    ) -> Iterator[tuple[Step, Record]]:
        """Yield the records of all steps that are not known, as they come.

        Args:
            kind: Of the steps.
            steps: Values that JSON can hold; equal ones are one step.
            one: Measures a step in this process.
            known: Records that this process has.
        """


class Alone:
    """Measures everything in this process, in order."""

    def join(
        self, identity: Mapping[str, Any], run: RunDir, data: Data
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(
        self,
        kind: Kind,
        steps: Iterable[Step],
        one: Callable[[Step], Record],
        known: Mapping[Step, Record],
    ) -> Iterator[tuple[Step, Record]]:
        for step in dict.fromkeys(steps):
            if step not in known:
                yield step, one(step)
