"""Tables beside the figures of stages: memory, positions, domains, pruning, trials."""

from __future__ import annotations

from itertools import groupby

from kvbits.report import numbers
from kvbits.report.collect import Run
from kvbits.report.compare import chosen_trial, in_budget, pair_grid, split_by_pruning
from kvbits.report.heatmaps import group_names
from kvbits.report.tables import Table

MOST_TRIALS = 40  # of a long search, the table holds the best


def memory(run: Run) -> Table:
    """Bytes of the chosen plan's cache by context length."""
    header = ("tokens a row", "cache", "in 16 bits", "times smaller", "effective bits")
    rows = tuple(
        (
            numbers.count(row.context),
            numbers.size(row.bytes),
            numbers.size(row.bytes_16bit),
            f"{row.bytes_16bit / row.bytes:.2f}",
            numbers.bits(row.effective_bits),
        )
        for row in run.memory
    )
    own = [index for index, row in enumerate(run.memory) if row.context == run.context]
    return Table(header, rows, own)


def positions(run: Run) -> Table:
    """KL of the chosen plan by the number of tokens in front, domains across."""
    if run.chosen is None:
        return Table((), ())
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for domain in run.domains:
        record = run.verified.get((run.chosen.labels, domain))
        for row in record.positions if record else ():
            key = (row.start, row.stop)
            cells.setdefault(key, {})[domain] = numbers.with_error(*row.kl)
    domains = [d for d in run.domains if any(d in row for row in cells.values())]
    rows = tuple(
        (f"{start} to {stop - 1}", *(row.get(domain, "") for domain in domains))
        for (start, stop), row in sorted(cells.items())
    )
    return Table(("tokens in front", *(f"KL {domain}" for domain in domains)), rows)


def domains(run: Run) -> Table:
    """KL of the chosen plan by domain: expected, measured while searching, and held out."""
    if run.chosen is None:
        return Table((), ())
    header = (
        *("domain", "predicted", "measured, calibration", "measured, held out"),
        "predicted / best uniform plan of this size",
    )
    trial, rows = chosen_trial(run), []
    for domain in run.domains:
        predicted = run.chosen.predicted_kl.get(domain)
        norm = run.normalised_by.get(domain)
        measured = run.chosen.measured_kl.get(domain)
        rows.append(
            (
                domain,
                "" if predicted is None else numbers.significant(predicted),
                numbers.significant(trial[domain]) if domain in trial else "",
                "" if measured is None else numbers.with_error(*measured),
                numbers.ratio(predicted / norm) if predicted is not None and norm else "",
            )
        )
    return Table(header, tuple(rows))


def groups(run: Run) -> Table:
    """What pruning and clustering left to decide: the pairs of every group of layers."""
    if run.pruned is None:
        return Table((), ())
    names = group_names(run)
    rows = tuple(
        (
            names[group[0]],
            ", ".join(group),
            str(len(run.pruned.kept.get(group[0], ()))),
            ", ".join(run.pruned.kept.get(group[0], ())),
        )
        for group in run.pruned.groups
    )
    return Table(("group", "layers", "pairs", "kept"), rows)


def pair_errors(run: Run) -> Table:
    """Output errors by layer and pair; what pruning dropped is in brackets."""
    grid = pair_grid(run)
    if grid is None:
        return Table((), ())
    kept, _ = split_by_pruning(run, grid)
    rows = tuple(
        (layer, *(_cell(value, mark) for value, mark in zip(values, marks, strict=True)))
        for layer, values, marks in zip(grid.layers, grid.rows, kept.rows, strict=True)
    )
    return Table(("layer", *grid.columns), rows, caption="e_o; in brackets: pruned")


def _cell(value: float | None, kept: float | None) -> str:
    if value is None:
        return ""
    text = numbers.significant(value)
    return f"({text})" if kept is None else text


def trials(run: Run) -> Table:
    """The trials in order; of a long search the best within the budget."""
    rows = list(enumerate(zip(run.trials, in_budget(run), strict=True), start=1))
    caption = ""
    if len(rows) > MOST_TRIALS:
        caption = f"the best {MOST_TRIALS} of {numbers.count(len(rows))}"
        rows = sorted(rows, key=lambda row: (not row[1][1], row[1][0].loss))[:MOST_TRIALS]
    header = ("trial", "stage", "effective bits", "in budget", "loss", "predicted loss", "plan")
    cells = tuple(
        (
            str(number),
            trial.stage,
            numbers.bits(trial.effective_bits),
            "yes" if fits else "no",
            numbers.significant(trial.loss),
            numbers.significant(trial.predicted_loss),
            runs_of(trial.labels),
        )
        for number, (trial, fits) in rows
    )
    return Table(header, cells, caption=caption)


def runs_of(labels: tuple[str, ...]) -> str:
    """``("K4V4", "K4V4", "K2V2")`` to ``2 × K4V4, K2V2``: consecutive equal ones together."""
    counted = [(label, len(list(each))) for label, each in groupby(labels)]
    return ", ".join(label if count == 1 else f"{count} × {label}" for label, count in counted)
