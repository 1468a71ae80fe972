"""A run directory becomes one page; a damaged one becomes one clear error."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_synthetic import DOMAINS, NUM_LAYERS, write_run

from kvbits.errors import RecordError
from kvbits.report import compare, figures, heatmaps, numbers, tables
from kvbits.report.collect import Run, collect
from kvbits.report.page import render, write_page
from kvbits.report.stages import Measurement


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def run(run_dir) -> Run:
    return collect(run_dir)


def edit_front(run_dir: Path, **changes) -> None:
    path = run_dir / "front.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_collect_reads_what_was_written(run):
    assert run.missing == ()
    assert run.domains == tuple(DOMAINS)
    assert run.tasks == ("arithmetic",)
    assert run.chosen is not None
    assert run.chosen.effective_bits <= run.budget_bits == 4.5
    assert [p.effective_bits for p in run.points] == sorted(p.effective_bits for p in run.points)
    assert len(run.sensitivity) == NUM_LAYERS * 2 * 3 * len(DOMAINS)


@pytest.mark.parametrize("name", ["sensitivity.jsonl", "verify.jsonl", "front.json", "plan.json"])
def test_a_missing_stage_is_named_on_the_page(run_dir, name):
    (run_dir / name).unlink()
    run = collect(run_dir)
    assert run.missing == (name,)
    assert f"not finished: {name}" in render(run)


def test_a_run_that_only_started_still_makes_a_page(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    assert "none chosen yet" in render(collect(tmp_path))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"must hold study\.json, got .* without it"):
        collect(tmp_path)


def test_a_half_written_line_is_refused_with_its_number(run_dir):
    path = run_dir / "sensitivity.jsonl"
    path.write_text(path.read_text()[:-20])
    number = NUM_LAYERS * 2 * 3 * len(DOMAINS)
    with pytest.raises(RecordError, match=rf"sensitivity\.jsonl line {number} must be a complete"):
        collect(run_dir)


def test_a_line_without_a_field_is_refused(run_dir):
    (run_dir / "sensitivity.jsonl").write_text('{"layer": 0, "side": "key"}\n')
    with pytest.raises(RecordError, match="line 1 must be a complete record, got no field 'bits'"):
        collect(run_dir)


def test_damaged_json_is_refused(run_dir):
    (run_dir / "front.json").write_text('{"schema_version": 2, ')
    with pytest.raises(RecordError, match=r"front\.json must be JSON, got damage"):
        collect(run_dir)


def test_a_front_of_another_schema_is_refused(run_dir):
    edit_front(run_dir, schema_version=1)
    with pytest.raises(RecordError, match="must have schema_version 2, got 1"):
        collect(run_dir)


def test_an_incomplete_point_is_refused(run_dir):
    edit_front(run_dir, points=[{"name": "x", "origin": "exact", "pairs": [[4]]}])
    with pytest.raises(RecordError, match="points 0 must be complete"):
        collect(run_dir)


def test_comparison_never_gives_the_search_more_bits(run):
    found = compare.compare_at_equal_bits(run)
    assert {item.baseline.origin for item in found} == {"uniform", "ladder", "random"}
    for item in found:
        gap = item.searched.effective_bits - item.baseline.effective_bits
        assert -compare.FEWER_BITS <= gap <= compare.MORE_BITS
        assert set(item.ratios) == set(DOMAINS)


def test_a_searched_plan_that_equals_a_baseline_says_so(run_dir):
    front = json.loads((run_dir / "front.json").read_text())
    uniform = next(p for p in front["points"] if p["name"] == "uniform K4V4")
    front["points"].append(uniform | {"name": "exact 4.50", "origin": "exact"})
    edit_front(run_dir, points=front["points"])
    names = [row[0] for row in tables.verified(collect(run_dir)).rows]
    assert "exact 4.50 (same as uniform K4V4)" in names
    assert "uniform K4V4" in names


def test_a_comparison_the_search_lost_is_shown(run):
    """The page reports whatever came out: the ratio is not clipped at one."""
    ratios = [r for item in compare.compare_at_equal_bits(run) for r in item.ratios.values()]
    worst = max(ratios)
    assert worst.value > 1
    shown = {cell for row in tables.comparison(run).rows for cell in row}
    assert tables.ratio_cell(worst) in shown


@pytest.mark.parametrize(
    ("ratio", "error", "text"),
    [
        (0.4213, 0.0413, "0.42 ± 0.04"),
        (30.05, 23.2, "30 ± 23"),
        (1.0, 0.0, "1.00"),
        (0.518, float("nan"), "0.52"),
        (0.001, 0.002, "< 0.01"),
    ],
)
def test_ratios_show_an_error_where_it_can_be_seen(ratio, error, text):
    assert tables.ratio_cell(Measurement(ratio, error)) == text


def test_paired_differences_are_shown_with_their_standard_error(run):
    """The recorded interval is 1.96 standard errors to either side: 0.01 / 1.96 = 0.005."""
    table = tables.against_rivals(run)
    assert {row[0] for row in table.rows} == {"uniform K2V2", "uniform K4V2", "uniform K4V4"}
    first = next(row for row in run.comparisons if row.baseline == "uniform K2V2")
    row = next(row for row in table.rows if row[0] == first.baseline)
    assert row[3] == numbers.signed_with_error(first.difference, 0.005102)
    assert row[3].endswith("± 0.005")


def test_neighbours_of_the_chosen_plan_are_compared_apart_from_rivals(run):
    rows = tables.against_neighbours(run).rows
    assert rows
    assert {row[1] for row in rows} == {"search, exact"}
    assert run.chosen.name not in {row[0] for row in rows}


def test_a_measurement_of_one_document_has_no_error(run_dir):
    front = json.loads((run_dir / "front.json").read_text())
    for point in front["points"]:
        for measured in (point["measured_kl"] or {}).values():
            measured["se"] = None
    edit_front(run_dir, points=front["points"])
    run = collect(run_dir)
    assert not any("±" in cell for row in tables.verified(run).rows for cell in row)
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", render(run), count=1, flags=re.S)


def test_grids_hold_every_measured_cell(run):
    grids = compare.sensitivity_grids(run.sensitivity)
    assert [grid.domain for grid in grids] == list(DOMAINS)
    assert grids[0].columns == ("K8", "K4", "K2", "V8", "V4", "V2")
    by_cell = {(row.domain, row.layer, row.side, row.bits): row.kl_nats for row in run.sensitivity}
    assert grids[1].rows[3][2] == by_cell["reasoning", 3, "key", 2]
    assert grids[0].rows[5][4] == by_cell["text", 5, "value", 4]


def test_a_cell_that_was_not_measured_is_empty(run):
    grid = compare.sensitivity_grids(run.sensitivity[1:])[0]
    assert grid.rows[0][0] is None
    assert heatmaps.sensitivity_figures(run._replace(sensitivity=run.sensitivity[1:]))[0][1].data


def test_front_figure_draws_every_measured_point(run):
    measured = [point for point in run.points if point.measured_kl]
    found = figures.front_figures(run)
    assert [domain for domain, _ in found] == list(DOMAINS)
    for _, figure in found:
        names = {"searched, exact", "uniform", "ladder", "random"}
        drawn = [x for trace in figure.data if trace.name in names for x in trace.x]
        assert len(drawn) == len(measured)
        assert all(axis.type == "log" for axis in figure.select_yaxes())


def test_hovering_tells_a_plans_size_kl_tasks_and_layers(run):
    text = figures.hover(run, run.chosen, "text")
    assert run.chosen.name in text
    assert f"{run.chosen.effective_bits + 0.05:.2f} at 4\u202f096 tokens" in text
    assert numbers.with_error(*run.chosen.measured_kl["text"]) in text
    assert "arithmetic" in text
    assert "made up" in text


def test_error_bars_are_the_recorded_standard_errors(run):
    trace = next(t for t in figures.front_figures(run)[0][1].data if t.name == "uniform")
    recorded = [p.measured_kl["text"].standard_error for p in run.points if p.origin == "uniform"]
    assert list(trace.error_y.array) == recorded


class References(HTMLParser):
    """Collects everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_page_is_self_contained(run_dir):
    text = write_page(run_dir).read_text()
    parser = References()
    parser.feed(text)
    assert [each for each in parser.found if not each.startswith(("#", "data:"))] == []
    assert text.count("plotly.js v") == 1


def test_page_is_readable_without_scripts(run_dir, run):
    text = re.sub(r"<script.*?</script>", "", write_page(run_dir).read_text(), flags=re.DOTALL)
    for point in run.points:
        assert f"<td>{point.name}</td>" in text
    assert text.count("<table") == text.count("</table>") >= 6
    assert "kvbits generate models/made-up --plan" in text


def test_page_escapes_names(run_dir):
    edit_front(run_dir, mode="<b>per token</b>")
    text = write_page(run_dir).read_text()
    assert "&lt;b&gt;per token" in text
    assert "<b>per token" not in text


def test_page_is_the_same_every_time(run_dir, tmp_path):
    first = write_page(run_dir, tmp_path / "a.html").read_text()
    assert write_page(run_dir, tmp_path / "b.html").read_text() == first


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.012345, 0.00067, "0.0123 ± 0.0007"),
        (0.5, 0.013, "0.500 ± 0.013"),
        (4.21, 0.25, "4.2 ± 0.2"),
        (123.4, 12.0, "123 ± 12"),
        (2.0e-6, 3.0e-7, "(2.0 ± 0.3)×10⁻⁶"),
        (8.0e-5, 1.03e-3, "0.0001 ± 0.0010"),
        (0.25, 0.0, "0.250"),
        (0.25, float("nan"), "0.250"),
    ],
)
def test_errors_decide_the_digits(value, error, text):
    assert numbers.with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999 B"), (1_500, "1.5 kB"), (24e9, "24.0 GB"), (3e12, "3.0 TB")]
)
def test_sizes_use_decimal_units(value, text):
    assert numbers.size(value) == text
