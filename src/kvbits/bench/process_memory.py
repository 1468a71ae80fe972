"""Peak memory of a whole process by cache: is the cache really that small?

Every variant runs in a process of its own: load the model, note the resident memory, run a batch
of long prompts in chunks, decode a few tokens, read the process's peak. The bytes of the cache, of
the formula and of the process stand side by side.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvbits.bench.random_model import load
from kvbits.bench.workloads import cache_bytes, parse_variant

BATCH, CONTEXT, CHUNK, STEPS = 32, 2048, 256, 3


def measure(
    model: str, variants: Sequence[str], context: int = CONTEXT, dtype: str = "bfloat16"
) -> Iterator[dict[str, Any]]:
    """One record per variant, each measured in a new process.

    Args:
        model: Model folder or hub id; without weights it gets random ones.
        variants: See ``parse_variant``.
        context: Tokens of a row.
        dtype: Of the model.
    """
    for name in variants:
        command = [sys.executable, "-m", __name__, model, name, str(context), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        yield json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def run(path: str, name: str, context: int, dtype: str) -> dict[str, Any]:
    """Fill one cache and read the meters."""
    import kvbits

    torch.manual_seed(0)
    model = load(path, "cpu", dtype)
    variant = parse_variant(name, model.config)
    loaded = _peak_bytes()
    cache = variant.new_cache(model)
    kvbits.enable(model)
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, context))
    for chunk in tokens.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    for _ in range(STEPS):
        model(tokens[:, :1], past_key_values=cache, logits_to_keep=1)
    plan = variant.plan or kvbits.CachePlan.uniform(model.config, 16, 16)
    held = context + STEPS
    return {
        "variant": name,
        "batch": BATCH,
        "context": held,
        "dtype": dtype,
        "effective_bits": round(plan.effective_bits, 4),
        "effective_bits_at_context": round(plan.effective_bits_at(held, BATCH), 4),
        "cache_bytes": cache_bytes(cache),
        "formula_bytes": plan.bytes(held, BATCH, state_bits=8 * model.dtype.itemsize),
        "peak_bytes": _peak_bytes() - loaded,
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _path, _name, _context, _dtype = sys.argv[1:]
    print(json.dumps(run(_path, _name, int(_context), _dtype)))
