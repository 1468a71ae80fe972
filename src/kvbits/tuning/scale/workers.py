"""Further workers on this host: processes that tune the same study, each on a device of its own.

A helper that dies is started again, a few times; one that cannot live is done without. Helpers end
when the process that started them does, however that ends.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvbits.tuning.calibrated import FOLDER as CALIBRATED
from kvbits.tuning.identity import Data
from kvbits.tuning.settings import TuneSettings

FOLDER = "workers"
MOST_STARTS = 3
STOP_S = 15.0  # to give claims back

Load = Callable[[str], tuple[Any, Any]]
"""Model and tokenizer on a device; a function that a new process can import."""


class Job(NamedTuple):
    """What a helper needs to know.

    Attributes:
        load: Loads the model.
        devices: Of the helpers, one each.
        settings: Of the study.
        threads: Of PyTorch in each helper, None for as many as it likes.
    """

    load: Load
    devices: Sequence[str]
    settings: TuneSettings
    threads: int | None = None


class Place(NamedTuple):
    """Where a study is, and what it is measured on."""

    folder: Path
    address: str
    study: str
    data: Data


class Helpers:
    """The helpers of one process.

    Args:
        job: What they do.
        start_method: Of ``multiprocessing``.
    """

    def __init__(self, job: Job, *, start_method: str = "spawn") -> None:
        self._job = job
        self._context: Any = multiprocessing.get_context(start_method)
        self._starts = [0] * len(job.devices)
        self._processes: dict[int, Any] = {}
        self._place: Place | None = None

    def prepare(self, place: Place) -> None:
        """Say where the study is."""
        self._place = place

    def tend(self) -> None:
        """Start the helpers that are not there."""
        for index, starts in enumerate(self._starts):
            process = self._processes.get(index)
            if starts < MOST_STARTS and (process is None or not process.is_alive()):
                self._start(index)

    def stop(self) -> None:
        """End all helpers; they give back what they have claimed."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
        if self._place:
            shutil.rmtree(self._place.folder / FOLDER, ignore_errors=True)

    def _start(self, index: int) -> None:
        assert self._place is not None, "prepared when the study began"
        fitted = self._place.folder / CALIBRATED
        folder = self._place.folder / FOLDER / str(index + 1)
        if fitted.exists():
            shutil.copytree(fitted, folder / CALIBRATED, dirs_exist_ok=True)
        self._starts[index] += 1
        place = self._place._replace(folder=folder)
        process = self._context.Process(target=_help, args=(self._job, index, place), daemon=True)
        process.start()
        self._processes[index] = process


def _help(job: Job, index: int, place: Place) -> None:
    """Be a helper: tune in a folder of its own, without a word unless something is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = job.devices[index]
    try:
        _tune(job, device, place)
    except KeyboardInterrupt:
        sys.exit(0)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(f"kvbits: worker {index + 2} on {device}: {reason}", file=sys.stderr)
        sys.exit(1)


def _tune(job: Job, device: str, place: Place) -> None:
    import torch

    from kvbits.tuning.scale.shared import Shared
    from kvbits.tuning.study import tune

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # where Triton launches
    model, tokenizer = job.load(device)
    team = Shared(place.address, place.study)
    tune(model, tokenizer, job.settings, place.folder, data=place.data, team=team)


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """End when the parent has: what is measured is on disk, what is not is taken over."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "helpers are started by multiprocessing"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
