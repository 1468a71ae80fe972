"""KVTuner's table 8, tokens per second of Llama-3.1-8B: ours beside the published ones.

    python recipes/reproduce/kvtuner_table8.py meta-llama/Llama-3.1-8B-Instruct
    python recipes/reproduce/kvtuner_table8.py benchmarks/shapes/llama-3.1-8b \\
        --as meta-llama/Llama-3.1-8B-Instruct
    python recipes/reproduce/kvtuner_table8.py --dry-run

Rows and prompt tokens as published (64 x 128, 16 x 512, 8 x 1024), prompts of random tokens, 338
generated tokens each, time from the prompt to the last token without compiling. Needs a CUDA
device. The model was not available to us; a folder with its config and no weights is enough, as
speed does not depend on them.
"""

from __future__ import annotations

from typing import Any

from reproduce import Recipe, parse

from kvbits.bench.decode import measure as measure_decoding
from kvbits.bench.random_model import load
from kvbits.bench.workloads import Variant, Workload, parse_shape
from kvbits.plan import CachePlan

NEW_TOKENS = 338  # of KIVI's own script


def main(arguments: Any) -> list[dict[str, Any]]:
    """Time every row and workload."""
    recipe = Recipe("kvtuner_table8", arguments, load=_load)

    def measure(row: dict[str, Any], plan: CachePlan | None, column: str) -> float | None:
        batch, context = parse_shape(column)
        work = Workload(batch, context, NEW_TOKENS)
        if arguments.dry_run:
            work = Workload(2, 40, 6)
        # of a plan of 16 bits, decoding runs in the same loop as of the others
        same = plan or CachePlan.uniform(recipe.model.config, 16, 16)
        variant = Variant(row["config"], same)
        if not arguments.dry_run:  # kernels are compiled before the clock runs
            list(
                measure_decoding(
                    recipe.model, [variant], [work._replace(new_tokens=5)], is_prompted=True
                )
            )
        (found,) = measure_decoding(recipe.model, [variant], [work], is_prompted=True)
        speed = found.get("generated_per_second")
        return None if speed is None else float(speed)

    return recipe.run(measure)


def _load(arguments: Any) -> tuple[Any, Any]:
    """The model, of random weights where its folder has none; text is not needed."""
    device = "cuda" if arguments.device == "auto" else arguments.device
    dtype = "bfloat16" if arguments.dtype == "auto" else arguments.dtype
    return load(arguments.model, device, dtype), None


if __name__ == "__main__":
    main(parse(__doc__.splitlines()[0]).parse_args())
