"""Records of replays as tables: what each policy costs, what it keeps, and what nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvbits.evaluation.jsonl import read_json_lines

HEADER = (
    "policy", "bits", "with scales", "bits at 4096", "quality", "match", "cache error",
    "packed cache agrees",
)  # fmt: skip


class Row(NamedTuple):
    """One policy on one workload."""

    policy: str
    bits: float
    bits_with_meta: float
    reference_bits: float
    quality: float
    match: float
    error: float
    is_over_budget: bool
    agreement: str


def markdown_tables(path: str | Path) -> str:
    """One table for each workload of a file of records, policies by their bits; the last record of
    a policy counts.

    Bold: no other policy has as few bits and as much quality (policies over the budget are left
    out of this).
    """
    records = read_json_lines(path)
    workloads = list(dict.fromkeys(record["workload"] for record in records))
    tables = []
    for workload in workloads:
        rows = {each["policy"]: _row(each) for each in records if each["workload"] == workload}
        tables.append(_table(workload, list(rows.values())))
    return "\n\n".join(tables)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows within the budget that no other one beats."""
    ranked = [row for row in rows if not row.is_over_budget]
    return [row for row in ranked if not any(beats(other, row) for other in ranked)]


def beats(one: Row, other: Row) -> bool:
    """Whether ``one`` has no more bits and no less quality, and not both the same."""
    is_as_good = one.bits <= other.bits and one.quality >= other.quality
    return is_as_good and (one.bits, one.quality) != (other.bits, other.quality)


def _row(record: dict[str, Any]) -> Row:
    found = record["metrics"]
    return Row(
        policy=record["policy"],
        bits=found["avg_bits_per_kv_token"],
        bits_with_meta=found["avg_bits_with_meta"],
        reference_bits=found["ref_bits_4096"],
        quality=found["quality_main"],
        match=found["greedy_match_ratio"],
        error=found["cache_error"],
        is_over_budget=bool(found["over_budget"]),
        agreement=_agreement(record["packed"]),
    )


def _agreement(packed: dict[str, Any] | None) -> str:
    if packed is None:
        return "not run"
    if not packed["num_steps"]:
        return "no plan says it"
    return f"{packed['num_agreed']} of {packed['num_steps']}"


def _table(workload: str, rows: Sequence[Row]) -> str:
    best = {row.policy for row in pareto(rows)}
    lines = [f"`{workload}`", "", _line(HEADER), _line(["---"] * len(HEADER))]
    for row in sorted(rows, key=lambda each: each.bits):
        name = f"**{row.policy}**" if row.policy in best else row.policy
        lines.append(
            _line(
                [
                    f"{name} (over budget)" if row.is_over_budget else name,
                    f"{row.bits:.2f}",
                    f"{row.bits_with_meta:.2f}",
                    f"{row.reference_bits:.2f}",
                    f"{row.quality:.2f}",
                    f"{100 * row.match:.1f} %",
                    f"{row.error:.4f}",
                    row.agreement,
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
