"""Measure every method of kvbits on one model, at 2, 3 and 4 nominal bits.

    python recipes/methods/measure.py --out results.jsonl [--only kivi,kvarn] [--problems 200]

Forward KL, flips and perplexity on held-out text, arithmetic and recall, through the packed
cache, and with ``--problems N`` the accuracy of generated answers: passkey, recall, arithmetic.
``figure.py`` joins the JSON lines of a plan. Every column of a row is a line of its own, and what
the file already holds is left out: a stopped run goes on where it was, and rows and columns can be
measured apart and in any order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figure import EXACT, read_records
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbits
from kvbits import CachePlan
from kvbits.errors import MissingLibraryError
from kvbits.evaluation.accuracy import run_task
from kvbits.evaluation.corpora import default_sets, text_set
from kvbits.evaluation.divergence import measure
from kvbits.evaluation.records import library_versions
from kvbits.evaluation.tasks import ArithmeticChain, KeyValueRecall, Passkey, Task
from kvbits.evaluation.texts import bundled_texts
from kvbits.methods import METHODS, build_method

WIDTHS = (2, 3, 4)
# Answers that a damaged cache gets wrong: one number in prose, one entry of many, and a chain of
# thought. The first two are about 1000 tokens, so that no residual holds them.
TASKS: tuple[Task, ...] = (Passkey(length=1024), KeyValueRecall(num_pairs=60), ArithmeticChain())
DIVERGENCE = "divergence"  # on all three domains
COLUMNS = (DIVERGENCE, *(task.name for task in TASKS))


class Subject(NamedTuple):
    """A method under one setting."""

    method: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Method and settings in one word."""
        parts = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.method, *parts])

    def plan(self, bench: Bench) -> CachePlan | None:
        """The plan of a model; None for full precision."""
        if self.method == EXACT:
            return None
        method = build_method(self.method, **self.settings)
        return method.calibrate(bench.model, bench.calibration)


# What methods do without the ranges or orders of channels that calibration finds.
WITHOUT_FITTING = {"kvquant": [{"key_ranges": "block"}], "skvq": [{"reorder": "none"}]}

# One of each kind, for a machine without a GPU.
TWO_BITS = {"key_bits": 2, "value_bits": 2}
CPU_SUBSET = (
    Subject(EXACT, {}),
    *(Subject(name, TWO_BITS) for name in ("per-token", "kivi", "skvq", "turboquant", "kvarn")),
    Subject("qaq", {}),
    Subject("int8", {}),
)


def subjects() -> Iterator[Subject]:
    """Full precision, and every method at every width it has; where there is none, as it is."""
    yield Subject(EXACT, {})
    for name, method in METHODS.items():
        if name == "kvtuner":  # its plans are for models of their own
            continue
        if "key_bits" not in method.model_fields:
            yield Subject(name, {})
            continue
        for bits in WIDTHS:
            settings = {"key_bits": bits, "value_bits": bits}
            if _is_offered(name, settings):
                yield Subject(name, settings)
        for own in WITHOUT_FITTING.get(name, ()):
            yield from (Subject(name, {"key_bits": b, "value_bits": b, **own}) for b in WIDTHS)
    yield Subject("kvquant", {"key_bits": 2, "value_bits": 2, "residual_length": 96})
    yield Subject("skvq", {"key_bits": 2, "value_bits": 1.5})
    yield Subject("skvq", {"key_bits": 2, "value_bits": 1.5, "reorder": "none"})
    yield Subject("skvq", {"key_bits": 2, "value_bits": 1.5, "clip_ratio": "search"})
    yield Subject("kivi", {"promoted_share": 0.125, "sink_tokens": 32})  # Kitty
    yield Subject("qaq", {"level": "head"})
    yield Subject("qaq", {"level": "layer"})
    yield Subject("qaq", {"formula": "code"})
    yield Subject("qaq", {"outlier_share": 0.0})


def _is_offered(name: str, settings: dict[str, Any]) -> bool:
    try:
        build_method(name, **settings)
    except ValueError:
        return False
    return True


class Bench:
    """The model, and what it is measured on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        self.model = model.eval().to(arguments.device)
        sets = default_sets(self.tokenizer, "calibration")
        self.calibration = [document for each in sets for document in each.documents]
        _, *domains = default_sets(self.tokenizer, "heldout")
        text = text_set(
            self.tokenizer,
            None if arguments.text else bundled_texts("heldout"),
            path=arguments.text,
            name=arguments.text.stem if arguments.text else "bundled",
            documents=arguments.documents,
            max_tokens=arguments.tokens,
        )
        self.sets = (text, *domains)
        self.context = int(text.input_ids.shape[1])
        self.versions = {
            **library_versions(),
            "kvbits": kvbits.__version__,
            "device": torch.cuda.get_device_name() if self.model.device.type == "cuda" else "cpu",
        }

    @property
    def texts(self) -> dict[str, str]:
        """Checksums of what divergence is measured on."""
        return {each.name: each.checksum for each in self.sets}

    def divergence(self, subject: Subject, plan: CachePlan | None) -> dict[str, Any]:
        """How far a plan moves predictions, and how large its cache is."""
        bits = 16.0 if plan is None else plan.effective_bits
        at_context = 16.0 if plan is None else plan.effective_bits_at(self.context)
        record: dict[str, Any] = {
            "method": subject.method,
            "settings": subject.settings,
            "model": Path(self.arguments.model).name,
            "effective_bits": round(bits, 4),
            "context": self.context,
            "effective_bits_at_context": round(at_context, 4),
            "texts": self.texts,
            "versions": self.versions,
        }
        for token_set in self.sets:
            found = measure(self.model, plan, token_set)
            record[token_set.domain] = {
                "kl_nats": found.kl_nats,
                "kl_se": found.kl_se,
                "top1_agreement": found.top1_agreement,
                "flips": found.flips,
                "perplexity": found.perplexity,
                "perplexity_16bit": found.perplexity_reference,
                "num_tokens": found.num_tokens,
                "num_documents": found.num_documents,
            }
        return record

    def accuracy(self, plan: CachePlan | None, task: Task) -> dict[str, Any]:
        """Share of generated problems that are solved through the cache, with standard errors."""
        solved = run_task(
            self.model,
            self.tokenizer,
            task,
            n=self.arguments.problems,
            plan=plan,
            batch_size=self.arguments.batch_size,
        )
        found = {
            "accuracy": solved.accuracy,
            "standard_error": solved.standard_error,
            "n": self.arguments.problems,
            "seconds": round(solved.seconds, 1),
        }
        return {"accuracy": {task.name: found}, "accuracy_versions": self.versions}


def run(arguments: argparse.Namespace, wanted: Sequence[Subject]) -> None:
    """Measure what the output file does not hold yet, or with ``--list`` only name it."""
    held = {each["subject"]: each for each in read_records(arguments.out)}
    lacking = [(each, _lacking(held.get(each.name, {}), arguments)) for each in wanted]
    todo = [(subject, columns) for subject, columns in lacking if columns]
    if arguments.list:
        for subject, columns in todo:
            print(f"{subject.name}: {', '.join(columns)}")
        return
    bench = Bench(arguments)
    others = {str(each["texts"]) for each in held.values() if "texts" in each} - {str(bench.texts)}
    if others:
        raise SystemExit(
            f"--out must not hold records of other texts, got {arguments.out}; give the --text, "
            "--documents and --tokens it was made with, or another file"
        )
    tasks = {task.name: task for task in TASKS}
    for subject, columns in track(todo, "measuring"):
        try:
            plan = subject.plan(bench)
            for column in columns:
                if column == DIVERGENCE:
                    record = bench.divergence(subject, plan)
                else:
                    record = bench.accuracy(plan, tasks[column])
                add(arguments.out, subject, record)
        except MissingLibraryError as error:
            print(f"{subject.name}: left out, {error}", flush=True)


def _lacking(known: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Wanted columns of a row that are still to be measured."""
    found = known.get("accuracy", {})
    columns = [] if "texts" in known else [DIVERGENCE]
    if arguments.problems:
        columns += [
            task.name for task in TASKS if found.get(task.name, {}).get("n") != arguments.problems
        ]
    return [each for each in columns if not arguments.columns or each in arguments.columns]


def add(path: Path, subject: Subject, record: dict[str, Any]) -> None:
    """Append one line, and say what it holds."""
    with path.open("a") as file:
        file.write(json.dumps({"subject": subject.name, **record}) + "\n")
    if "text" in record:
        text = record["text"]
        found = f"{record['effective_bits']:.2f} bits, "
        found += f"text KL {text['kl_nats']:.5f} ± {text['kl_se']:.5f}"
    else:
        found = ", ".join(
            f"{name} {100 * each['accuracy']:.1f} ± {100 * each['standard_error']:.1f} % "
            f"(n = {each['n']})"
            for name, each in record["accuracy"].items()
        )
    print(f"{subject.name}: {found}", flush=True)


def parse() -> argparse.ArgumentParser:
    """Options that recipes of this kind share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/kvbits-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="held-out text; default: the bundled one")
    parser.add_argument("--documents", type=int, help="windows of text; default: all")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of a window")
    parser.add_argument("--problems", type=int, default=0, help="problems of each task to solve")
    parser.add_argument("--batch-size", type=int, default=64, help="problems solved at once")
    parser.add_argument("--list", action="store_true", help="only name what is missing")
    parser.add_argument(
        "--columns",
        type=_columns,
        default=(),
        help=f"some of {', '.join(COLUMNS)}, separated by commas; default: all",
    )
    return parser


def _columns(text: str) -> tuple[str, ...]:
    columns = tuple(text.split(","))
    if not set(columns) <= set(COLUMNS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(COLUMNS)}, got {text}")
    return columns


def matches(subject: Subject, patterns: str | None) -> bool:
    """Whether a row's method or name is one of some patterns, separated by commas."""
    return patterns is None or any(
        fnmatchcase(name, pattern)
        for pattern in patterns.split(",")
        for name in (subject.method, subject.name)
    )


if __name__ == "__main__":
    parser = parse()
    parser.add_argument(
        "--only", help="methods, or patterns of rows such as '*key_bits=2 value_bits=2*'"
    )
    parser.add_argument("--cpu", action="store_true", help="only CPU_SUBSET, one of each kind")
    arguments = parser.parse_args()
    chosen = CPU_SUBSET if arguments.cpu else tuple(subjects())
    run(arguments, [each for each in chosen if matches(each, arguments.only)])
