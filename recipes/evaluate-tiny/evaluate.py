"""Run kvbits-tiny through the benchmarks on every cache: one command that goes on where it was.

    python recipes/evaluate-tiny/evaluate.py --data DIR --out runs/evaluate-tiny --minutes 6

``DIR`` holds lambada_test.jsonl, blimp_100.jsonl and wikitext2_test.raw (``kvbits score --list
--json`` says where to get them); the other tasks are generated. Every plan is a folder of
``--out`` with a folder for every benchmark, as ``kvbits score -o`` writes them, so that
``kvbits compare-evals`` and ``kvbits grid`` read them. ``table.py`` prints the table of all.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvbits import CachePlan
from kvbits.cli.models import load_model
from kvbits.evaluation.benchmarks import Benchmark, build_benchmark
from kvbits.evaluation.benchmarks.running import RunSettings, make_items
from kvbits.evaluation.benchmarks.scored import scored
from kvbits.evaluation.benchmarks.source import Source, open_source
from kvbits.evaluation.corpora import default_sets
from kvbits.evaluation.records import read_records
from kvbits.methods import build_method

ROOT = Path(__file__).resolve().parents[2]
FULL = "16 bits"
WIDTHS = (4, 3, 2)
# What `kvbits tune` found at 4.5 effective bits, as recorded by recipes/kvbits-tiny/headroom.py.
TUNED = {
    "tuned, KIVI mode": "K3V4 0,6; K4V4 1,9-11; K3V3 2-3,7-8; K4V3 4-5; 4.50 effective bits",
    "tuned, per-token mode": "K4V2 0,2; K8V4 1; K4V4 3-11; 4.50 effective bits",
}
HEADROOM = ROOT / "recipes" / "kvbits-tiny" / "results" / "headroom.jsonl"


class Benched(NamedTuple):
    """A benchmark, and how many of its items are run: of each part, where it has parts."""

    benchmark: Benchmark
    limit: int


def benchmarks(lengths: str, window: int) -> list[Benched]:
    """What every plan is run through, chosen to take about twenty seconds of an H200 a plan.

    Args:
        lengths: tokens of the pass key's prompts.
        window: tokens of a window of wikitext-2.
    """
    grid = {"lengths": lengths, "depths": 5, "n": 4}
    recall = {"tasks": "key_value,lines,facts,variables", "length": 1024, "n": 40}
    return [
        Benched(build_benchmark("wikitext2", window=window), 24),
        Benched(build_benchmark("lambada"), 500),
        Benched(build_benchmark("blimp"), 10),
        Benched(build_benchmark("passkey", **grid), 4),
        Benched(build_benchmark("recall", **recall), 40),
        Benched(build_benchmark("arithmetic", n=200), 200),
    ]


Build = Callable[[Any, list[Any]], CachePlan | None]


def plans(extra: dict[str, Path]) -> dict[str, Build]:
    """Every plan by name: what makes it from the model and calibration documents."""
    made: dict[str, Build] = {FULL: lambda model, documents: None}
    for bits in (8, *WIDTHS):
        made[f"per token K{bits}V{bits}"] = _uniform(bits)
    for bits in WIDTHS:
        made[f"KIVI K{bits}V{bits}"] = _method("kivi", bits, residual_length=32, flush="joint")
    for bits in WIDTHS:
        made[f"KVQuant K{bits}V{bits}"] = _method("kvquant", bits, key_ranges="block")
    for bits in WIDTHS:
        made[f"KVarN K{bits}V{bits}"] = _method("kvarn", bits)
    made |= {name: _recorded(description) for name, description in TUNED.items()}
    return made | {name: _file(path) for name, path in extra.items()}


def _uniform(bits: int) -> Build:
    return lambda model, documents: CachePlan.uniform(model.config, bits, bits)


def _method(name: str, bits: int, **settings: Any) -> Build:
    method = build_method(name, key_bits=bits, value_bits=bits, **settings)
    return lambda model, documents: method.calibrate(model, documents)


def _recorded(description: str) -> Build:
    """The plan of a record with its widths."""

    def build(model: Any, documents: list[Any]) -> CachePlan:
        for record in read_records(HEADROOM):
            if record.plan and record.plan.description == description and record.plan.pairs:
                pairs, mode = record.plan.pairs, record.plan.mode
                return CachePlan.from_pairs(model.config, pairs, mode or "per_token")
        raise SystemExit(f"{HEADROOM} must hold the plan {description!r}, got others")

    return build


def _file(path: Path) -> Build:
    def build(model: Any, documents: list[Any]) -> CachePlan:
        plan = CachePlan.load(path)
        plan.check(model.config)
        return plan

    return build


def slug(name: str) -> str:
    """Name of a plan's folder."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


def keep_plan(path: Path, build: Build, model: Any, documents: list[Any]) -> CachePlan | None:
    """Make a plan once: a calibrated one may not come out the same to the last bit again."""
    if path.exists():
        return CachePlan.load(path)
    plan = build(model, documents)
    if plan is not None:
        plan.save(path)
    return plan


def pending(out: Path, names: list[str], chosen: list[Benched]) -> Iterator[tuple[str, Benched]]:
    """What is not finished, plan by plan."""
    for name in names:
        for benched in chosen:
            done = out / slug(name) / benched.benchmark.name
            if not (done / f"{benched.benchmark.name}.results.json").exists():
                yield name, benched


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing; returns how much is still missing when the time is over."""
    stop = time.monotonic() + 60 * arguments.minutes
    extra = dict(item.split("=", 1) for item in arguments.plan)
    known = plans({name: Path(path) for name, path in extra.items()})
    names = [name for name in known if not arguments.only or re.search(arguments.only, name)]
    chosen = [
        Benched(each, min(limit, arguments.limit) if arguments.limit else limit)
        for each, limit in benchmarks(arguments.lengths, arguments.window)
    ]
    todo = list(pending(arguments.out, names, chosen))
    if not todo:
        return 0
    loaded = load_model(str(arguments.model), arguments.device, arguments.dtype)
    sets = default_sets(loaded.tokenizer, "calibration")
    documents = [document for each in sets for document in each.documents]
    items: dict[str, Any] = {}
    sources: dict[str, Source] = {}  # one each: a run records the files it read itself
    for number, (name, (benchmark, limit)) in enumerate(todo):
        if time.monotonic() > stop:
            return len(todo) - number
        settings = RunSettings(limit=limit, batch_size=arguments.batch_size)
        if benchmark.name not in items:
            source = sources[benchmark.name] = open_source(arguments.data)
            items[benchmark.name] = make_items(benchmark, source, loaded.tokenizer, settings)
        folder = arguments.out / slug(name)
        started = time.monotonic()
        plan = keep_plan(folder / "plan.json", known[name], loaded.model, documents)
        scored(
            benchmark,
            items[benchmark.name],
            loaded.model,
            loaded.tokenizer,
            plan,
            settings,
            sources[benchmark.name],
            facts={"model": arguments.model.name, "plan_name": name},
            folder=folder / benchmark.name,
        )
        print(f"{name}, {benchmark.name}: {time.monotonic() - started:.1f} s", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--data", type=Path, required=True, help="folder with the data files")
    made.add_argument("--out", type=Path, default=Path("runs/evaluate-tiny"))
    made.add_argument("--model", type=Path, default=ROOT / "models" / "kvbits-tiny")
    made.add_argument("--limit", type=int, help="items of every part at most, for a CPU")
    made.add_argument("--lengths", default="1024,2048,4000", help="tokens of pass key prompts")
    made.add_argument("--window", type=int, default=2048, help="tokens of wikitext-2 windows")
    made.add_argument("--minutes", type=float, default=1e9, help="begin nothing after them")
    made.add_argument("--only", help="plans whose names this pattern finds")
    made.add_argument(
        "--plan", action="append", default=[], metavar="NAME=FILE", help="a further plan"
    )
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    return made


if __name__ == "__main__":
    left = run(parser().parse_args())
    if left:
        sys.exit(f"{left} measurements are left; the same command goes on with them")
