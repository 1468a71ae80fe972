"""KVQuant's wikitext-2 perplexities: ours beside the published ones.

    python recipes/reproduce/kvquant_wikitext2.py huggyllama/llama-7b --only 'fp16|nuq3'
    python recipes/reproduce/kvquant_wikitext2.py --dry-run

Windows of 2048 tokens (LLaMA), 4096 (Llama-2) or 8192 (Llama-3, Mistral), which do not overlap,
of the joined test split; 16 windows of 2048 tokens of the training split to calibrate. ``--data``
is a folder with ``wikitext2_test.raw`` and ``wikitext2_train.raw``. The models were not available
to us: nothing but the dry run has been run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from reproduce import Recipe, parse
from torch import Tensor

from kvbits.evaluation.benchmarks.perplexity import WIKITEXT2, LineFile, TextRow, WikiText2
from kvbits.evaluation.benchmarks.source import Hub
from kvbits.evaluation.tasks.filler import sentence
from kvbits.evaluation.windows import joined_ids
from kvbits.plan import CachePlan

TRAIN = LineFile(
    "wikitext2_train.raw",
    TextRow,
    Hub("Salesforce/wikitext", "train", "wikitext-2-raw-v1"),
    "wiki.train.raw of wikitext-2-raw-v1",
)
SAMPLES, SAMPLE_TOKENS = 16, 2048


def calibration(recipe: Recipe) -> list[Tensor]:
    """16 windows at random places of the joined training split, drawn as KVQuant draws them."""
    texts = [row.text for row in recipe.source().read(TRAIN)]
    ids = joined_ids(recipe.tokenizer, texts)
    samples, tokens = (2, 256) if recipe.arguments.dry_run else (SAMPLES, SAMPLE_TOKENS)
    rng = random.Random(0)
    starts = [rng.randint(0, len(ids) - tokens - 1) for _ in range(samples)]
    return [torch.tensor(ids[start : start + tokens]) for start in starts]


def write_data(folder: Path) -> None:
    """Text of our own in the form of wikitext-2, for a dry run."""
    for name, count in ((WIKITEXT2.name, 200), (TRAIN.name, 400)):
        rng = random.Random(name)
        lines = [f" {sentence(rng)} \n" if i % 3 else " \n" for i in range(count)]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def main(arguments: Any) -> list[dict[str, Any]]:
    """Measure every row of a model."""
    recipe = Recipe("kvquant_wikitext2", arguments, write_data)
    window = 512 if arguments.dry_run else recipe.entry.window
    benchmark = WikiText2(window=window)

    def measure(row: dict[str, Any], plan: CachePlan | None, column: str) -> float:
        found = recipe.score(row, plan, benchmark, column=column)
        return float(found["summary"]["perplexity"])

    return recipe.run(measure, lambda: calibration(recipe))


if __name__ == "__main__":
    main(parse(__doc__.splitlines()[0]).parse_args())
