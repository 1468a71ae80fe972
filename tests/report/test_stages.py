"""What the page says of every stage of a run: cost, memory, positions, pruning, trials."""

from __future__ import annotations

import json
import random

import pytest
from report_synthetic import NUM_LAYERS, all_points, point, write_run

from kvbits.errors import RecordError
from kvbits.report import account, compare, curves, figures, heatmaps, stage_tables, verdict
from kvbits.report.collect import TaskResult, collect
from kvbits.report.page import render


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("stages") / "run")


@pytest.fixture(scope="module")
def run(run_dir):
    return collect(run_dir)


def rewritten(tmp_path, name, change):
    """A run of which one file is changed."""
    path = write_run(tmp_path / "changed")
    (path / name).write_text(change((path / name).read_text()))
    return path


# ----- the cost of the chosen plan


def test_the_page_opens_with_what_the_plan_costs(run):
    first, second = verdict.sentences(run)
    assert first.startswith("Worse than full precision by 0.1")
    assert " ± 0.009 on text, " in first
    assert first.endswith("in nats of KL per token of held-out data.")
    assert second.startswith("Worse by ")
    # The made-up interval is 1.2 points to either side: 1.2 / 1.96 = 0.6.
    assert "± 0.6 points on arithmetic (n = 512)." in second
    assert f"<p>{first}</p>" in render(run)


def test_a_plan_that_did_better_by_chance_is_said_to(run):
    task = TaskResult(0.95, 0.01, 100, 0.01, -0.02, 0.04)
    assert verdict.direction(task) == "better by"
    assert verdict.task_difference(task) == "1.0 ± 1.5"
    assert verdict.direction(task._replace(difference=0.0)) == "worse by"


def test_the_cost_table_holds_loss_and_perplexities(run):
    table = verdict.against_full(run)
    assert [row[0] for row in table.rows] == list(run.domains)
    record = run.verified[run.chosen.labels, "text"]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["loss, nats per token"].startswith("+")
    assert f"{record.excess.value:.3f}" in row["loss, nats per token"]
    assert (row["perplexity"], row["at 16 bits"]) == ("19.40", "19.30")


# ----- memory, positions, domains


def test_memory_is_told_at_every_length(run):
    rows = stage_tables.memory(run).rows
    assert len(rows) == 10
    assert rows[4][1:4] == ("7.4 MB", "25.2 MB", "3.42")
    figure = figures.memory_figure(run)
    assert [len(trace.x) for trace in figure.data] == [10, 10]
    assert list(figure.data[1].y) == [row.bytes for row in run.memory]


def test_positions_where_all_is_exact_are_not_drawn_but_told(run):
    names = [domain for domain, _ in curves.position_figures(run)]
    assert names == list(run.domains)
    figure = curves.position_figures(run)[0][1]
    chosen = next(trace for trace in figure.data if trace.name == run.chosen.name)
    record = run.verified[run.chosen.labels, "text"]
    assert record.positions[0].kl.value == 0
    assert list(chosen.y) == [row.kl.value for row in record.positions[1:]]
    assert list(chosen.error_y.array) == [row.kl.standard_error for row in record.positions[1:]]
    table = stage_tables.positions(run)
    assert table.rows[0][:2] == ("0 to 15", "0")
    assert len(table.rows) == len(record.positions)


def test_domains_show_what_was_expected_and_what_came(run):
    row = stage_tables.domains(run).rows[0]
    assert row[0] == "text"
    predicted = run.chosen.predicted_kl["text"]
    assert row[4] == f"{predicted / 0.05:.2f}"
    assert compare.chosen_trial(run)["text"] == predicted
    names = [trace.name for trace in curves.domains_figure(run).data]
    assert f"{run.chosen.name}, held-out data" in names
    assert f"{run.chosen.name}, predicted" in names


def test_rivals_are_the_best_of_their_kind_within_the_budget(run):
    rivals = compare.rivals_in_budget(run)
    assert all(run.fits(rival) for rival in rivals)
    for rival in rivals:
        peers = [p for p in run.points if p.origin == rival.origin and run.fits(p)]
        assert rival.loss == min(p.loss for p in peers)


def test_a_given_rival_is_named_everywhere(tmp_path):
    pairs = [[4, 4]] * NUM_LAYERS
    given = point("kvtuner recipe", "given", pairs, random.Random(1))
    run = collect(write_run(tmp_path / "run", extra=(given,)))
    assert compare.rivals_in_budget(run)[-1].name == "kvtuner recipe"
    text = render(run)
    assert text.count("kvtuner recipe") >= 3
    assert "given rival" in text


# ----- pruning and search


def test_pruned_pairs_are_told_apart_from_kept_ones(run):
    grid = compare.pair_grid(run)
    kept, dropped = compare.split_by_pruning(run, grid)
    for rows in zip(grid.rows, kept.rows, dropped.rows, strict=True):
        for value, first, second in zip(*rows, strict=True):
            assert {first, second} == {value, None}
    column = grid.columns.index("K2V8")
    assert dropped.rows[0][column] is not None
    assert stage_tables.pair_errors(run).rows[0][column + 1].startswith("(")


def test_layers_of_a_group_share_a_letter(run):
    names = heatmaps.group_names(run)
    assert [names[str(layer)] for layer in range(6)] == ["A", "B", "C", "A", "B", "C"]
    labels = heatmaps.pairs_figure(run).data[0].y
    assert labels[4] == "4 · B"
    assert stage_tables.groups(run).rows[0][:3] == ("A", "0, 3, 6, 9", "6")


def test_rows_may_be_heads_of_layers(tmp_path):
    def by_head(text):
        rows = [json.loads(line) for line in text.splitlines()]
        rows = [row | {"layer": f"{row['layer']}.{head}"} for row in rows for head in (0, 1)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    path = rewritten(tmp_path, "errors.jsonl", by_head)
    pruned = {"0.0": ["K8V8"], "0.1": ["K8V8", "K4V4"]}
    (path / "pruned.json").write_text(
        json.dumps({"candidates": pruned, "groups": [["0.0"], ["0.1"]]})
    )
    run = collect(path)
    assert compare.pair_grid(run).layers[:3] == ("0.0", "0.1", "1.0")
    assert heatmaps.pairs_figure(run).data[0].y[1] == "0.1 · B"
    assert compare.chosen_trial(run) == {}
    assert "0.1 · B" in render(run) or "0.1 \\u00b7 B" in render(run)


def test_letters_go_on_after_z():
    assert [heatmaps._letters(i) for i in (0, 25, 26, 52)] == ["A", "Z", "AA", "BA"]


def test_the_best_plan_so_far_is_within_the_budget_and_falls(run):
    fits = compare.in_budget(run)
    assert any(fits)
    assert not all(fits)
    figure = dict(curves.search_figures(run))["best plan so far"]
    best = next(trace for trace in figure.data if trace.name == "best so far")
    assert list(best.y) == sorted(best.y, reverse=True)
    within = [t.loss for t, fit in zip(run.trials, fits, strict=True) if fit]
    assert best.y[-1] == min(within)


def test_a_budget_in_kl_decides_which_trials_fit(run):
    study = run.study | {"settings": run.study["settings"] | {"max_kl": 0.2}}
    fits = compare.in_budget(run._replace(study=study))
    assert fits == [max(trial.kl_nats) <= 0.2 for trial in run.trials]
    assert len(set(fits)) == 2


def test_a_budget_counted_at_a_context_is_compared_there(run):
    chosen = run.chosen
    at_context = run._replace(budget_counted_at=4096, budget_bits=chosen.effective_bits + 0.01)
    assert not at_context.fits(chosen)  # 0.05 bits larger at 4096 tokens
    assert at_context._replace(budget_counted_at=None).fits(chosen)
    assert at_context.long_context_budget is None


# ----- provenance


def test_the_exact_command_and_checksums_stand_on_the_page(run, run_dir):
    text = render(run)
    assert "kvbits tune models/made-up --bits 4.5 --seed 0" in text
    assert run.plan_checksum in text
    assert "cd" * 32 in text
    assert "No set that the search saw was used to verify" in text


def test_a_held_out_set_that_the_search_saw_is_called_out(run):
    data = {"calibration": {"text": "aa"}, "heldout": {"text": "aa"}}
    assert "was seen by the search" in account.separation(
        run._replace(study=run.study | {"data": data})
    )


# ----- damage


@pytest.mark.parametrize(
    ("name", "field"),
    [("search.jsonl", "loss"), ("errors.jsonl", "e_o"), ("verify.jsonl", "document_kl_nats")],
)
def test_a_record_without_a_field_is_refused_with_its_line(tmp_path, name, field):
    def drop(text):
        lines = [json.loads(line) for line in text.splitlines()]
        del lines[1][field]
        return "".join(json.dumps(line) + "\n" for line in lines)

    path = rewritten(tmp_path, name, drop)
    with pytest.raises(RecordError, match=rf"{name} line 2 must be a complete record"):
        collect(path)


def test_a_damaged_pruning_is_refused(tmp_path):
    path = rewritten(tmp_path, "pruned.json", lambda text: '{"candidates": {"1": []}}')
    with pytest.raises(RecordError, match=r"pruned\.json must be complete, got"):
        collect(path)


def test_all_made_up_points_have_names_of_their_own():
    names = [each["name"] for each in all_points(random.Random(0))]
    assert len(set(names)) == len(names)
