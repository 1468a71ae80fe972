"""Measure every method of kvbits on one model, at 2, 3 and 4 nominal bits.

    python recipes/methods/measure.py --out results.jsonl [--only kivi,kvarn] [--problems 200]

Forward KL, flips and perplexity on held-out text, arithmetic and recall, through the packed cache,
and with ``--problems N`` the accuracy of generated arithmetic. One JSON line per plan; plans that
the file already holds are left out, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbits
from kvbits.evaluation.accuracy import run_task
from kvbits.evaluation.corpora import default_sets, text_set
from kvbits.evaluation.divergence import measure
from kvbits.evaluation.records import library_versions
from kvbits.evaluation.tasks import TASKS
from kvbits.evaluation.texts import bundled_texts
from kvbits.methods import METHODS, build_method

WIDTHS = (2, 3, 4)


class Subject(NamedTuple):
    """A method under one setting."""

    method: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Method and settings in one word."""
        parts = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.method, *parts])


def subjects() -> Iterator[Subject]:
    """Every method at every width it has; where there is no width, as it is."""
    for name, method in METHODS.items():
        if name == "kvtuner":  # its plans are for models of their own
            continue
        if "key_bits" not in method.model_fields:
            yield Subject(name, {})
            continue
        for bits in WIDTHS:
            yield Subject(name, {"key_bits": bits, "value_bits": bits})
    yield Subject("skvq", {"key_bits": 2, "value_bits": 1.5})
    yield Subject("kivi", {"promoted_share": 0.125, "sink_tokens": 32})  # Kitty


def run(arguments: argparse.Namespace, wanted: list[Subject]) -> None:
    """Measure what the output file does not hold yet."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to(arguments.device)
    calibration = [
        document for each in default_sets(tokenizer, "calibration") for document in each.documents
    ]
    _, *tasks = default_sets(tokenizer, "heldout")
    text = text_set(
        tokenizer,
        None if arguments.text else bundled_texts("heldout"),
        path=arguments.text,
        name=arguments.text.stem if arguments.text else "bundled",
        documents=arguments.documents,
        max_tokens=arguments.tokens,
    )
    context = int(text.input_ids.shape[1])
    done = held(arguments.out)
    for subject in track([each for each in wanted if each.name not in done], "measuring"):
        method = build_method(subject.method, **subject.settings)
        plan = method.calibrate(model, calibration)
        record: dict[str, Any] = {
            "subject": subject.name,
            "method": subject.method,
            "settings": subject.settings,
            "model": Path(arguments.model).name,
            "effective_bits": round(plan.effective_bits, 4),
            "context": context,
            "effective_bits_at_context": round(plan.effective_bits_at(context), 4),
            "texts": {each.name: each.checksum for each in (text, *tasks)},
            "versions": {**library_versions(), "kvbits": kvbits.__version__},
        }
        for token_set in (text, *tasks):
            found = measure(model, plan, token_set)
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
        if arguments.problems:
            solved = run_task(
                model, tokenizer, TASKS["arithmetic"](), n=arguments.problems, plan=plan
            )
            record["arithmetic"] = {
                "accuracy": solved.accuracy,
                "standard_error": solved.standard_error,
                "n": arguments.problems,
            }
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{subject.name}: {plan.effective_bits:.2f} bits, text KL "
            f"{record['text']['kl_nats']:.5f} ± {record['text']['kl_se']:.5f}",
            flush=True,
        )


def held(path: Path) -> set[str]:
    """Subjects of a results file."""
    if not path.exists():
        return set()
    return {json.loads(line)["subject"] for line in path.read_text().splitlines()}


def parse() -> argparse.ArgumentParser:
    """Options that recipes of this kind share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/kvbits-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="held-out text; default: the bundled one")
    parser.add_argument("--documents", type=int, help="windows of text; default: all")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of a window")
    parser.add_argument("--problems", type=int, default=0, help="arithmetic problems to solve")
    return parser


if __name__ == "__main__":
    parser = parse()
    parser.add_argument("--only", help="methods, separated by commas")
    arguments = parser.parse_args()
    names = set(arguments.only.split(",")) if arguments.only else set(METHODS)
    run(arguments, [each for each in subjects() if each.method in names])
