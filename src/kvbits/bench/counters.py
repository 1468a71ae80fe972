"""Hardware counters of kernels, read by Nsight Compute: why a kernel takes the time it takes.

The profiler starts this module as a program of its own, which launches every kernel once between
marks; each record then says how full memory, the schedulers and the arithmetic units were, and
what a warp waited for. Counters are read over several replays of one launch with cold caches, so
their time is a little more than that of ``kvbits bench kernels``.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvbits.bench.kernels import Cell, random_query, random_states

SHAPE = (8, 32768)
KERNELS: list[tuple[str, Cell]] = [
    *(
        ("attention", Cell(*SHAPE, *pair))
        for pair in ((8, 8), (8, 4), (4, 4), (4, 2), (3, 3), (2, 2))
    ),
    ("attention", Cell(*SHAPE, 4, 4, key_group=128)),
    ("attention", Cell(*SHAPE, 2, 2, key_group=128)),
    ("attention", Cell(*SHAPE, 4, 4, key_group=32, value_groups=4)),
    *(
        ("attention", Cell(*SHAPE, 4, 4, method=method))
        for method in ("turboquant", "nuq", "kvquant")
    ),
    ("append", Cell(64, 1024, 4, 4)),
    *(("prompt", Cell(64, 8192, bits, bits)) for bits in (8, 4)),
    ("prompt", Cell(64, 8192, 4, 4, key_group=128)),
]

_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "wait",
    "math_pipe_throttle",
    "mio_throttle",
    "lg_throttle",
    "not_selected",
    "dispatch_stall",
    "no_instruction",
    "barrier",
)
METRICS = {
    "time_us": ("gpu__time_duration.sum", 1e-3),
    "memory_read_bytes": ("dram__bytes_read.sum", 1.0),
    "memory_share": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 0.01),
    "issue_share": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 0.01),
    "busy_share": ("smsp__cycles_active.avg.pct_of_peak_sustained_elapsed", 0.01),
    "warps": ("smsp__warps_active.avg.per_cycle_active", 1.0),
    "instructions": ("smsp__inst_executed.sum", 1.0),
    "alu_share": ("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", 0.01),
    "fma_share": ("sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active", 0.01),
    "tensor_share": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 0.01),
    "registers": ("launch__registers_per_thread", 1.0),
}
"""Fields of a record, and the counter and factor behind each; shares are of the peak."""


def run_marked() -> None:
    """Launch every kernel once where a profiler counts, after a launch where it does not."""
    for suite, cell in KERNELS:
        call = _call(suite, cell)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _call(suite: str, cell: Cell) -> Callable[[], object]:
    """A call that launches one kernel of interest."""
    from kvbits.attention.triton.decode import attend
    from kvbits.bench.encoding import append_call, prompt_call

    if suite == "append":
        return append_call(cell, is_flush=True)
    if suite == "prompt":
        return prompt_call(cell, "key")
    states, query = random_states(cell), random_query(cell)
    return lambda: attend(query, states, cell.head_dim**-0.5)


def measure() -> Iterator[dict[str, Any]]:
    """One record per kernel.

    Raises:
        RuntimeError: There is no ``ncu`` on the path, or it failed.
    """
    rows = read_rows(_profile())
    if len(rows) != len(KERNELS):
        raise RuntimeError(f"ncu must report {len(KERNELS)} kernels, got {len(rows)}")
    for (suite, cell), row in zip(KERNELS, rows, strict=True):
        yield {
            "suite": suite,
            "name": cell.name,
            "cell": cell._asdict(),
            "kernel": row["Kernel Name"],
            **counters_of(row),
        }


def _profile() -> str:
    if shutil.which("ncu") is None:
        raise RuntimeError("kvbits bench counters needs Nsight Compute, found no ncu on the path")
    names = [*(name for name, _ in METRICS.values()), *map(_STALL.format, STALLS)]
    command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off"]
    command += ["--clock-control", "none", "--metrics", ",".join(names)]
    command += ["--kernel-name", "regex:^(attend_|append_step|encode_)"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "kvbits.bench.counters"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"ncu must end well, got {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def read_rows(text: str) -> list[dict[str, str]]:
    """Kernels of ncu's table of raw values, whose first line is of units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(lines[begin:]))[1:]


def counters_of(row: dict[str, str]) -> dict[str, Any]:
    """Fields of a record from the counters of one kernel; ``stalls``: warps waiting per issue."""
    found: dict[str, Any] = {}
    for field, (name, factor) in METRICS.items():
        found[field] = _rounded(_number(row[name]) * factor)
    waits = {name: _number(row[_STALL.format(name)]) for name in STALLS}
    largest = sorted(waits, key=lambda name: -waits[name])
    found["stalls"] = {name: round(waits[name], 2) for name in largest if waits[name] >= 0.05}
    return found


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _rounded(value: float) -> float:
    return round(value, 3) if value < 1000 else round(value)


if __name__ == "__main__":
    run_marked()
