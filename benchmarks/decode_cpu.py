"""Decode speed on the CPU: tokens per second of a packed cache against transformers' DynamicCache.

    python benchmarks/decode_cpu.py models/kvbits-tiny --threads 2 \\
        -o benchmarks/results/decode-cpu.jsonl

Batch 1, greedy-sized steps (one token per forward), the same model, attention and loop for both.
The median over ``--repeats`` interleaved runs is reported, so that a slow minute hits every
variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import kvbits

Maker = Callable[[], Cache]


def main() -> None:
    """Measure every variant at every context and append one record each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 3500])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).eval()
    for context in options.contexts:
        for name, speeds in measure(model, context, options).items():
            record = describe(options, context, name, speeds)
            print(f"{context:>6} tokens  {name:<10} {record['tokens_per_second']:>7.1f} tokens/s")
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def variants(model: torch.nn.Module) -> dict[str, Maker]:
    """A fresh cache per call, by name."""
    makers: dict[str, Maker] = {"dynamic": lambda: DynamicCache(config=model.config)}
    for mode, pairs in (("per_token", [(8, 8), (4, 4), (2, 2)]), ("kivi", [(4, 4)])):
        for key_bits, value_bits in pairs:
            plan = kvbits.CachePlan.uniform(model.config, key_bits, value_bits, mode=mode)
            label = f"K{key_bits}V{value_bits} {mode}"
            makers[label] = lambda plan=plan: plan.new_cache(model)
    return makers


def measure(
    model: torch.nn.Module, context: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens per second of every variant, one number per repeat."""
    speeds: dict[str, list[float]] = {name: [] for name in variants(model)}
    for _ in range(options.repeats):
        for name, make in variants(model).items():
            if name == "dynamic":  # its own best attention
                speeds[name].append(decode(model, make(), context, options.steps))
                continue
            with kvbits.enable(model):
                speeds[name].append(decode(model, make(), context, options.steps))
    return speeds


@torch.no_grad()
def decode(model: torch.nn.Module, cache: Cache, context: int, steps: int) -> float:
    """Prefill ``context`` random tokens, warm up, then time ``steps`` one-token forwards."""
    prompt = torch.randint(0, model.config.vocab_size, (1, context))
    token = torch.tensor([[7]])
    model(prompt, past_key_values=cache)
    for _ in range(3):
        model(token, past_key_values=cache)
    start = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache)
    return steps / (time.perf_counter() - start)


def describe(
    options: argparse.Namespace, context: int, name: str, speeds: list[float]
) -> dict[str, object]:
    """One record: what was measured, where, with which versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "benchmark": "decode_cpu",
        "model": options.model,
        "dtype": options.dtype,
        "context": context,
        "batch": 1,
        "variant": name,
        "tokens_per_second": round(statistics.median(speeds), 2),
        "spread": [round(min(speeds), 2), round(max(speeds), 2)],
        "repeats": options.repeats,
        "threads": options.threads,
        "processor": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvbits": kvbits.__version__,
        },
        "commit": commit,
    }


if __name__ == "__main__":
    main()
