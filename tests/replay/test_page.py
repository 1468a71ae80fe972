"""docs/replay.md: its example does what the page shows, its table is that of the records."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.replay.hooks import HOOKS
from kvbits.replay.leaderboard import Row, beats, markdown_tables, pareto
from kvbits.replay.metrics import REQUIRED, TIMES, parse_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "replay.md").read_text()
RECORDS = ROOT / "recipes" / "replay" / "results" / "kvbits-tiny.jsonl"


def test_the_example_prints_what_the_page_shows(tmp_path, monkeypatch):
    policy = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    command, shown = re.search(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(ROOT / "models")
    Path("my_policy.py").write_text(policy)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == shown.splitlines()[0]
    expected, found = parse_metrics(shown), parse_metrics(result.stdout)
    assert tuple(expected)[:9] == REQUIRED
    for name in expected.keys() - set(TIMES):
        # Another CPU may round a sum in another order; the page has six decimals.
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-6), name


def test_the_table_is_that_of_the_records():
    table = re.search(r"<!-- leaderboard -->\n\n(.*?)\n\n<!-- end", PAGE, re.DOTALL)[1]
    assert table == markdown_tables(RECORDS)


def test_every_hook_stands_on_the_page():
    assert [name for name in HOOKS if f"| `{name}" not in PAGE] == []


def row(policy, bits, quality, is_over=False):
    return Row(policy, bits, bits, bits, quality, 1.0, 0.1, is_over, "not run")


def test_the_pareto_set_is_what_nothing_beats():
    rows = [
        row("a", 2, 90),
        row("b", 3, 95),
        row("c", 3.5, 94),
        row("d", 1, 99, is_over=True),
        row("e", 3, 95),
    ]
    assert [each.policy for each in pareto(rows)] == ["a", "b", "e"]
    assert beats(rows[1], rows[2])
    assert not beats(rows[1], rows[4])
