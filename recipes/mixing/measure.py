"""Does a plan that mixes methods beat every single method at equal effective bits?

    python recipes/mixing/measure.py --out runs/mixing
    python recipes/mixing/measure.py --out runs/mixing --table

One sensitivity profile of all methods at all widths. From it, at every budget, the exact search
over all candidates (``mixed``) and over each method's alone, and each method's best uniform plan;
all are then measured on held-out data. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.cli.output import StageBars
from kvbits.evaluation.corpora import SetSize, default_sets
from kvbits.evaluation.statistics import paired_mean_difference
from kvbits.tuning.calibrated import calibrating
from kvbits.tuning.candidates import Candidates, of_methods
from kvbits.tuning.costs import cost_table
from kvbits.tuning.identity import versions, weights_checksum
from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search.exact import solve
from kvbits.tuning.sensitivity import Meter, profile_kl
from kvbits.tuning.tables import Allocation, Choice, sensitivity_table

# Every one keeps 0 to 31 or 16 newest tokens exact, 16 on average, so that codecs are compared and
# not windows: what a text's next token depends on is mostly among the newest.
METHODS = (
    "per-token:residual_length=16",
    "turboquant:residual_length=16",
    "kivi:residual_length=0,flush=joint",
    "kvarn:tile_tokens=32,sink_tokens=0",
    "kvquant:block_tokens=32,sink_tokens=0",
)
WIDTHS = (4, 3, 2)
BUDGETS = (3.0, 3.5, 4.0)
CALIBRATION = SetSize(text_documents=4, reasoning_documents=16, recall_documents=6)
HELDOUT = SetSize(text_documents=16, reasoning_documents=32, recall_documents=12)
PLANS = "plans.jsonl"


class Contender(NamedTuple):
    """One plan at one budget: how it was found, among which candidates."""

    budget: float
    kind: str  # mixed, tuned or uniform
    method: str
    plan: Allocation


def short(name: str) -> str:
    """The method without its settings, which are the same throughout."""
    return name.partition(":")[0]


def columns_of(candidates: Candidates, method: str) -> list[int]:
    """The exact layer and every candidate of one method."""
    labels = [column.label for column in candidates.columns]
    return [0, *(i for i, label in enumerate(labels) if label.startswith(f"{method} "))]


def restricted(problem: Problem, columns: list[int]) -> Problem:
    """The same problem with some of the candidates; losses stay relative to the same plans."""
    costs = problem.costs
    few = costs._replace(
        candidates=tuple(costs.candidates[i] for i in columns), units=costs.units[:, columns]
    )
    return problem._replace(costs=few, kl_nats=problem.kl_nats[..., columns])


def contenders(problem: Problem, candidates: Candidates) -> Iterator[Contender]:
    """Every plan to measure."""
    for bits in BUDGETS:
        here = problem.at(bits)
        yield Contender(bits, "mixed", "all", here.allocation(_solved(here, bits)))
        for method in METHODS:
            columns = columns_of(candidates, method)
            alone = restricted(here, columns)
            if alone.costs.units[:, 1:].min(axis=1).sum() > alone.costs.budget(bits):
                continue
            choice = tuple(columns[i] for i in _solved(alone, bits))
            yield Contender(bits, "tuned", short(method), here.allocation(choice))
            plans = [
                ("", here.allocation((i,) * len(choice)))
                for i in columns[1:]
                if here.costs.effective_bits((i,) * len(choice)) <= bits
            ]
            best = min(plans, key=lambda named: named[1].loss)
            yield Contender(bits, "uniform", short(method), best[1])


def _solved(problem: Problem, bits: float) -> Choice:
    choice = solve(problem, problem.costs.budget(bits))
    assert choice is not None
    return choice


def measure(arguments: argparse.Namespace) -> None:
    """Profile, search, and measure what the run does not hold yet."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to(arguments.device)
    calibration = default_sets(tokenizer, "calibration", size=CALIBRATION)
    heldout = default_sets(tokenizer, "heldout", size=HELDOUT)
    run = RunDir(arguments.out)
    with run.lock(), StageBars() as progress:
        run.check_identity(
            {
                "model": {"name": Path(arguments.model).name, "weights": weights_checksum(model)},
                "data": {each.name: each.checksum for each in (*calibration, *heldout)},
                "methods": list(METHODS),
                "versions": versions(),
            }
        )
        make = calibrating(model, calibration, run=run, progress=progress)
        candidates = of_methods(model.config, METHODS, WIDTHS, make)
        meter = Meter(model, calibration, candidates)
        table = sensitivity_table(
            profile_kl(meter, run=run, progress=progress),
            domains=tuple(meter.token_sets),
            sides=[option.label for option in candidates.sides],
            layers=candidates.layers,
        )
        costs = cost_table(candidates)
        problem = build_problem(table, costs, bits=BUDGETS[0], objective=arguments.objective)
        meter = Meter(model, heldout, candidates)
        done = {_key(record) for record in run.records(PLANS)}
        # Uniform plans last: the question is about the others.
        listed = sorted(contenders(problem, candidates), key=lambda each: each.kind == "uniform")
        progress.start("held-out data", len(listed))
        for each in listed:
            if (each.budget, each.kind, each.method) not in done:
                run.append(PLANS, _record(each, candidates, meter))
            progress.advance()
        progress.finish()


def _record(each: Contender, candidates: Candidates, meter: Meter) -> dict[str, Any]:
    return {
        "budget": each.budget,
        "kind": each.kind,
        "method": each.method,
        "labels": candidates.labels(each.plan.choice),
        "effective_bits": each.plan.effective_bits,
        "predicted_loss": each.plan.loss,
        "predicted_kl": dict(zip(meter.token_sets, each.plan.predicted_kl, strict=True)),
        "heldout": dict(zip(meter.token_sets, meter.document_kl(each.plan.choice), strict=True)),
    }


def _key(record: dict[str, Any]) -> tuple[float, str, str]:
    return record["budget"], record["kind"], record["method"]


def table(records: list[dict[str, Any]]) -> str:
    """Every plan, and how much more KL it has than the mixed plan of its budget, in pairs."""
    domains = list(records[0]["heldout"])
    header = ["budget", "plan", "bits", *(f"KL {d}" for d in domains)]
    header += [f"{d}: more than mixed" for d in domains]
    lines = [header, ["---"] * len(header)]
    for record in sorted(records, key=lambda r: (r["budget"], r["kind"], r["predicted_loss"])):
        mixed = next(
            r for r in records if r["budget"] == record["budget"] and r["kind"] == "mixed"
        )
        name = record["kind"] if record is mixed else f"{record['method']}, {record['kind']}"
        if record["kind"] == "uniform":
            name += f" {record['labels'][0].rpartition(' ')[2]}"
        cells = [f"{record['budget']:g}", name, f"{record['effective_bits']:.2f}"]
        cells += [f"{record['heldout'][d]['kl_nats']:.5f}" for d in domains]
        cells += ["" if record is mixed else _more(record, mixed, d) for d in domains]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _more(record: dict[str, Any], mixed: dict[str, Any], domain: str) -> str:
    mine, theirs = record["heldout"][domain], mixed["heldout"][domain]
    found = paired_mean_difference(
        mine["document_kl_nats"], theirs["document_kl_nats"], mine["document_tokens"]
    )
    error = (found.high - found.difference) / 1.96
    mark = "" if found.low <= 0 <= found.high else " *"
    return f"{found.difference:+.5f} ± {error:.5f}{mark}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/kvbits-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--objective", default="minimax", choices=["minimax", "balanced", "sum"])
    parser.add_argument("--table", action="store_true", help="only print the table of a run")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    found = (arguments.out / PLANS).read_text().splitlines()
    print(table([json.loads(line) for line in found]))
