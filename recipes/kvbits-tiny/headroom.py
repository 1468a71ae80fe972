"""How much cache damage the bundled model shows: uniform plans and tuned ones on one table.

    python recipes/kvbits-tiny/headroom.py models/kvbits-tiny --device cuda -n 1000 \
        --front runs/kvbits-tiny/front.json -o recipes/kvbits-tiny/results/headroom.jsonl

Everything goes through the packed cache as deployed: tasks by greedy decoding (prompts exact, as
served), KL and perplexity by teacher forcing that equals one-token decoding. Accuracies carry the
paired difference to full precision with its 95 % interval. ``--front`` adds the plans of a tuning
run that lie within a quarter bit of its budget: the chosen one and its rivals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbits import CachePlan
from kvbits.evaluation.accuracy import Accuracy, paired_difference, run_task
from kvbits.evaluation.corpora import SetSize, default_sets, encode_continuation, text_set
from kvbits.evaluation.divergence import measure, reference_logits
from kvbits.evaluation.perplexity import perplexity
from kvbits.evaluation.records import (
    Record,
    accuracy_record,
    append_record,
    divergence_record,
    perplexity_record,
)
from kvbits.evaluation.tasks import ArithmeticChain, KeyValueRecall, Passkey, Task

UNIFORM = [(8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (3, 3), (2, 4), (2, 2)]


class Bench:
    """The model with its held-out data; ``records(plan)`` measures one plan on all of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model = model.to(options.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.batch = options.batch
        size = SetSize(text_documents=16, reasoning_documents=32, recall_documents=16)
        sets = default_sets(self.tokenizer, "heldout", size=size) if options.kl else []
        self.sets = [(held, reference_logits(self.model, held)) for held in sets]
        self.text = None
        if options.text:
            self.text = text_set(
                self.tokenizer, path=options.text, name=options.text.stem, max_tokens=2048
            )
        self.tasks = {
            label: task
            for label, task in tasks(options.n, self.tokenizer).items()
            if not options.tasks or label in options.tasks
        }
        self.full: dict[str, Accuracy] = {}

    def records(self, plan: CachePlan | None) -> Iterator[Record]:
        """Measure ``plan``; full precision (None) must come first."""
        for label, (task, n) in self.tasks.items():
            result = run_task(
                self.model, self.tokenizer, task, n=n, plan=plan, batch_size=self.batch
            )
            difference = paired_difference(result, self.full.setdefault(label, result))
            record = accuracy_record(result, plan, self.model, seed=0, split="test")
            yield record.model_copy(update={"data": label, "metrics": difference._asdict()})
        for token_set, reference in self.sets if plan is not None else ():
            divergence = measure(self.model, plan, token_set, reference)
            yield divergence_record(divergence, token_set, plan, self.model)
        if self.text is not None:
            result = perplexity(self.model, self.text, plan)
            yield perplexity_record(result, self.text, plan, self.model)


def main() -> None:
    """Measure every plan; print a line each and append the records."""
    options = parse_options()
    bench = Bench(options)
    for name, plan in plans(bench.model.config, options):
        bits = 16.0 if plan is None else plan.effective_bits
        cells = [f"{name:<28}", f"{bits:5.2f} bits"]
        for record in bench.records(plan):
            append_record(options.output, record)
            error = f" ± {record.standard_error:.4f}" if record.standard_error else ""
            cells.append(f"{record.data} {record.value:.4f}{error}")
        print(" | ".join(cells), flush=True)


def plans(config: Any, options: argparse.Namespace) -> Iterator[tuple[str, CachePlan | None]]:
    """Full precision, uniform plans in every mode, and those of the tuning runs."""
    yield "16 bits", None
    for path in options.plan:
        yield str(path), CachePlan.load(path)
    for mode in options.modes:
        for key_bits, value_bits in options.pairs or UNIFORM:
            plan = CachePlan.uniform(config, key_bits, value_bits, mode)
            yield f"K{key_bits}V{value_bits} {mode}", plan
    for path in options.front:
        front = json.loads(path.read_text())
        budget = front["budget_bits"]
        for point in front["points"]:
            is_near = budget - 0.25 <= point["effective_bits"] <= budget
            if is_near and (point["chosen"] or point["origin"] != "exact"):
                plan = CachePlan.from_pairs(config, point["pairs"], mode=front["mode"])
                yield f"{budget:g}: {point['name']}", plan


def pair(text: str) -> tuple[int, int]:
    """Parse ``4,2``."""
    key_bits, value_bits = map(int, text.split(","))
    return key_bits, value_bits


def tasks(n: int, tokenizer: Any) -> dict[str, tuple[Task, int]]:
    """The tasks by label, with the number of problems of each."""

    def count(text: str) -> int:
        return len(encode_continuation(tokenizer, text))

    return {
        "arithmetic": (ArithmeticChain(), n),
        "key-value 40": (KeyValueRecall(num_pairs=40), n // 4),
        "passkey 2000": (Passkey(length=2000, count_tokens=count), n // 4),
    }


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=500, help="arithmetic problems; recall: a quarter")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="*", default=["per_token"])
    parser.add_argument("--tasks", nargs="*", help="labels of the tasks to run; all by default")
    parser.add_argument("--pairs", type=pair, nargs="*", help="uniform pairs such as 4,2")
    parser.add_argument("--kl", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plan", type=Path, nargs="*", default=[])
    parser.add_argument("--front", type=Path, nargs="*", default=[])
    parser.add_argument("--text", type=Path, help="a text file for perplexity through the cache")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
