"""Arguments and options that several commands share; their help text stands here only."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Mode(StrEnum):
    """Where scales are shared; the values are those of ``kvbits.plan.MODES``."""

    PER_TOKEN = "per_token"
    KIVI = "kivi"


class Dtype(StrEnum):
    """Number format of the model while it runs."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Impl(StrEnum):
    """What runs attention over packed states; the values are those of ``attention.api.IMPLS``."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    COMPILED = "compiled"


ImplName = Annotated[
    Impl, typer.Option(help="auto: kernels on a GPU; compiled: torch.compile, for CPUs.")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, or a Hugging Face id.")
]
PlanPath = Annotated[Path | None, typer.Option("--plan", help="Plan file from `kvbits tune`.")]
DeviceName = Annotated[
    str,
    typer.Option(
        help="Where the model runs: cpu, cuda:1; auto: a GPU if any; sharded: all of them."
    ),
]
DtypeName = Annotated[
    Dtype, typer.Option(help="auto: float32 on the CPU, the checkpoint's own on a GPU.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Read a number of bytes: 24GB is decimal, 24GiB binary.

    Raises:
        typer.BadParameter: the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"must be a size such as 24GB or 800MiB, got {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2].lower()])


Memory = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Memory for the cache alone, such as 24GB."
    ),
]
