"""Which calibration predicts the accuracy of tasks that it has not seen?

    python recipes/calibration-domains/measure.py --out runs/domains --device cuda --seconds 300
    python recipes/calibration-domains/measure.py --out runs/domains --table --figure figure.png

Random plans of three sizes solve held-out tasks; what every domain and every kind of sensitivity
expected of them is ranked against their accuracy. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.cli.output import StageBars
from kvbits.evaluation import batching
from kvbits.evaluation.accuracy import run_task
from kvbits.evaluation.corpora import SetSize
from kvbits.evaluation.sources import Wanted, counting_all, source_sets
from kvbits.evaluation.tasks import TASKS
from kvbits.evaluation.token_set import TokenSet
from kvbits.tuning.candidates import Candidates, of_mode
from kvbits.tuning.costs import cost_table
from kvbits.tuning.fisher import profile_fisher
from kvbits.tuning.identity import versions, weights_checksum
from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines
from kvbits.tuning.sensitivity import Meter, profile_errors, profile_kl, rounded
from kvbits.tuning.tables import Choice, FloatArray, sensitivity_table

WIDTHS = (4, 3, 2)
BUDGETS = (2.75, 3.25, 3.75)
DOMAINS = ("text", "reasoning", "recall", "code", "chat")
ASKED = ("reasoning", "recall", "chat")  # documents with questions, of which all may count
DEFAULT = ("text", "reasoning", "recall")
# Reasoning is calibrated on arithmetic and recall on key_value and passkey: the other three tasks
# are of kinds that no calibration saw, and no problem of arithmetic is in both splits.
HELDOUT = ("arithmetic", "copy", "facts", "lines")
PLANS = "plans.jsonl"
RESAMPLES = 2000


class Predictor(NamedTuple):
    """What one choice of calibration expects of a plan: a sum over rows."""

    name: str
    table: FloatArray  # [rows, P]

    def __call__(self, choice: Choice) -> float:
        return float(self.table[range(len(choice)), list(choice)].sum())


def calibration(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[TokenSet]:
    """All domains with their answers counted, and again with everything counted."""
    size = SetSize(
        text_documents=arguments.documents,
        text_tokens=arguments.tokens,
        reasoning_documents=3 * arguments.documents,
        recall_documents=arguments.documents,
        recall_tokens=arguments.tokens,
        chat_documents=2 * arguments.documents,
    )
    wanted = Wanted(tokenizer, model, "calibration", size, 0, 64)
    sets = source_sets(DOMAINS, wanted, "answers")
    whole = [counting_all(each) for each in sets if each.domain in ASKED]
    return [*sets, *(each._replace(domain=f"{each.domain}, all tokens") for each in whole)]


def predictors(meter: Meter, problem: Problem, profiles: Mapping[str, Any]) -> list[Predictor]:
    """Every domain by isolated KL and by Fisher, KVTuner's errors, joint choices, and size."""
    names, costs = tuple(meter.token_sets), problem.costs
    found = [
        Predictor(f"{kind}: {name}", table)
        for kind in ("kl", "fisher")
        for name, table in zip(names, profiles[kind], strict=True)
    ]
    found += [Predictor(name, profiles[name]) for name in ("e_k", "e_v", "e_a", "e_o")]
    return [*found, Predictor("size alone", -costs.units.astype(float))]


def joint(problem: Problem, names: Sequence[str], choice: Choice) -> dict[str, float]:
    """The tuner's own objectives over its three default domains."""
    rows = [names.index(name) for name in DEFAULT]
    loss = problem.predicted_kl(choice)[rows] / problem.norms[rows]
    return {"kl: worst of three": float(loss.max()), "kl: mean of three": float(loss.mean())}


def profile(meter: Meter, run: RunDir, progress: Any) -> tuple[Problem, dict[str, Any]]:
    """Measure everything that predictors are made of."""
    candidates: Candidates = meter.candidates
    costs = cost_table(candidates)
    shared = {
        "domains": tuple(meter.token_sets),
        "sides": [option.label for option in candidates.sides],
        "layers": candidates.layers,
    }
    measured = {
        "kl": profile_kl(meter, run=run, progress=progress),
        "fisher": profile_fisher(meter, run=run, progress=progress),
    }
    tables: dict[str, Any] = {
        kind: sensitivity_table(records, **shared).candidate_kl(costs.candidates)
        for kind, records in measured.items()
    }
    errors = profile_errors(meter, run=run, progress=progress)
    for name in ("e_k", "e_v", "e_a", "e_o"):
        tables[name] = np.array([r[name] for r in errors]).reshape(costs.units.shape)
    return build_problem(tables["kl"], costs, bits=3.25, objective="minimax"), tables


def choices(problem: Problem, plans: int) -> list[tuple[float, Choice]]:
    """Distinct random plans that fill each budget, the budgets in turn."""
    found: dict[Choice, float] = {}
    for seed in range(10 * plans):
        bits = BUDGETS[seed % len(BUDGETS)]
        plan = baselines.random_plan(problem, bits, seed=seed)
        if plan is not None:
            found.setdefault(plan.choice, bits)
        if len(found) == plans:
            break
    return [(bits, choice) for choice, bits in found.items()]


def measure(arguments: argparse.Namespace) -> None:
    """Run what the folder does not hold yet, for so many seconds."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to(arguments.device)
    if torch.device(arguments.device).type == "cuda":
        batching.MAX_BATCH_TOKENS = 2**14
    sets = calibration(model, tokenizer, arguments)
    run = RunDir(arguments.out)
    with run.lock(), StageBars() as progress:
        run.check_identity(
            {
                "model": {"name": Path(arguments.model).name, "weights": weights_checksum(model)},
                "data": {each.domain: each.checksum for each in sets},
                "problems": arguments.n,
                "versions": versions(),
            }
        )
        meter = Meter(model, sets, of_mode(model.config, arguments.mode, WIDTHS))
        problem, profiles = profile(meter, run, progress)
        asked = [(16.0, (0,) * len(problem.costs.units)), *choices(problem, arguments.plans)]
        done = {tuple(record["choice"]) for record in run.records(PLANS)}
        progress.start("plans", len(asked))
        progress.advance(len(done))
        for bits, choice in asked:
            if choice in done:
                continue
            if time.monotonic() - started > arguments.seconds:
                print("out of time; run again", file=sys.stderr)
                break
            begun = time.monotonic()
            left = len(asked) - len(run.records(PLANS))
            expected = {p.name: p(choice) for p in predictors(meter, problem, profiles)}
            expected |= joint(problem, tuple(meter.token_sets), choice)
            run.append(
                PLANS,
                {
                    "choice": choice,
                    "labels": meter.candidates.labels(choice),
                    "budget": bits,
                    "effective_bits": problem.costs.effective_bits(choice),
                    "expected": {name: rounded(value) for name, value in expected.items()},
                    "correct": solved(model, tokenizer, meter.candidates, choice, arguments.n),
                    "seconds": round(time.monotonic() - begun, 2),
                },
            )
            progress.advance()
            took = time.monotonic() - begun
            print(f"{took:.1f} s a plan, {took * (left - 1) / 60:.1f} min left", file=sys.stderr)
        progress.finish()


def solved(
    model: Any, tokenizer: Any, candidates: Candidates, choice: Choice, n: int
) -> dict[str, list[bool]]:
    """Which problems of the held-out tasks a plan solves."""
    plan = candidates.plan(choice) if any(choice) else None
    return {
        name: list(
            run_task(
                *(model, tokenizer, TASKS[name]()), n=n, split="test", plan=plan, batch_size=n
            ).correct
        )
        for name in HELDOUT
    }


class Correlation(NamedTuple):
    """Spearman's rank correlation with a bootstrap interval over plans."""

    value: float
    low: float
    high: float


def spearman(x: FloatArray, y: FloatArray) -> float:
    """Rank correlation, ties averaged; 0 where one of the two is constant."""
    a, b = rankdata(x), rankdata(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def correlation(x: FloatArray, y: FloatArray, groups: FloatArray | None = None) -> Correlation:
    """Spearman of two columns over plans, 95 % percentile bootstrap of the plans.

    Args:
        x: ``[plans]``.
        y: ``[plans]``.
        groups: If given, the mean over the groups of the correlation within each.
    """
    generator = np.random.default_rng(0)

    def value(index: Any) -> float:
        if groups is None:
            return spearman(x[index], y[index])
        each = [index[groups[index] == group] for group in np.unique(groups)]
        found = [spearman(x[i], y[i]) for i in each if len(i) > 2]
        return float(np.mean(found)) if found else float("nan")

    whole = value(np.arange(len(x)))
    if np.isnan(whole):  # too few plans of every size
        return Correlation(whole, whole, whole)
    drawn = [value(generator.integers(0, len(x), len(x))) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Correlation(whole, float(low), float(high))


def accuracies(records: Sequence[Mapping[str, Any]], task: str | None = None) -> FloatArray:
    """Accuracy of every plan on a task, or its mean over the tasks, ``[plans]``."""
    names = HELDOUT if task is None else (task,)
    return np.array([np.mean([np.mean(r["correct"][name]) for name in names]) for r in records])


def reliability(records: Sequence[Mapping[str, Any]]) -> float:
    """Rank correlation that accuracy has with itself on as many other problems.

    From that of its two halves, by Spearman and Brown's formula: no predictor can be expected to
    do better than its root.
    """
    halves = [
        np.array([np.mean([np.mean(r["correct"][t][i::2]) for t in HELDOUT]) for r in records])
        for i in range(2)
    ]
    half = spearman(*halves)
    return 2 * half / (1 + half)


def ranking(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Correlation, Correlation]]:
    """Every predictor with its correlation over all plans and within sizes, best first.

    Expected losses are turned round, so that 1 is the perfect prediction.
    """
    packed = [record for record in records if record["budget"] < 16]
    accuracy, sizes = accuracies(packed), np.array([record["budget"] for record in packed])
    found = []
    for name in packed[0]["expected"]:
        expected = -np.array([record["expected"][name] for record in packed])
        pair = correlation(expected, accuracy), correlation(expected, accuracy, sizes)
        found.append((name, *pair))
    return sorted(found, key=lambda row: -row[1].value)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: predictors against mean accuracy, all plans, within sizes, and by task."""
    packed = [record for record in records if record["budget"] < 16]
    header = ("calibration", f"all {len(packed)} plans", "within a size", *HELDOUT)
    lines = [header, ("---",) * len(header)]
    for name, overall, within in ranking(records):
        expected = -np.array([record["expected"][name] for record in packed])
        tasks = [f"{spearman(expected, accuracies(packed, task)):.2f}" for task in HELDOUT]
        cells = (f"{c.value:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in (overall, within))
        lines.append((name, *cells, *tasks))
    spread = accuracies(packed)
    said = [
        f"accuracy of the plans, mean of tasks: {spread.min():.3f} to {spread.max():.3f}; "
        f"with itself on other problems it would correlate {reliability(packed):.2f}"
    ]
    full = [record for record in records if record["budget"] == 16]
    said += [f"full precision: {accuracies([record])[0]:.3f}" for record in full]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *said])


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar a predictor with its interval, within sizes beside over all plans."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = ranking(records)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1.5), dpi=110)
    places = np.arange(len(rows))
    for shift, index, label in ((0.18, 1, "all plans"), (-0.18, 2, "within a size")):
        values = np.array([row[index] for row in rows])
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        axes.errorbar(values[:, 0], places + shift, xerr=errors, fmt="o", label=label, capsize=2)
    axes.set_yticks(places, [row[0] for row in rows])
    axes.set(xlabel="Spearman correlation with the accuracy of held-out tasks [95 %]")
    axes.axvline(0, color="grey", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/kvbits-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--mode", default="per_token", choices=["per_token", "kivi"])
    parser.add_argument("--plans", type=int, default=42)
    parser.add_argument("-n", type=int, default=128, help="problems of each task")
    parser.add_argument("--documents", type=int, default=4, help="of text and of recall")
    parser.add_argument("--tokens", type=int, default=384, help="tokens of each of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--table", action="store_true", help="only print the table of a run")
    parser.add_argument("--figure", type=Path, help="draw to this file (matplotlib)")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    path = arguments.out / PLANS
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if sum(record["budget"] < 16 for record in found) > 2:
        print(table(found))
        if arguments.figure:
            draw(found, arguments.figure)
