"""Options of commands whose work several processes and hosts share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvbits.cli.failures import interrupted_by_sigterm

Workers = Annotated[
    int, typer.Option(min=1, help="Processes that measure on this host, one a GPU.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Shared with other hosts: journal:PATH, sqlite:PATH or postgresql://..; start the "
        "same command on each.",
    ),
]
Study = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name in the storage; default: kvbits.")
]
Parallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Trials that moead, nsga2 and tpe propose before the first of them is known; "
        "default: 1, or their population with several workers.",
    ),
]


class Sharing(NamedTuple):
    """Who else measures for a study."""

    workers: int
    storage: str | None
    study: str | None

    @classmethod
    def of(cls, workers: int, storage: str | None, study: str | None) -> Sharing:
        """Check options against one another.

        Raises:
            ValueError: A study is named without a storage.
        """
        if study is not None and storage is None:
            raise ValueError(f"--study must be given with --storage, got {study!r} alone")
        return cls(workers, storage, study)

    @property
    def is_shared(self) -> bool:
        """Whether anyone does."""
        return self.workers > 1 or self.storage is not None


def tune_shared(
    name: str, run_dir: Path, device: str, dtype: str, settings: Any, sharing: Sharing
) -> None:
    """Tune with workers of this host and of others."""
    import torch

    from kvbits.cli.models import devices_of, load_pair
    from kvbits.cli.output import StageBars
    from kvbits.tuning import scale, study

    load = functools.partial(load_pair, name=name, dtype=dtype)
    devices = devices_of(sharing.workers, device)
    known_as = sharing.study or scale.STUDY
    team = scale.team(load, settings, devices, storage=sharing.storage, study=known_as)
    torch.set_num_threads(scale.threads_of(devices) or torch.get_num_threads())
    with interrupted_by_sigterm():
        model, tokenizer = load(devices[0])
        with StageBars() as progress:
            study.tune(model, tokenizer, settings, run_dir, progress, team=team)


def with_parallel(settings: Any, run_dir: Path, default: int) -> Any:
    """Fill in ``parallel``, which a study that goes on keeps with any number of workers."""
    from kvbits.tuning.rundir import RunDir
    from kvbits.tuning.settings import LEARNING

    if settings.strategy not in LEARNING or "parallel" in settings.model_fields_set:
        return settings
    stored = RunDir(run_dir).read_json("study.json") if run_dir.is_dir() else None
    parallel = (stored or {}).get("settings", {}).get("parallel", default)
    return type(settings)(**{**settings.model_dump(exclude_unset=True), "parallel": parallel})
