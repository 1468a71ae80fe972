"""What the chosen plan costs: "worse than full precision by x ± y", in a sentence and a table."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.evaluation.statistics import Z95
from kvbits.report import numbers
from kvbits.report.collect import Point, Run, TaskResult
from kvbits.report.tables import Table


def sentences(run: Run) -> list[str]:
    """Say how much worse than full precision the chosen plan is on held-out data.

    Returns:
        One sentence about divergence and one about tasks; nothing before the plan was measured.
    """
    point = run.chosen
    if point is None:
        return []
    parts = [
        f"{numbers.with_error(*measured)} on {domain}"
        for domain, measured in point.measured_kl.items()
    ]
    found = []
    if parts:
        found.append(
            f"Worse than full precision by {_joined(parts)}, in nats of KL per token of held-out "
            "data."
        )
    tasks = [
        f"{direction(task)} {task_difference(task)} points on {name} (n = {numbers.count(task.n)})"
        for name, task in point.tasks.items()
        if task.difference is not None
    ]
    if tasks:
        text = _joined(tasks)
        found.append(f"{text[0].upper()}{text[1:]}.")
    return found


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def direction(task: TaskResult) -> str:
    """``worse by``, or ``better by`` where the difference came out so."""
    return "better by" if (task.difference or 0) > 0 else "worse by"


def task_difference(task: TaskResult) -> str:
    """Size of the difference from full precision and its standard error, in points.

    The error is that of the recorded interval, which adds one pair to either kind of
    disagreement and so is not zero where there is none.
    """
    assert task.difference is not None
    text = f"{100 * abs(task.difference):.1f}"
    if task.low is None or task.high is None:
        return text
    return f"{text} ± {100 * (task.high - task.low) / (2 * Z95):.1f}"


HEADER = (
    *("domain", "KL, nats per token", "loss, nats per token", "perplexity", "at 16 bits"),
    *("same likeliest token", "documents", "tokens"),
)


def against_full(run: Run) -> Table:
    """What the chosen plan costs in every domain, beside full precision on the same tokens."""
    point = run.chosen
    if point is None:
        return Table(HEADER, ())
    rows = [_domain_row(run, point, domain) for domain in run.domains]
    return Table(HEADER, tuple(row for row in rows if row))


def _domain_row(run: Run, point: Point, domain: str) -> tuple[str, ...]:
    record = run.verified.get((point.labels, domain))
    if record is None:
        return ()
    excess = "" if record.excess is None else numbers.signed_with_error(*record.excess)
    perplexities = ("", "")
    if record.perplexity is not None:
        own, full = record.perplexity
        perplexities = (numbers.significant(own, 4), numbers.significant(full, 4))
    agreement = "" if record.top1_agreement is None else numbers.percent(record.top1_agreement)
    sizes = numbers.count(record.n), numbers.count(record.num_tokens)
    return (domain, numbers.with_error(*record.kl), excess, *perplexities, agreement, *sizes)
