"""Repeat KVQuant's ablation: what each of its parts is worth at 3 bits, and the sink at 2.

    python recipes/ablation-kvquant/measure.py --out results.jsonl

Forward KL and perplexity on held-out text through the packed cache, one JSON line per step; steps
that the file already holds are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "methods"))

from measure import Subject, parse, run

BASE = {"outlier_share": 0.0, "sink_tokens": 0}
# 128 tokens of a text of 600 are a fifth; blocks of 64 leave less of it exact.
BLOCK = {"key_ranges": "block", "block_tokens": 64}
STEPS = [
    Subject("per-token", {"key_bits": 3, "value_bits": 3}),
    Subject("kvquant", {**BASE, **BLOCK, "levels": "uniform", "is_pre_rope": False}),
    Subject("kvquant", {**BASE, **BLOCK, "levels": "uniform"}),
    Subject("kvquant", {**BASE, **BLOCK, "levels": "normal_float"}),
    Subject("kvquant", {**BASE, **BLOCK, "levels": "activations"}),
    Subject("kvquant", {**BASE, **BLOCK, "levels": "fisher_unscaled"}),
    Subject("kvquant", {**BASE, **BLOCK}),
    Subject("kvquant", {**BASE, **BLOCK, "outlier_share": 0.01}),
]
TWO = {"key_bits": 2, "value_bits": 2}
SINKS = [
    Subject("kvquant", {**BASE, **BLOCK, **TWO, **settings})
    for settings in (
        {},
        {"sink_tokens": 1},
        {"sink_tokens": 1, "q_norm": True},
        {"outlier_share": 0.01},
        {"outlier_share": 0.01, "sink_tokens": 1},
    )
]

if __name__ == "__main__":
    run(parse().parse_args(), [*STEPS, *SINKS])
