"""The lines of a run's stage files as plain tuples: sensitivities, errors, trials, measurements.

Parsers raise ``KeyError``, ``TypeError`` or ``ValueError``; ``collect`` adds file and line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """A mean and its standard error; nan where one document cannot give one."""

    value: float
    standard_error: float


class Sensitivity(NamedTuple):
    """Forward KL with one side of one layer in one codec, everything else exact."""

    layer: int
    side: str
    bits: float
    label: str
    domain: str
    kl_nats: float
    kl_standard_error: float | None


class PairError(NamedTuple):
    """Relative error of one layer's attention output when it is stored as one candidate.

    ``row`` names the layer: ``3``, or of one head ``3.1``.
    """

    row: str
    label: str
    output_error: float


class Pruned(NamedTuple):
    """What pruning kept of every row, and which rows the search treats as one.

    A row is a layer, ``3``, or one head of it, ``3.1``.
    """

    kept: Mapping[str, tuple[str, ...]]
    groups: tuple[tuple[str, ...], ...]


class Trial(NamedTuple):
    """A plan the search measured on calibration data; ``kl_nats`` in the order of the domains."""

    stage: str
    labels: tuple[str, ...]
    effective_bits: float
    kl_nats: tuple[float, ...]
    loss: float
    predicted_loss: float


class Position(NamedTuple):
    """Forward KL of predictions with ``start`` to ``stop - 1`` tokens in front of them."""

    start: int
    stop: int
    kl: Measurement
    num_tokens: int


class Verified(NamedTuple):
    """One plan on one held-out domain.

    ``excess`` is its loss minus that of full precision in nats, paired; None in older records.
    """

    labels: tuple[str, ...]
    domain: str
    checksum: str
    n: int
    num_tokens: int
    kl: Measurement
    excess: Measurement | None
    perplexity: tuple[float, float] | None
    top1_agreement: float | None
    document_kl: tuple[float, ...]
    document_tokens: tuple[int, ...]
    positions: tuple[Position, ...]


class Memory(NamedTuple):
    """What the chosen plan's cache takes at one context length, beside a 16-bit one."""

    context: int
    bytes: int
    bytes_16bit: int
    effective_bits: float


def width(value: Any) -> float:
    """A width as it is written: 4, but 1.5."""
    return int(value) if float(value).is_integer() else float(value)


def measurement(value: Any, error: Any) -> Measurement:
    """A mean with its error, which may be None."""
    return Measurement(float(value), math.nan if error is None else float(error))


def parse_sensitivity(item: Mapping[str, Any]) -> Sensitivity:
    """One line of ``sensitivity.jsonl``."""
    error = item.get("kl_se")
    return Sensitivity(
        layer=int(str(item["layer"]).partition(".")[0]),  # 3.1 is head 1 of layer 3
        side=str(item["side"]),
        bits=width(item["bits"]),
        label=str(item["label"]),
        domain=str(item["domain"]),
        kl_nats=float(item["kl_nats"]),
        kl_standard_error=None if error is None else float(error),
    )


def of_layers(rows: tuple[Sensitivity, ...]) -> tuple[Sensitivity, ...]:
    """Sum what heads of one layer cost: isolated KLs add up, and so do their squared errors."""
    found: dict[tuple[str, int, str], Sensitivity] = {}
    for row in rows:
        key = (row.domain, row.layer, row.label)
        before = found.get(key)
        if before is None:
            found[key] = row
            continue
        errors = (before.kl_standard_error, row.kl_standard_error)
        found[key] = row._replace(
            kl_nats=before.kl_nats + row.kl_nats,
            kl_standard_error=None if None in errors else math.hypot(*filter(None, errors)),
        )
    return tuple(found.values())


def parse_error(item: Mapping[str, Any]) -> PairError:
    """One line of ``errors.jsonl``."""
    return PairError(str(item["layer"]), str(item["label"]), float(item["e_o"]))


def parse_pruned(document: Mapping[str, Any]) -> Pruned | None:
    """The document ``pruned.json``; None of an empty one."""
    if not document:
        return None
    kept = {str(k): tuple(map(str, labels)) for k, labels in document["candidates"].items()}
    return Pruned(kept, tuple(tuple(map(str, group)) for group in document["groups"]))


def parse_trial(item: Mapping[str, Any]) -> Trial:
    """One line of ``search.jsonl``."""
    return Trial(
        stage=str(item["stage"]),
        labels=tuple(map(str, item["labels"])),
        effective_bits=float(item["effective_bits"]),
        kl_nats=tuple(map(float, item["kl_nats"])),
        loss=float(item["loss"]),
        predicted_loss=float(item["predicted_loss"]),
    )


def parse_verified(item: Mapping[str, Any]) -> Verified | None:
    """One line of ``verify.jsonl``; None of a task."""
    if item.get("kind") != "kl":
        return None
    has_excess = item.get("excess_nll") is not None
    has_perplexity = item.get("perplexity_reference") is not None
    return Verified(
        labels=tuple(map(str, item["labels"])),
        domain=str(item["domain"]),
        checksum=str(item["checksum"]),
        n=int(item["n"]),
        num_tokens=int(item["num_tokens"]),
        kl=measurement(item["kl_nats"], item["kl_se"]),
        excess=measurement(item["excess_nll"], item.get("excess_nll_se")) if has_excess else None,
        perplexity=(float(item["perplexity"]), float(item["perplexity_reference"]))
        if has_perplexity
        else None,
        top1_agreement=item.get("top1_agreement"),
        document_kl=tuple(map(float, item["document_kl_nats"])),
        document_tokens=tuple(map(int, item["document_tokens"])),
        positions=tuple(map(_parse_position, item.get("positions", ()))),
    )


def _parse_position(item: Mapping[str, Any]) -> Position:
    kl = measurement(item["kl_nats"], item["kl_se"])
    return Position(int(item["start"]), int(item["stop"]), kl, int(item["num_tokens"]))


def parse_memory(item: Mapping[str, Any]) -> Memory:
    """One length of the memory curve in ``front.json``."""
    return Memory(
        int(item["context"]),
        int(item["bytes"]),
        int(item["bytes_16bit"]),
        float(item["effective_bits"]),
    )
