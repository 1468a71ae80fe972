"""Heat maps of length and depth: what they hold, and what they are read from."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.errors import RecordError
from kvbits.report.grid import Grid, figure, grids_of, read_grids, render, table, write_page

CELLS = {(1024, 0.0): 1.0, (1024, 1.0): 0.5, (4096, 0.0): 0.25}  # one is missing


def results(plan="K2V2 0-11", task="passkey"):
    groups = {
        f"{length} tokens, depth {depth:.2f}": {"acc,none": v, "acc_stderr,none": 0.1, "n": 4}
        for (length, depth), v in CELLS.items()
    }
    whole = {"acc,none": 0.583, "acc_stderr,none": 0.02}
    return {"plan": plan, "groups": {task: groups}, "results": {task: whole}}


def test_a_grid_has_a_place_for_every_length_and_depth():
    (grid,) = grids_of(results())
    assert (grid.lengths, grid.depths) == ((1024, 4096), (0.0, 1.0))
    assert grid.values == ((1.0, 0.25), (0.5, None))
    assert (grid.metric, grid.n, grid.mean) == ("acc", 4, 0.583)


def test_groups_that_are_not_cells_make_no_grid():
    other = results()
    other["groups"] = {"ruler": {"4096 tokens": {"recall,none": 1.0, "n": 2}}, "lambada": {}}
    assert grids_of(other) == []


def test_the_figure_and_the_table_hold_the_same_percents():
    (grid,) = grids_of(results())
    (trace,) = figure(grid).data
    assert [list(row) for row in trace.z] == [[100.0, 25.0], [50.0, None]]
    assert (trace.zmin, trace.zmax) == (0, 100)
    text = table(grid)
    assert [row[1:] for row in text.rows] == [("100", "25"), ("50", "")]
    assert "n = 4 a cell, mean 58.3" in text.caption


def test_the_page_is_complete_and_escapes_what_it_is_told(tmp_path):
    (grid,) = grids_of(results(plan="<script>alert(1)</script>"))
    page = write_page([grid, grid], tmp_path / "new" / "page.html").read_text()
    assert page == render([grid, grid])
    assert "<script>alert" not in page
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=(?!\"(?:#|data:))", outside)
    assert not list(tmp_path.glob("**/*.partial"))


def test_the_command_draws_several_runs_on_one_page(tmp_path):
    for name in ("K2V2", "K4V4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "passkey.results.json").write_text(json.dumps(results(plan=name)))
    page = tmp_path / "grid.html"
    ran = CliRunner().invoke(
        app, ["grid", str(tmp_path / "K2V2"), str(tmp_path / "K4V4"), "-o", str(page)]
    )
    assert ran.exit_code == 0, ran.output
    assert "passkey: K4V4; acc, %, n = 4 a cell" in ran.output
    assert page.read_text().count('id="grid-') == 2


def test_a_folder_without_a_grid_is_refused(tmp_path):
    with pytest.raises(RecordError, match="a run must hold a grid of lengths and depths"):
        read_grids(tmp_path)
    (tmp_path / "x.results.json").write_text("{")
    with pytest.raises(RecordError, match=r"x\.results\.json must be readable JSON"):
        read_grids(tmp_path)
    (tmp_path / "x.results.json").write_text(json.dumps({"groups": results()["groups"]}))
    with pytest.raises(RecordError, match="results must be those of kvbits score"):
        read_grids(tmp_path)


def test_a_grid_names_its_task_and_plan():
    assert (
        Grid("needle", "K4V2", "recall", (1,), (0.0,), ((1.0,),), 1, 1.0).title == "needle: K4V2"
    )
