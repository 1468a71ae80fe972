"""Measurement records: one JSON line each, with everything needed to repeat and to judge it."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvbits._version import __version__
from kvbits.codecs.base import Width
from kvbits.errors import PlanError
from kvbits.evaluation.jsonl import append_json_line, parse, read_json_lines
from kvbits.evaluation.token_set import TokenSet

if TYPE_CHECKING:
    from kvbits.evaluation.accuracy import Accuracy
    from kvbits.evaluation.divergence import Divergence
    from kvbits.evaluation.perplexity import Perplexity
    from kvbits.plan import CachePlan

Kind = Literal["divergence", "perplexity", "accuracy"]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class PlanSummary(_Strict):
    """What a record says about the plan it measured.

    Args:
        description: one line for people.
        pairs: (key bits, value bits) of every layer; None where heads of a layer differ.
        mode: ``per_token`` or ``kivi`` where one mode was used throughout.
        method: what chose the widths.
    """

    description: str
    pairs: tuple[tuple[Width, Width], ...] | None = None
    mode: str | None = None
    method: str | None = None


class Record(_Strict):
    """One measurement.

    Args:
        kind: what was measured; ``value`` is the KL in nats, the perplexity or the accuracy.
        model: name of the model.
        plan: the plan; None at full precision.
        effective_bits: stored bits per value of the plan, metadata included; None without a plan.
        data: name of the token set or task.
        domain: domain of a token set.
        split: split of the data.
        checksum: SHA-256 of the token ids of a set.
        seed: seed of generated data.
        n: independent samples: documents or problems.
        num_tokens: predictions that counted.
        value: the number.
        standard_error: its standard error, in the same unit; None where it cannot be had.
        metrics: further numbers of the same measurement.
        seconds: wall time.
        cache_bytes: bytes of the cache of one batch, at most.
        versions: library name to version, and the device.
        created: ISO 8601 time, UTC.
    """

    schema_version: Literal[1] = 1
    kind: Kind
    model: str | None = None
    plan: PlanSummary | None = None
    effective_bits: float | None = Field(default=None, gt=0)
    data: str = Field(min_length=1)
    domain: str | None = None
    split: str
    checksum: str | None = None
    seed: int | None = None
    n: int = Field(ge=1)
    num_tokens: int | None = Field(default=None, ge=1)
    value: float
    standard_error: float | None = Field(default=None, ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = Field(ge=0)
    cache_bytes: int = Field(ge=0)
    versions: dict[str, str]
    created: str


def append_record(path: str | Path, record: Record) -> None:
    """Append a record to a file as one line, whole or not at all."""
    append_json_line(path, record.model_dump(mode="json"))


def read_records(path: str | Path) -> list[Record]:
    """Read all records of a file; a torn last line is dropped with a warning.

    Raises:
        RecordError: a line is not a record.
    """
    return [
        parse(Record, value, f"{path} record {i}:")
        for i, value in enumerate(read_json_lines(path), start=1)
    ]


def divergence_record(
    result: Divergence, token_set: TokenSet, plan: CachePlan | None, model: Any
) -> Record:
    """Make the record of a divergence."""
    names = ("top1_agreement", "flips", "perplexity", "perplexity_reference")
    return Record(
        kind="divergence",
        **_of_set(token_set),
        **_of_run(model, plan),
        n=result.num_documents,
        num_tokens=result.num_tokens,
        value=result.kl_nats,
        standard_error=_finite(result.kl_se),
        metrics={name: getattr(result, name) for name in names},
        seconds=result.seconds,
        cache_bytes=result.cache_bytes,
    )


def perplexity_record(
    result: Perplexity, token_set: TokenSet, plan: CachePlan | None, model: Any
) -> Record:
    """Make the record of a perplexity; its standard error follows from that of the mean loss."""
    error = _finite(result.nll_se)
    return Record(
        kind="perplexity",
        **_of_set(token_set),
        **_of_run(model, plan),
        n=result.num_documents,
        num_tokens=result.num_tokens,
        value=result.perplexity,
        standard_error=None if error is None else result.perplexity * error,
        metrics={"nll_nats": result.nll_nats},
        seconds=result.seconds,
        cache_bytes=result.cache_bytes,
    )


def accuracy_record(
    result: Accuracy, plan: CachePlan | None, model: Any, *, seed: int, split: str
) -> Record:
    """Make the record of a task's accuracy."""
    return Record(
        kind="accuracy",
        **_of_run(model, plan),
        data=result.task,
        split=split,
        seed=seed,
        n=result.n,
        value=result.accuracy,
        standard_error=result.standard_error,
        seconds=result.seconds,
        cache_bytes=result.cache_bytes,
    )


def plan_summary(plan: CachePlan) -> PlanSummary:
    """Return what a record keeps of a plan."""
    try:
        pairs = tuple(plan.pairs)
    except PlanError:  # heads of one layer differ
        pairs = None
    made = plan.provenance
    return PlanSummary(
        description=plan.describe(),
        pairs=pairs,
        mode=made.mode if made else None,
        method=made.method if made else None,
    )


def library_versions() -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"kvbits": __version__, "python": platform.python_version(), **found}


def _of_set(token_set: TokenSet) -> dict[str, Any]:
    return {
        "data": token_set.name,
        "domain": token_set.domain,
        "split": token_set.split,
        "checksum": token_set.checksum,
    }


def _of_run(model: Any, plan: CachePlan | None) -> dict[str, Any]:
    """Return the fields that every kind shares; of a local model only the folder's name."""
    name = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rsplit("/", 1)[-1]
    device = {"device": str(model.device.type), "dtype": str(model.dtype).removeprefix("torch.")}
    return {
        "model": name or None,
        "plan": None if plan is None else plan_summary(plan),
        "effective_bits": None if plan is None else plan.effective_bits,
        "versions": library_versions() | device,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
