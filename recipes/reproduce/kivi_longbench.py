"""KIVI's LongBench table, 15 datasets: ours beside the published scores.

    python recipes/reproduce/kivi_longbench.py mistralai/Mistral-7B-Instruct-v0.2 --columns trec
    python recipes/reproduce/kivi_longbench.py --dry-run

``--data`` is a folder with LongBench's files as ``longbench/NAME.jsonl``. The models were not
available to us: nothing but the dry run has been run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from reproduce import AVERAGE, Recipe, parse, read_published

from kvbits.evaluation.benchmarks import build_benchmark
from kvbits.evaluation.tasks.filler import sentence
from kvbits.plan import CachePlan

NAME = "kivi_longbench"


def write_data(folder: Path) -> None:
    """A row of our own for every dataset, for a dry run."""
    (folder / "longbench").mkdir(exist_ok=True)
    rng = random.Random(0)
    for name in read_published(NAME).columns:
        row = {
            "input": "What stands near the bridge?",
            "context": " ".join(sentence(rng) for _ in range(30)),
            "answers": ["Paragraph 3" if name == "passage_retrieval_en" else "a lamp"],
            "length": 300,
            "all_classes": ["lamp", "letter"] if name == "trec" else None,
        }
        if name != AVERAGE:
            path = folder / "longbench" / f"{name}.jsonl"
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")


def main(arguments: Any) -> list[dict[str, Any]]:
    """Measure every row and dataset of a model."""
    recipe = Recipe(NAME, arguments, write_data)
    is_chat = not arguments.no_chat_template and bool(recipe.tokenizer.chat_template)

    def measure(row: dict[str, Any], plan: CachePlan | None, column: str) -> float:
        found = recipe.score(
            row,
            plan,
            build_benchmark("longbench", datasets=column),
            column=column,
            chat_template=is_chat,
            max_length=400 if arguments.dry_run else arguments.max_length,
        )
        return 100 * float(found["results"][f"longbench_{column}"]["score,none"])

    return recipe.run(measure)


def options() -> Any:
    """The options."""
    made = parse(__doc__.splitlines()[0])
    made.add_argument("--max-length", type=int, default=31500, help="tokens of a prompt")
    made.add_argument("--no-chat-template", action="store_true", help="plain prompts for all")
    return made


if __name__ == "__main__":
    main(options().parse_args())
