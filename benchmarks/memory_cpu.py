"""Peak process memory of a long generation against bits: is the cache really that small?

    python benchmarks/memory_cpu.py models/kvbits-tiny -o benchmarks/results/memory-cpu.jsonl

Every variant runs in a process of its own: load the model, note the resident memory, prefill a
batch of long prompts in chunks, decode a few tokens, read the process's peak. The bytes of the
cache, of the formula and of the process stand side by side.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import kvbits

VARIANTS = ((16, 16), (8, 8), (4, 4), (3, 3), (2, 2))


def main() -> None:
    """Run every variant in its own process and append one record each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--only", type=int, nargs=2, help="key and value bits; used internally")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options, *options.only)))
        return
    for key_bits, value_bits in VARIANTS:
        command = [sys.executable, __file__, options.model, "--only", str(key_bits)]
        command += [str(value_bits), "--context", str(options.context)]
        command += ["--batch", str(options.batch), "--chunk", str(options.chunk)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        record = json.loads(line.splitlines()[-1])
        print(
            f"K{key_bits}V{value_bits}: {record['effective_bits']:.2f} effective bits, cache "
            f"{record['cache_mib']:.0f} MiB, process peak over the loaded model "
            f"{record['peak_over_model_mib']:.0f} MiB"
        )
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(record) + "\n")


def peak_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def run(options: argparse.Namespace, key_bits: int, value_bits: int) -> dict[str, object]:
    """Fill one cache and read the meters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    plan = kvbits.CachePlan.uniform(model.config, key_bits, value_bits, mode="per_token")
    loaded = peak_mib()
    is_packed = key_bits < 16
    cache = plan.new_cache(model) if is_packed else DynamicCache(config=model.config)
    if is_packed:
        kvbits.enable(model)
    tokens = torch.randint(0, model.config.vocab_size, (options.batch, options.context))
    for chunk in tokens.split(options.chunk, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    for _ in range(3):
        model(tokens[:, :1], past_key_values=cache, logits_to_keep=1)
    nbytes = (
        cache.nbytes
        if is_packed
        else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    )
    values = sum(geometry.values_per_token for geometry in plan.model.layers)
    stored = values * (options.context + 3) * options.batch
    return {
        "benchmark": "memory_cpu",
        "model": options.model,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "context": options.context,
        "batch": options.batch,
        "chunk": options.chunk,
        "effective_bits": round(8 * nbytes / stored, 4),
        "cache_mib": round(nbytes / 2**20, 1),
        "formula_mib": round(plan.bytes(options.context + 3, options.batch) / 2**20, 1),
        "peak_over_model_mib": round(peak_mib() - loaded, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvbits": kvbits.__version__,
        },
    }


if __name__ == "__main__":
    main()
