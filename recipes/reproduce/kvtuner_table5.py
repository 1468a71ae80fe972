"""KVTuner's table 5, GSM8K with 4, 8 and 16 examples as text and as turns: ours and published.

    python recipes/reproduce/kvtuner_table5.py meta-llama/Llama-3.1-8B-Instruct --only 'BF16|KIVI'
    python recipes/reproduce/kvtuner_table5.py Qwen/Qwen2.5-7B-Instruct --columns cot_4 --limit 200
    python recipes/reproduce/kvtuner_table5.py --dry-run

``--data`` is a folder with ``gsm8k_test.jsonl`` and ``gsm8k_train.jsonl``. The models were not
available to us: nothing but the dry run has been run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reproduce import Recipe, parse

from kvbits.evaluation.benchmarks import build_benchmark
from kvbits.evaluation.benchmarks.gsm8k import TEST, TRAIN, own_problems
from kvbits.plan import CachePlan


def write_data(folder: Path) -> None:
    """Problems of our own in the form of GSM8K, for a dry run."""
    lines = [f"{problem.model_dump_json()}\n" for problem in own_problems()]
    (folder / TEST.name).write_text("".join(lines[:2]), encoding="utf-8")
    (folder / TRAIN.name).write_text("".join(lines * 2), encoding="utf-8")


def main(arguments: Any) -> list[dict[str, Any]]:
    """Measure every row and column of a model."""
    recipe = Recipe("kvtuner_table5", arguments, write_data)
    tokens = 8 if arguments.dry_run else 512
    benchmark = build_benchmark("gsm8k", max_new_tokens=tokens)

    def measure(row: dict[str, Any], plan: CachePlan | None, column: str) -> float:
        kind, _, shots = column.rpartition("_")
        is_chat = kind == "multi_turn"
        found = recipe.score(
            row,
            plan,
            benchmark,
            column=column,
            shots=int(shots),
            chat_template=is_chat,
            multi_turn=is_chat,
        )
        return float(found["results"]["gsm8k"]["acc,none"])

    return recipe.run(measure)


if __name__ == "__main__":
    main(parse(__doc__.splitlines()[0]).parse_args())
