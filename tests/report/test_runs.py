"""Several runs on one page, and what may not stand on one."""

from __future__ import annotations

import json

import pytest
from report_synthetic import DOMAINS, write_run
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.errors import RecordError
from kvbits.evaluation.statistics import clustered_mean
from kvbits.report import runs, runs_page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / f"run-{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def found(folders):
    return runs.collect_runs(folders)


def test_runs_keep_their_order_and_names(found):
    assert [each.name for each in found] == ["run-0", "run-1", "run-2"]
    assert all(each.chosen.is_chosen for each in found)


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [each.name for each in runs.collect_runs(folders)] == ["a/run", "b/run"]


def test_one_run_is_no_comparison(folders):
    with pytest.raises(RecordError, match="runs must be at least two, got 1; kvbits report"):
        runs.collect_runs(folders[:1])


def test_a_run_given_twice_is_refused(folders):
    with pytest.raises(RecordError, match=r"runs must be given once each, got .*run-0 twice"):
        runs.collect_runs([folders[0], folders[0] / ".." / "run-0"])


def test_an_unfinished_run_is_refused(folders, tmp_path):
    unfinished = write_run(tmp_path / "unfinished")
    (unfinished / "front.json").unlink()
    with pytest.raises(RecordError, match=r"runs must be finished, got .*unfinished without"):
        runs.collect_runs([folders[0], unfinished])


def test_runs_of_other_weights_are_refused(folders, tmp_path):
    other = write_run(tmp_path / "other", weights="99" * 32)
    message = r"must be of one model, got run-0 and other of models/made-up twice with other weig"
    with pytest.raises(RecordError, match=message):
        runs.collect_runs([folders[0], other])


def test_differences_are_paired_by_document(found):
    """Against the definition, on the recorded documents."""
    first, other = found[0], found[1]
    a, b = (each.run.verified[each.chosen.labels, "text"] for each in (other, first))
    sums = [
        (x - y) * n
        for x, y, n in zip(a.document_kl, b.document_kl, a.document_tokens, strict=True)
    ]
    expected = clustered_mean(sums, a.document_tokens)
    assert runs.chosen_difference(first, other, "text") == pytest.approx(expected)
    values = [each.chosen.measured_kl["text"].value for each in (other, first)]
    assert expected[0] == pytest.approx(values[0] - values[1])


def test_other_held_out_data_is_shown_but_neither_paired_nor_divided(folders, tmp_path):
    other = write_run(tmp_path / "other-data", 1, data="12")
    mixed = runs.collect_runs([folders[0], other])
    assert runs.differs_in_data(mixed) == tuple(DOMAINS)
    assert runs.chosen_difference(*mixed, "text") is None
    rows = runs_page.differences(mixed).rows
    assert set(rows[0][2:]) == {""}
    for item in runs.against_rivals(mixed):
        assert sum(ratio is not None for ratio in item.ratios) == 1
    text = runs_page.render_comparison(mixed)
    assert "different held-out data in text, reasoning, recall" in text
    assert "different held-out data" not in runs_page.render_comparison(
        runs.collect_runs(folders[:2])
    )


def test_every_run_is_set_beside_every_rival_at_equal_bits(found):
    rivals = runs.against_rivals(found)
    assert {item.rival.origin for item in rivals} == {"uniform", "ladder", "random"}
    for item in rivals:
        assert len(item.partners) == len(item.ratios) == 3
        for partner, ratio in zip(item.partners, item.ratios, strict=True):
            assert (partner is None) == (ratio is None)
            if partner is not None:
                gap = partner.effective_bits - item.rival.effective_bits
                assert -0.2 <= gap <= 0.05


def test_the_table_of_plans_holds_every_verified_number(found):
    table = runs_page.chosen(found)
    assert [row[0] for row in table.rows] == ["run-0", "run-1", "run-2"]
    for domain in DOMAINS:
        column = table.header.index(f"KL {domain}")
        assert all("±" in row[column] for row in table.rows)
    tasks = runs_page.chosen_tasks(found)
    assert tasks.header == ("run", "arithmetic", "n", "difference [95 %]")
    assert [row[2] for row in tasks.rows] == ["512"] * 3


def test_fronts_are_laid_over_each_other(found):
    for _, figure in runs_page.front_figures(found):
        names = [trace.name for trace in figure.data]
        assert names.count("chosen plan") == 3
        assert {"run-0", "run-1", "run-2", "uniform"} <= set(names)


def test_the_page_says_where_every_run_came_from_and_where_they_differ(found):
    text = runs_page.render_comparison(found)
    for seed in range(3):
        assert f"kvbits tune models/made-up --bits 4.5 --seed {seed}" in text
    assert "<th>settings seed</th>" in text or "<td>settings seed</td>" in text


def test_the_command_writes_the_page_and_prints_the_plans(folders, tmp_path):
    target = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert "run-1" in result.output
    assert target.read_text().startswith("<!doctype html>")


def test_the_command_refuses_in_one_line_and_writes_nothing(folders, tmp_path):
    target = tmp_path / "page.html"
    other = write_run(tmp_path / "other", weights="99" * 32)
    result = CliRunner().invoke(app, ["compare", str(folders[0]), str(other), "-o", str(target)])
    assert result.exit_code == 1
    assert "runs must be of one model" in result.output
    assert not target.exists()


def test_a_record_without_pairing_fields_still_makes_a_page(folders, tmp_path):
    """Runs of the version before positions and losses were recorded."""
    old = write_run(tmp_path / "old", 5)
    lines = [json.loads(line) for line in (old / "verify.jsonl").read_text().splitlines()]
    new = ("positions", "excess_nll", "excess_nll_se", "perplexity_reference")
    kept = [{k: v for k, v in line.items() if k not in new} for line in lines]
    (old / "verify.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert kept[0].keys() < lines[0].keys()
    assert "run-0" in runs_page.render_comparison(runs.collect_runs([folders[0], old]))
