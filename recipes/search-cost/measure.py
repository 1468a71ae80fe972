"""What a search costs and what it finds: quality of the verified front against tokens processed.

    python recipes/search-cost/measure.py --out runs/search-cost --device cuda --seconds 500
    python recipes/search-cost/measure.py --out runs/search-cost --table --figure figure.png

Every strategy, with three seeds, on one model. A measured plan is kept in ``memo.jsonl`` and never
measured again, whoever asks for it; tokens are charged to every strategy as if it were alone.
After a growing number of trials the front that a strategy knows by then is measured on held-out
data, which is not charged. A stopped run goes on where it was; ``--seconds`` stops it in time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits.cli.output import StageBars
from kvbits.evaluation import batching
from kvbits.evaluation.corpora import SetSize, TokenSet, default_sets, merge_sets
from kvbits.tuning.candidates import Candidates, of_mode
from kvbits.tuning.cluster import cluster_layers
from kvbits.tuning.costs import cost_table
from kvbits.tuning.identity import versions, weights_checksum
from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.progress import Silent
from kvbits.tuning.prune import pareto_sets
from kvbits.tuning.refine import refinement_candidates
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines, exact
from kvbits.tuning.search.corrected import CorrectedProposer, corrected
from kvbits.tuning.search.moead import MoeadProposer
from kvbits.tuning.search.optuna_samplers import OptunaProposer, nsga2, tpe
from kvbits.tuning.search.trials import Limit, Listed, Proposer, Space, measured_front
from kvbits.tuning.sensitivity import Meter, profile_errors, profile_kl, rounded
from kvbits.tuning.tables import Allocation, Choice, sensitivity_table

WIDTHS = (8, 4, 3, 2)
SEEDS = (0, 1, 2)
POPULATION = 20
MOST_BITS = 5.0  # fronts are compared up to here, from the smallest plan on
BUDGETS = (2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75, 5.0)
STRATEGIES = ("uniform", "exact", "exact+", "moead", "nsga2", "tpe", "random")
MEMO, POINTS = "memo.jsonl", "points.jsonl"


class Memo:
    """Measured plans of one token set collection, on disk; counts tokens as if nothing were kept.

    All domains are measured as one set, since on a GPU a pass costs the same for any of them.

    Args:
        model: The model.
        token_sets: One per domain.
        candidates: What a choice means.
        run: Keeps ``memo.jsonl``.
        split: Name of the data.
    """

    def __init__(
        self,
        model: Any,
        token_sets: Sequence[TokenSet],
        candidates: Candidates,
        run: RunDir,
        split: str,
    ) -> None:
        self.run, self.split = run, split
        self.sizes = [each.num_documents for each in token_sets]
        self.meter = Meter(model, [merge_sets(token_sets, name=split, domain="all")], candidates)
        self.known = {
            tuple(record["choice"]): record["domains"]
            for record in run.records(MEMO)
            if record["split"] == split
        }
        self.tokens_per_plan = tokens_of(token_sets)

    def __call__(self, choice: Choice) -> Sequence[Mapping[str, Any]]:
        if choice not in self.known:
            domains = self.measured(choice)
            self.run.append(MEMO, {"split": self.split, "choice": choice, "domains": domains})
            self.known[choice] = domains
        return self.known[choice]

    def measured(self, choice: Choice) -> list[dict[str, Any]]:
        """Measure a plan and tell the domains' documents apart again."""
        (every,) = self.meter.document_kl(choice)
        domains, start = [], 0
        for size in self.sizes:
            here = slice(start, start + size)
            kl, tokens = every["document_kl_nats"][here], every["document_tokens"][here]
            mean = sum(x * n for x, n in zip(kl, tokens, strict=True)) / sum(tokens)
            domains.append({"kl_nats": rounded(mean)})
            start += size
        return domains


def tokens_of(token_sets: Any) -> int:
    """Tokens that one pass over some sets runs through the model, padding included."""
    return sum(each.input_ids.numel() for each in token_sets)


class Lab(NamedTuple):
    """Everything the strategies share."""

    problem: Problem
    space: Space
    calibration: Memo
    heldout: Memo
    profile_tokens: float
    errors_tokens: float
    run: RunDir
    trials: int


class Point(NamedTuple):
    """What one strategy knows after some trials."""

    strategy: str
    seed: int
    trials: int
    tokens: float
    front: list[Allocation]


def points(lab: Lab, strategy: str, seed: int) -> Iterator[Point]:
    """Run a strategy and stop at growing numbers of trials."""
    if strategy == "exact":
        yield Point(strategy, seed, 0, lab.profile_tokens, solved(lab.problem))
        return
    proposer, spent, most = start(lab, strategy, seed)
    measured: dict[Choice, Any] = {}
    following = proposer.ask()
    for number in range(1, most + 1):
        assert following is not None, "every strategy has a first trial"
        domains = lab.calibration(following)
        measured[following] = {"kl_nats": [domain["kl_nats"] for domain in domains]}
        proposer.tell(following, measured[following])
        following = proposer.ask() if number < most else None
        if number in checkpoints(most) or following is None:
            tokens = spent + number * lab.calibration.tokens_per_plan
            front = (
                solved(corrected(lab.problem, measured))
                if strategy == "exact+"
                else measured_front(lab.problem, measured)
            )
            yield Point(strategy, seed, number, tokens, front)
        if following is None:
            return


def checkpoints(most: int) -> set[int]:
    """About three numbers of trials in a factor of ten."""
    return {round(10 ** (power / 3)) for power in range(1, 20) if 10 ** (power / 3) <= most}


def solved(problem: Problem) -> list[Allocation]:
    """The front that a table says."""
    return exact.solve_front(problem, BUDGETS)


def start(lab: Lab, strategy: str, seed: int) -> tuple[Proposer, float, int]:
    """A strategy's proposer, the tokens it needs before its first trial, and its most trials."""
    problem, space, limit = lab.problem, lab.space, Limit(bits=MOST_BITS)
    if strategy == "uniform":
        listed = [plan.choice for _, plan in baselines.uniform(problem)]
        return Listed(listed), 0, len(listed)
    if strategy == "random":
        choices = baselines.random_choices(problem, MOST_BITS, lab.trials, seed=1000 * seed)
        return Listed(choices), 0, len(choices)
    if strategy == "exact+":
        first = refinement_candidates(problem, 4.0)
        budgets = np.random.default_rng(seed).permutation(BUDGETS).tolist()
        most = max(len(first), lab.trials // 5)  # it has seen every budget a few times by then
        return CorrectedProposer(problem, first, budgets), lab.profile_tokens, most
    if strategy == "moead":
        moead = MoeadProposer(problem, space, limit, population=POPULATION, seed=seed)
        return moead, lab.errors_tokens, lab.trials
    sampler = {"nsga2": nsga2, "tpe": tpe}[strategy](POPULATION)
    proposer = OptunaProposer(problem, space, limit, sampler, seed=seed)
    return proposer, lab.errors_tokens, lab.trials


def hypervolume(lab: Lab, front: Sequence[Allocation]) -> float:
    """Return how far a front lies below the smallest uniform plan, on held-out data.

    The mean over effective bits, from the smallest plan to ``MOST_BITS``, of log10 of that plan's
    loss over the least loss of the front's plans within the bits: the area a front dominates over
    its width. One means a tenth of the loss.
    """
    layers = lab.problem.costs.units.shape[0]
    sizes = lab.problem.costs
    low = min(range(1, len(sizes.candidates)), key=lambda i: sizes.effective_bits((i,) * layers))
    smallest = (low,) * layers
    start, worst = sizes.effective_bits(smallest), loss(lab, smallest)
    steps = sorted(
        (max(plan.effective_bits, start), loss(lab, plan.choice))
        for plan in front
        if plan.effective_bits <= MOST_BITS
    )
    area, best, at = 0.0, worst, start
    for bits, value in [*steps, (MOST_BITS, np.inf)]:
        area += (bits - at) * np.log10(worst / best)
        best, at = min(best, value), bits
    return area / (MOST_BITS - start)


def loss(lab: Lab, choice: Choice) -> float:
    """The objective of a plan's KLs on held-out data, relative to uniform plans of 4 bits."""
    return max(lab.problem.score([domain["kl_nats"] for domain in lab.heldout(choice)]), 1e-9)


def measure(arguments: argparse.Namespace) -> None:
    """Run what the folder does not hold yet, for so many seconds."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to(arguments.device)
    if torch.device(arguments.device).type == "cuda":
        batching.MAX_BATCH_TOKENS = 2**14  # all documents of a plan in one pass
    size = SetSize(
        text_documents=arguments.documents,
        text_tokens=arguments.tokens,
        reasoning_documents=2 * arguments.documents,
        recall_documents=arguments.documents,
        recall_tokens=arguments.tokens,
    )
    calibration = default_sets(tokenizer, "calibration", size=size)
    heldout = default_sets(tokenizer, "heldout", size=size)
    run = RunDir(arguments.out)
    with run.lock(), StageBars() as progress:
        run.check_identity(
            {
                "model": {"name": Path(arguments.model).name, "weights": weights_checksum(model)},
                "data": [each.checksum for each in (*calibration, *heldout)],
                "device": torch.device(arguments.device).type,
                "trials": arguments.trials,
                "versions": versions(),
            }
        )
        candidates = of_mode(model.config, arguments.mode, WIDTHS)
        lab = set_up(model, candidates, calibration, heldout, run, progress, arguments.trials)
        done = {(r["strategy"], r["seed"], r["trials"]) for r in run.records(POINTS)}
        # Seed by seed, so that a run that is out of time has every strategy at the first ones.
        asked = [(s, seed) for seed in SEEDS for s in STRATEGIES if seed in seeds_of(s)]
        print(estimate(lab, asked), file=sys.stderr)
        deadline = started + arguments.seconds
        progress.start("strategies", len(asked))
        for strategy, seed in asked:
            for point in points(lab, strategy, seed):
                if time.monotonic() > deadline:
                    print(f"out of time at {strategy}, seed {seed}; run again", file=sys.stderr)
                    return
                if (strategy, seed, point.trials) not in done:
                    run.append(POINTS, as_record(lab, point))
            progress.advance()
        progress.finish()


def seeds_of(strategy: str) -> Sequence[int]:
    """One seed for what has nothing random in it."""
    return SEEDS[:1] if strategy in ("uniform", "exact") else SEEDS


def estimate(lab: Lab, asked: Sequence[tuple[str, int]]) -> str:
    """How long the rest takes at most: every trial a plan of its own, as many more held out.

    Fronts share plans, so that in fact about half as many are measured on held-out data.
    """
    layers = lab.problem.costs.units.shape[0]
    lab.calibration.measured((1,) * layers)  # makes the reference
    begun = time.monotonic()
    lab.calibration.measured((1,) * layers)
    seconds = time.monotonic() - begun
    plans = 2 * sum(start(lab, *one)[2] if one[0] != "exact" else 0 for one in asked)
    left = max(0, plans - len(lab.calibration.known) - len(lab.heldout.known))
    return f"{seconds:.2f} s a plan, at most {left} plans left: {left * seconds / 60:.1f} min"


def as_record(lab: Lab, point: Point) -> dict[str, Any]:
    """One line of ``points.jsonl``; measures the front on held-out data."""
    return {
        "strategy": point.strategy,
        "seed": point.seed,
        "trials": point.trials,
        "tokens": round(point.tokens),
        "plans_in_front": len(point.front),
        "hypervolume": round(hypervolume(lab, point.front), 5),
    }


def set_up(
    model: Any,
    candidates: Candidates,
    calibration: Sequence[TokenSet],
    heldout: Sequence[TokenSet],
    run: RunDir,
    progress: Any,
    trials: int,
) -> Lab:
    """Measure what all strategies start from."""
    meter = Meter(model, calibration, candidates)
    records = profile_kl(meter, run=run, progress=progress)
    errors = profile_errors(meter, run=run, progress=Silent())
    costs = cost_table(candidates)
    sides = [option.label for option in candidates.sides]
    table = sensitivity_table(
        records, domains=tuple(meter.token_sets), sides=sides, layers=candidates.layers
    )
    problem = build_problem(table, costs, bits=4.0, objective="minimax")
    e_o = np.array([record["e_o"] for record in errors]).reshape(costs.units.shape)
    kept = pareto_sets(costs, e_o)
    groups = cluster_layers(kept, e_o)
    tokens = tokens_of(calibration)
    # A pass that isolates layer l is restarted there, so that it runs the share of layers behind.
    num_layers = candidates.geometry.num_hidden_layers
    shares = sum((num_layers - layer) / num_layers for layer in candidates.layers)
    return Lab(
        problem,
        Space(groups, tuple(kept[group[0]] for group in groups)),
        Memo(model, calibration, candidates, run, "calibration"),
        Memo(model, heldout, candidates, run, "heldout"),
        profile_tokens=tokens * (1 + len(sides) * shares),
        errors_tokens=2 * tokens,  # the reference and one pass in which attention errors are taken
        run=run,
        trials=trials,
    )


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds at every number of trials."""
    header = ("strategy", "trials", "million tokens", "hypervolume", "seeds")
    lines = [header, ("---",) * len(header)]
    for strategy in STRATEGIES:
        mine = [record for record in records if record["strategy"] == strategy]
        for trials in sorted({record["trials"] for record in mine}):
            same = [record for record in mine if record["trials"] == trials]
            values = [record["hypervolume"] for record in same]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            tokens = same[0]["tokens"] / 1e6
            cells = (strategy, str(trials), f"{tokens:.2f}", f"{np.mean(values):.3f}{spread}")
            lines.append((*cells, str(len(values))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, or none of one that did not come so far."""
    path = folder / POINTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(records: Sequence[Mapping[str, Any]], strategy: str) -> list[tuple[float, float, float]]:
    """Million tokens, mean hypervolume and its standard deviation over seeds, by trials.

    Numbers of trials that not every seed of the strategy reached are left out: a strategy may end
    early under one seed.
    """
    mine = [record for record in records if record["strategy"] == strategy]
    seeds = {record["seed"] for record in mine}
    found = []
    for trials in sorted({record["trials"] for record in mine}):
        same = [record for record in mine if record["trials"] == trials]
        if {record["seed"] for record in same} == seeds:
            values = [record["hypervolume"] for record in same]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            found.append((same[0]["tokens"] / 1e6, float(np.mean(values)), spread))
    return found


def reached(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say at how many tokens each strategy has what MOEA/D ends with, as a share of its tokens."""
    target = curve(records, "moead")
    if not target:
        return
    tokens, quality, _ = target[-1]
    yield f"moead ends at {quality:.3f} after {tokens:.2f} million tokens; as good or better:"
    for strategy in STRATEGIES:
        hits = [point[0] for point in curve(records, strategy) if point[1] >= quality]
        if hits and strategy != "moead":
            yield f"- {strategy} at {hits[0]:.3f} million tokens, {tokens / hits[0]:.1f} x fewer"


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Hypervolume against tokens, a line a strategy, a band of one deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    for index, strategy in enumerate(STRATEGIES):
        found = np.array(curve(records, strategy)).reshape(-1, 3)
        if not len(found):
            continue
        look = {"color": f"C{index}", "marker": "osD^vP*"[index % 7], "markersize": 4}
        tokens, mean, spread = found.T
        axes.plot(tokens, mean, label=strategy, **look)
        axes.fill_between(tokens, mean - spread, mean + spread, color=look["color"], alpha=0.15)
    axes.set(
        xscale="log",
        xlabel="million tokens run through the model",
        ylabel="hypervolume of the held-out front, decades of KL",
        title="kvbits-tiny: what a search costs and what it finds",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/kvbits-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--mode", default="per_token", choices=["per_token", "kivi"])
    parser.add_argument("--trials", type=int, default=200, help="of every searching strategy")
    parser.add_argument(
        "--documents", type=int, default=4, help="of text and of recall; default 4"
    )
    parser.add_argument("--tokens", type=int, default=384, help="tokens of each of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--table", action="store_true", help="only print the table of a run")
    parser.add_argument("--figure", type=Path, help="draw the curves to this file (matplotlib)")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    found = read_points(arguments.out)
    print(table(found))
    for line in reached(found):
        print(line)
    if arguments.figure:
        draw(found, arguments.figure)
