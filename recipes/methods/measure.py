"""Measure every method of kvbits on one model, at 2, 3 and 4 nominal bits.

    python recipes/methods/measure.py --out results.jsonl [--only kivi,kvarn] [--problems 200]

Forward KL, flips and perplexity on held-out text, arithmetic and recall, through the packed
cache, and with ``--problems N`` the accuracy of generated answers: passkey, recall, arithmetic.
``figure.py`` joins the JSON lines of a plan. What the file already holds is left out, so a stopped
run goes on where it was, and accuracies can be added later.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
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
    yield Subject("skvq", {"key_bits": 2, "value_bits": 1.5})
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

    def accuracy(self, plan: CachePlan | None) -> dict[str, Any]:
        """Share of generated problems that are solved through the cache, with standard errors."""
        n = self.arguments.problems
        accuracies = {}
        for task in TASKS:
            solved = run_task(
                self.model,
                self.tokenizer,
                task,
                n=n,
                plan=plan,
                batch_size=self.arguments.batch_size,
            )
            accuracies[task.name] = {
                "accuracy": solved.accuracy,
                "standard_error": solved.standard_error,
                "n": n,
                "seconds": round(solved.seconds, 1),
            }
        return {"accuracy": accuracies, "accuracy_versions": self.versions}


def run(arguments: argparse.Namespace, wanted: list[Subject]) -> None:
    """Measure what the output file does not hold yet."""
    bench = Bench(arguments)
    held = {each["subject"]: each for each in read_records(arguments.out)}
    others = {str(each["texts"]) for each in held.values() if "texts" in each} - {str(bench.texts)}
    if others:
        raise SystemExit(
            f"--out must not hold records of other texts, got {arguments.out}; give the --text, "
            "--documents and --tokens it was made with, or another file"
        )
    todo = [each for each in wanted if _lacking(held.get(each.name, {}), arguments.problems)]
    for subject in track(todo, "measuring"):
        plan = subject.plan(bench)
        try:
            if "texts" not in held.get(subject.name, {}):
                add(arguments.out, subject, bench.divergence(subject, plan))
            if arguments.problems:
                add(arguments.out, subject, bench.accuracy(plan))
        except MissingLibraryError as error:
            print(f"{subject.name}: left out, {error}", flush=True)


def _lacking(known: dict[str, Any], problems: int) -> bool:
    """Whether something of a subject is still to be measured."""
    counts = {each["n"] for each in known.get("accuracy", {}).values()}
    return "texts" not in known or (problems > 0 and counts != {problems})


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
    return parser


if __name__ == "__main__":
    parser = parse()
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--cpu", action="store_true", help="only CPU_SUBSET, one of each kind")
    arguments = parser.parse_args()
    names = set(arguments.only.split(",")) if arguments.only else {EXACT, *METHODS}
    chosen = CPU_SUBSET if arguments.cpu else subjects()
    run(arguments, [each for each in chosen if each.method in names])
