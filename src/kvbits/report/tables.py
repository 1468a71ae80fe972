"""The page's tables: records turned into text, nothing measured or derived here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from kvbits.evaluation.statistics import Z95
from kvbits.report import numbers
from kvbits.report.collect import GIVEN_ORIGIN, PairedComparison, Point, Run, TaskResult
from kvbits.report.compare import (
    BASELINE_ORIGINS,
    compare_at_equal_bits,
    same_plans,
    sensitivity_grids,
)
from kvbits.report.stages import Measurement

ORIGINS = {
    "exact": "search, exact",
    "exact+": "search, exact+",
    "moead": "search, MOEA/D",
    "nsga2": "search, NSGA-II",
    "tpe": "search, TPE",
    "full": "full precision",
    GIVEN_ORIGIN: "given rival",
}


class Table(NamedTuple):
    """Rows of text; an empty header makes the first column of each row its heading."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    highlighted: Collection[int] = ()
    caption: str = ""


def render_table(table: Table, style: str = "") -> str:
    """Return a table as HTML."""
    width = max((len(row) for row in table.rows), default=len(table.header))
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    kinds = [' class="words"' if column in _word_columns(table) else "" for column in range(width)]
    names = zip(kinds, table.header, strict=False)
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in names)
    body = []
    for index, row in enumerate(table.rows):
        cells = [f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True)]
        if not table.header:
            cells[0] = f'<th scope="row">{escape(row[0])}</th>'
        chosen = ' class="chosen"' if index in table.highlighted else ""
        body.append(f"<tr{chosen}>{''.join(cells)}</tr>")
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return (
        f'<table class="{style}">{caption}{thead}<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table>"
    )


def _word_columns(table: Table) -> set[int]:
    """Columns but the first, which the style sheet knows, that hold words: flush left."""
    columns = enumerate(zip(*table.rows, strict=True))
    return {
        index
        for index, cells in columns
        if index and any(cell and cell[0] not in _NUMBER_STARTS for cell in cells)
    }


_NUMBER_STARTS = frozenset("0123456789+−-<(")


def summary(run: Run) -> Table:
    """Say what was chosen, in a handful of rows."""
    point = run.chosen
    if point is None:
        return Table((), (("plan", "none chosen yet"),))
    budget = "" if run.budget_bits is None else f", budget {numbers.bits(run.budget_bits)}"
    rows = [("plan", point.name), ("effective bits", numbers.bits(point.effective_bits) + budget)]
    if point.summary:
        rows.insert(1, ("layers", point.summary.rpartition("; ")[0]))
    if point.effective_bits_at_context is not None and run.context:
        at_context = numbers.bits(point.effective_bits_at_context)
        rows.append((f"at {numbers.count(run.context)} tokens", f"{at_context} effective bits"))
    rows += bought(run)
    rows.append(("mode", run.mode))
    rows += [(f"KL, {name}", f"{_kl(m)} nats") for name, m in point.measured_kl.items()]
    rows += [(name, _task_sentence(task)) for name, task in point.tasks.items()]
    return Table((), tuple(rows))


def bought(run: Run) -> tuple[tuple[str, str], ...]:
    """What the chosen plan buys in bytes and in tokens, as rows of a name and a sentence."""
    got = run.bought
    if not got:
        return ()
    rows = f" x {numbers.count(got['batch'])} rows" if got["batch"] > 1 else ""
    tokens = f"{numbers.count(got['context'])} tokens{rows}"
    size, full = numbers.size(got["bytes"]), numbers.size(got["bytes_16bit"])
    more, before = numbers.count(got["tokens"]), numbers.count(got["tokens_16bit"])
    return (
        ("bytes", f"{size} for {tokens}, in 16 bits {full}"),
        ("tokens", f"{more}{rows} in {numbers.size(got['memory'])}, in 16 bits {before}"),
        *_drop(run.drop),
    )


def _drop(drop: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The drop the plan was chosen by, and what other problems say of it."""
    if not drop:
        return ()
    said = [f"{_drop_sentence(drop)} on {numbers.count(drop['n'])} problems that chose it"]
    heldout = drop["heldout"]
    if heldout["difference"] is not None:
        said.append(f"{_drop_sentence(heldout)} on {numbers.count(heldout['n'])} others")
    most = numbers.percent(drop["most"])
    needed = drop["problems_needed"]
    verdict = "shown" if drop["is_shown"] else "not shown"
    more = f" (some {numbers.count(needed)} problems could)" if needed else ""
    limit = f"{drop['task']}, limit {most}, {verdict} to be kept at 95 %{more}"
    return (("drop", f"{limit}: {'; '.join(said)}"),)


def _drop_sentence(found: Mapping[str, Any]) -> str:
    interval = f"[{numbers.points(found['low'])}, {numbers.points(found['high'])}]"
    return f"{numbers.points(found['difference'])} {interval} points"


def _task_sentence(task: TaskResult) -> str:
    text = f"{_accuracy(task)} of {numbers.count(task.n)} problems"
    if task.difference is None:
        return text
    return f"{text}; difference from full precision {_difference(task)} points"


def verified(run: Run) -> Table:
    """Divergence of every measured plan, small to large."""
    measured = [point for point in run.points if point.measured_kl]
    domains = tuple(d for d in run.domains if any(d in p.measured_kl for p in measured))
    header = ["plan", "from", "effective bits"]
    if run.context:
        header.append(f"at {numbers.count(run.context)} tokens")
    header += [f"KL {domain}" for domain in domains]
    rows = []
    for point in measured:
        cells = _name_cells(run, point)
        if run.context:
            cells.append(numbers.bits(point.effective_bits_at_context))
        rows.append((*cells, *(_kl(point.measured_kl.get(domain)) for domain in domains)))
    return Table(tuple(header), tuple(rows), _chosen_rows(measured))


def task_results(run: Run) -> Table:
    """Accuracy of every plan that answered task problems, small to large."""
    measured = [point for point in run.points if point.tasks]
    header = ["plan", "from", "effective bits"]
    for task in run.tasks:
        header += [f"{task}{_problems(measured, task)}", "difference [95 %]"]
    rows = []
    for point in measured:
        results = [point.tasks.get(name) for name in run.tasks]
        cells = [cell for task in results for cell in task_cells(task)]
        rows.append((*_name_cells(run, point), *cells))
    return Table(tuple(header), tuple(rows), _chosen_rows(measured))


def _name_cells(run: Run, point: Point) -> list[str]:
    origin = ORIGINS.get(point.origin, point.origin)
    same = same_plans(run.points).get(point.name)
    name = point.name if same is None else f"{point.name} (same as {same})"
    return [name, origin, numbers.bits(point.effective_bits)]


def task_cells(task: TaskResult | None) -> list[str]:
    """Accuracy, and the difference from full precision; empty for None."""
    return ["", ""] if task is None else [_accuracy(task), _difference(task)]


def _chosen_rows(points: Sequence[Point]) -> list[int]:
    return [index for index, point in enumerate(points) if point.is_chosen]


def _problems(points: Sequence[Point], task: str) -> str:
    """Return ", n = 512"; the counts of all points where they are not the same."""
    sizes = sorted({point.tasks[task].n for point in points if task in point.tasks})
    return f", n = {' or '.join(map(numbers.count, sizes))}"


def _kl(measured: Measurement | None) -> str:
    return "" if measured is None else numbers.with_error(*measured)


def _accuracy(task: TaskResult) -> str:
    error = numbers.percent(task.standard_error)
    return f"{numbers.percent(task.accuracy).removesuffix(' %')} ± {error}"


def _difference(task: TaskResult) -> str:
    if task.difference is None or task.low is None or task.high is None:
        return ""
    interval = f"[{numbers.points(task.low)}, {numbers.points(task.high)}]"
    return f"{numbers.points(task.difference)} {interval}"


def comparison(run: Run) -> Table:
    """Baselines beside the searched plan of equal size."""
    found = compare_at_equal_bits(run)
    domains = tuple(dict.fromkeys(domain for item in found for domain in item.ratios))
    header = (
        "baseline",
        "from",
        "bits",
        "searched plan",
        "bits",
        *(f"KL ratio, {d}" for d in domains),
    )
    rows = tuple(
        (
            item.baseline.name,
            ORIGINS.get(item.baseline.origin, item.baseline.origin),
            numbers.bits(item.baseline.effective_bits),
            item.searched.name,
            numbers.bits(item.searched.effective_bits),
            *(ratio_cell(item.ratios.get(domain)) for domain in domains),
        )
        for item in found
    )
    chosen = [index for index, item in enumerate(found) if item.searched.is_chosen]
    return Table(header, rows, chosen)


def ratio_cell(measured: Measurement | None) -> str:
    """A ratio with its standard error where that shows in two decimals; empty for None."""
    if measured is None:
        return ""
    if measured.standard_error >= 0.005 and measured.value >= 0.005:  # false for nan
        return numbers.with_error(measured.value, max(measured.standard_error, 0.01))
    return numbers.ratio(measured.value)


def against_rivals(run: Run) -> Table:
    """The chosen plan's KL minus that of each rival, domains across."""
    return _paired(run, [row for row in run.comparisons if row.origin in BASELINE_ORIGINS])


def against_neighbours(run: Run) -> Table:
    """The chosen plan's KL minus that of each other searched plan, domains across."""
    return _paired(run, [row for row in run.comparisons if row.origin not in BASELINE_ORIGINS])


def _paired(run: Run, comparisons: Sequence[PairedComparison]) -> Table:
    domains = tuple(dict.fromkeys(item.domain for item in comparisons))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for item in comparisons:
        origin = ORIGINS.get(item.origin, item.origin)
        key = (item.baseline, origin, numbers.bits(item.effective_bits))
        found.setdefault(key, {})[item.domain] = kl_difference(item)
    rows = tuple((*key, *(cells.get(d, "") for d in domains)) for key, cells in found.items())
    return Table(("plan", "from", "bits", *(f"KL difference, {d}" for d in domains)), rows)


def kl_difference(item: PairedComparison) -> str:
    """A paired difference with its standard error, which the interval holds."""
    if item.difference is None or item.low is None or item.high is None:
        return "" if item.difference is None else numbers.signed(item.difference)
    return numbers.signed_with_error(item.difference, (item.high - item.low) / (2 * Z95))


def layer_bits(point: Point) -> Table:
    """What every layer is stored as, layers across: widths, and methods if there are several."""
    header = ("layer", *(str(index) for index in range(len(point.pairs))))
    keys = ("keys", *(str(key) for key, _ in point.pairs))
    values = ("values", *(str(value) for _, value in point.pairs))
    methods = ("method", *(label.rpartition(" ")[0] for label in point.labels))
    return Table(header, (keys, values, methods) if any(methods[1:]) else (keys, values))


def sensitivities(run: Run) -> tuple[Table, ...]:
    """One table per domain: layers down, side and width across."""
    return tuple(
        Table(
            ("layer", *grid.columns),
            tuple(
                (
                    layer,
                    *("" if value is None else numbers.significant(value) for value in row),
                )
                for layer, row in zip(grid.layers, grid.rows, strict=True)
            ),
            caption=f"{grid.domain}, KL in nats",
        )
        for grid in sensitivity_grids(run.sensitivity)
    )
