"""Several runs of one model: what may be compared, and the numbers of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvbits.errors import RecordError
from kvbits.evaluation.statistics import clustered_mean
from kvbits.report import account
from kvbits.report.collect import Point, Run, collect
from kvbits.report.compare import BASELINE_ORIGINS, kl_ratios, partner_of
from kvbits.report.stages import Measurement


class NamedRun(NamedTuple):
    """A finished run under the name it has on the page."""

    name: str
    run: Run
    chosen: Point


class Against(NamedTuple):
    """A rival beside every run's searched plan of equal size, None where a run has none.

    ``ratios`` holds searched / rival KL of one domain.
    """

    rival: Point
    domain: str
    partners: tuple[Point | None, ...]
    ratios: tuple[Measurement | None, ...]


def collect_runs(paths: Sequence[Path | str]) -> tuple[NamedRun, ...]:
    """Read runs that may stand on one page: finished, different, and of one model.

    Runs of different models are refused, because KL is a distance from each model's own full
    precision: a smaller one does not make a better model or plan.

    Raises:
        RecordError: There are fewer than two, one is damaged or not finished, or models differ.
    """
    folders = [Path(path) for path in paths]
    if len(folders) < 2:
        raise RecordError(
            f"runs must be at least two, got {len(folders)}; kvbits report writes the page of one"
        )
    found: list[NamedRun] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        run = collect(folder)
        if run.chosen is None or run.missing:
            raise RecordError(
                f"runs must be finished, got {folder} without a verified plan; the command that "
                "began it goes on where it stopped"
            )
        found.append(NamedRun(name, run, run.chosen))
    for other in found[1:]:
        _check_same_model(found[0], other)
    return tuple(found)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths that tell all folders apart."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise RecordError(f"runs must be given once each, got {folder} twice")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]


def _check_same_model(first: NamedRun, other: NamedRun) -> None:
    weights = [each.run.study.get("model", {}).get("weights") for each in (first, other)]
    names = [account.model_name(each.run) for each in (first, other)]
    is_same = weights[0] == weights[1] if all(weights) else names[0] == names[1]
    if not is_same:
        what = f"{names[0]} and {names[1]}" if names[0] != names[1] else f"{names[0]} twice"
        raise RecordError(
            f"runs must be of one model, got {first.name} and {other.name} of {what} with other "
            "weights; KL is a distance from a model's own full precision and says nothing across "
            "models"
        )


def shared_domains(runs: Sequence[NamedRun]) -> tuple[str, ...]:
    """Return the domains that any run was verified on, in order."""
    return tuple(dict.fromkeys(domain for each in runs for domain in each.run.domains))


def differs_in_data(runs: Sequence[NamedRun]) -> tuple[str, ...]:
    """Return the domains in which runs were verified on different held-out data."""
    found = []
    for domain in shared_domains(runs):
        records = (each.run.verified.get((each.chosen.labels, domain)) for each in runs)
        if len({record.checksum for record in records if record is not None}) > 1:
            found.append(domain)
    return tuple(found)


def chosen_difference(first: NamedRun, other: NamedRun, domain: str) -> Measurement | None:
    """Return KL of ``other``'s plan minus that of ``first``'s, paired; None on different data."""
    a, b = (each.run.verified.get((each.chosen.labels, domain)) for each in (other, first))
    if a is None or b is None or a.checksum != b.checksum:
        return None
    rows = zip(a.document_kl, b.document_kl, a.document_tokens, strict=True)
    sums = [(own - base) * tokens for own, base, tokens in rows]
    return Measurement(*clustered_mean(sums, a.document_tokens))


def against_rivals(runs: Sequence[NamedRun]) -> tuple[Against, ...]:
    """Set every rival that any run verified beside each run's searched plan of equal size.

    A rival that several runs verified counts once, as the first of them measured it.
    """
    rivals: dict[tuple[str, ...], tuple[Run, Point]] = {}
    for each in runs:
        for point in each.run.points:
            if point.origin in BASELINE_ORIGINS and point.measured_kl:
                rivals.setdefault(point.labels, (each.run, point))
    found = []
    for run, rival in sorted(rivals.values(), key=lambda item: item[1].effective_bits):
        partners = tuple(_partner(each, rival) for each in runs)
        for domain in rival.measured_kl:
            ratios = tuple(
                None if partner is None else _ratio((each.run, partner), (run, rival), domain)
                for each, partner in zip(runs, partners, strict=True)
            )
            if any(ratio is not None for ratio in ratios):
                found.append(Against(rival, domain, partners, ratios))
    return tuple(found)


def _partner(each: NamedRun, rival: Point) -> Point | None:
    searched = [p for p in each.run.points if p.is_searched and p.measured_kl]
    return partner_of(searched, rival.effective_bits)


def _ratio(plan: tuple[Run, Point], rival: tuple[Run, Point], domain: str) -> Measurement | None:
    """The ratio, unless the two were measured on different data."""
    records = [run.verified.get((point.labels, domain)) for run, point in (plan, rival)]
    if len({record.checksum for record in records if record is not None}) > 1:
        return None
    return kl_ratios(plan, rival).get(domain)
