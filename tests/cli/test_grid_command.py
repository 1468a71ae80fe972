"""``kvbits score`` of a grid: the table it prints, and the page it writes beside its records."""

from __future__ import annotations

from typer.testing import CliRunner

from kvbits.cli import app


def test_scoring_a_grid_prints_it_and_draws_it(tiny_model_dir, tmp_path):
    out = tmp_path / "run"
    settings = ("--set", "lengths=200,300", "--set", "depths=2", "--set", "n=1")
    command = ["score", "passkey", str(tiny_model_dir), *settings, "--device", "cpu"]
    ran = CliRunner().invoke(app, [*command, "-o", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "passkey: full precision; acc, %, n = 1 a cell" in ran.output
    assert "depth   200 tokens   300 tokens" in ran.output
    assert "tokens, depth" not in ran.output  # the cells are no rows of the other table
    page = (out / "passkey.html").read_text()
    assert 'id="grid-0"' in page
    names = {"passkey.results.json", "passkey.samples.jsonl", "run.json"}
    assert names <= {path.name for path in out.iterdir()}
