"""Several processes and hosts that work on one study.

    from kvbits.tuning import scale, tune

    team = scale.team(load, settings, ["cuda:0", "cuda:1"], storage="sqlite:study.db")
    tune(*load("cuda:0"), settings, "runs/shared", team=team)

Workers are new processes that import the calling module again, so this stands under
``if __name__ == "__main__":``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvbits.tuning.scale.shared import STUDY, Shared
from kvbits.tuning.scale.workers import Helpers, Job, Load
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.team import Alone, Team

__all__ = ["STUDY", "Helpers", "Job", "Load", "Shared", "team", "threads_of"]


def team(
    load: Load,
    settings: TuneSettings,
    devices: Sequence[str],
    *,
    storage: str | None = None,
    study: str = STUDY,
) -> Team:
    """Return a team of one worker per device; the first is the calling process.

    Args:
        load: Loads model and tokenizer on a device, in the other workers.
        settings: Of the study.
        devices: One per worker; a device may be named more than once.
        storage: Shared with other hosts: ``journal:PATH``, ``sqlite:PATH`` or
            ``postgresql://...``. By default workers of this host share a journal in the run
            directory.
        study: Name of the study in the storage.

    Raises:
        ValueError: ``storage`` has another form, or there is no device.
        ImportError: Optuna or a database driver is missing.
    """
    if not devices:
        raise ValueError("devices must name one per worker, got none")
    if len(devices) == 1 and storage is None:
        return Alone()
    job = Job(load, devices[1:], settings, threads_of(devices))
    return Shared(storage, study, helpers=Helpers(job) if job.devices else None)


def threads_of(devices: Sequence[str]) -> int | None:
    """Return how many threads each worker on the CPU should take; None leaves it to PyTorch."""
    workers = sum(not device.startswith("cuda") for device in devices)
    if workers < 2 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // workers)
