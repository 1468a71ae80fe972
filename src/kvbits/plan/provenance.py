"""Where a plan came from and what was measured on it; kept in the plan file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Dataset(BaseModel):
    """A set of token sequences that was used to make or to measure a plan.

    Args:
        name: What the set is called.
        checksum: Hex SHA-256 of its content, so that another set of that name is told apart.
        split: ``calibration`` or ``heldout``.
        domain: Such as ``text``, ``reasoning`` or ``recall``.
        num_documents: Sequences in it.
        num_tokens: Tokens in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    checksum: str = Field(min_length=1)
    split: str | None = None
    domain: str | None = None
    num_documents: int | None = Field(default=None, ge=0)
    num_tokens: int | None = Field(default=None, ge=0)


class Provenance(BaseModel):
    """How a plan was made.

    Args:
        method: What chose the widths, such as ``uniform``, ``exact`` or ``kvtuner``.
        mode: ``per_token`` or ``kivi`` where one mode was used throughout.
        datasets: Calibration data with checksums.
        seed: Seed of the run.
        versions: Library name to version.
        created: ISO 8601 time, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str = Field(min_length=1)
    mode: str | None = None
    datasets: tuple[Dataset, ...] = ()
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    created: str | None = None


class Metric(BaseModel):
    """One number measured with the plan.

    Args:
        name: What was measured, with its unit, such as ``kl_nats``.
        value: The number.
        standard_error: Its standard error, in the same unit.
        dataset: Data it was measured on.
        num_samples: Independent samples behind it (documents or problems).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    value: float
    standard_error: float | None = Field(default=None, ge=0)
    dataset: Dataset | None = None
    num_samples: int | None = Field(default=None, ge=1)
