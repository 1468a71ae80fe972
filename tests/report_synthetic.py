"""A made-up run directory with the shapes of a real one, for tests and for looking at the page."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

NUM_LAYERS = 12
BITS = (8, 4, 2)
DOMAINS = {"text": 1.0, "reasoning": 0.4, "recall": 0.6}
OVERHEAD_BITS = 0.5
CONTEXT = 4096


def layer_kl(layer: int, side: str, bits: int, domain: str) -> float:
    """Four times per bit, keys worse than values, early layers worse than late ones."""
    base = {"key": 0.5, "value": 0.08}[side] * DOMAINS[domain]
    return base * (1 + 8 * (layer == 1)) / (layer + 1) * 4.0 ** -(bits - 2)


def plan_kl(pairs: list[list[int]], domain: str) -> float:
    total = 0.0
    for layer, (key, value) in enumerate(pairs):
        for side, bits in (("key", key), ("value", value)):
            total += layer_kl(layer, side, bits, domain) if bits < 16 else 0.0
    return total


def point(name: str, origin: str, pairs: list[list[int]], rng: random.Random, **extra) -> dict:
    widths = [bits + (OVERHEAD_BITS if bits < 16 else 0.0) for pair in pairs for bits in pair]
    bits = sum(widths) / len(widths)
    predicted = {domain: plan_kl(pairs, domain) for domain in DOMAINS}
    measured = {
        domain: {"value": value * rng.uniform(0.95, 1.25), "se": value * 0.06}
        for domain, value in predicted.items()
    }
    drop = -min(0.9, 4 * predicted["reasoning"])
    task = {"accuracy": 0.962 + drop, "se": 0.008, "n": 512, "difference": drop}
    task |= {"low": drop - 0.012, "high": drop + 0.012}
    return {
        "name": name,
        "origin": origin,
        "labels": [f"K{key}V{value}" for key, value in pairs],
        "pairs": pairs,
        "effective_bits": bits,
        "effective_bits_at_context": bits + 0.05,
        "predicted_kl": predicted,
        "measured_kl": measured,
        "tasks": {"arithmetic": task},
        "chosen": False,
    } | extra


def greedy_front(rng: random.Random) -> list[dict]:
    """Lower the side that costs least per bit saved, over and over: close enough to optimal."""
    pairs = [[8, 8] for _ in range(NUM_LAYERS)]
    points = []
    for step in range(2 * 2 * NUM_LAYERS):
        options = []
        for layer, pair in enumerate(pairs):
            for side, name in enumerate(("key", "value")):
                if pair[side] > 2:
                    lower = BITS[BITS.index(pair[side]) + 1]
                    cost = layer_kl(layer, name, lower, "text") / (pair[side] - lower)
                    options.append((cost, layer, side, lower))
        if not options:
            break
        _, layer, side, lower = min(options)
        pairs[layer][side] = lower
        if step % 4 == 0:
            points.append(point(f"exact-{step}", "exact", [list(p) for p in pairs], rng))
    return points


def all_points(rng: random.Random) -> list[dict]:
    points = greedy_front(rng)
    for key, value in ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2)):
        pairs = [[key, value]] * NUM_LAYERS
        points.append(point(f"uniform K{key}V{value}", "uniform", pairs, rng))
    for num_high in (2, 4):
        inner = NUM_LAYERS - 2 * num_high
        pairs = [[8, 8]] * num_high + [[4, 2]] * inner + [[8, 8]] * num_high
        points.append(point(f"ladder {num_high}", "ladder", pairs, rng))
    for number in range(6):
        pairs = [[rng.choice(BITS), rng.choice(BITS)] for _ in range(NUM_LAYERS)]
        points.append(point(f"random {number}", "random", pairs, rng))
    full = point("full precision", "full", [[16, 16]] * NUM_LAYERS, rng)
    full |= {"predicted_kl": None, "measured_kl": None}
    full["tasks"]["arithmetic"] |= {"difference": None, "low": None, "high": None}
    return [*points, full]


def comparisons(points: list[dict]) -> list[dict]:
    """The chosen plan minus each baseline within its budget, with a made-up interval."""
    chosen = next(p for p in points if p["chosen"])
    found = []
    for rival in points:
        if rival["origin"] not in {"uniform", "ladder", "random"} or rival["effective_bits"] > 4.5:
            continue
        for domain in DOMAINS:
            gap = chosen["measured_kl"][domain]["value"] - rival["measured_kl"][domain]["value"]
            found.append(
                {
                    "baseline": rival["name"],
                    "origin": rival["origin"],
                    "baseline_effective_bits": rival["effective_bits"],
                    "domain": domain,
                    "difference": gap,
                    "low": gap - 0.01,
                    "high": gap + 0.01,
                }
            )
    return found


def write_run(path: Path, seed: int = 0) -> Path:
    """Write study, sensitivities, records, front and plan."""
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    study = {
        "schema_version": 1,
        "model_id": "models/made-up",
        "settings": {"bits": 4.5, "strategy": "exact", "mode": "per_token", "seed": seed},
        "versions": {"kvbits": "0.1.0", "torch": "2.13.0"},
        "geometry": {"architecture": "Qwen2ForCausalLM", "layers": [{"head_dim": 64}]},
    }
    (path / "study.json").write_text(json.dumps(study))
    rows = [
        {
            "layer": layer,
            "side": side,
            "bits": bits,
            "label": f"{side[0].upper()}{bits}",
            "domain": domain,
            "kl_nats": layer_kl(layer, side, bits, domain),
            "kl_se": layer_kl(layer, side, bits, domain) * 0.1,
            "seconds": 1.5,
        }
        for domain in DOMAINS
        for layer in range(NUM_LAYERS)
        for side in ("key", "value")
        for bits in BITS
    ]
    (path / "sensitivity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = all_points(rng)
    searched = [p for p in points if p["origin"] == "exact" and p["effective_bits"] <= 4.5]
    max(searched, key=lambda p: p["effective_bits"])["chosen"] = True
    front = {"schema_version": 2, "context": CONTEXT, "mode": "per_token", "budget_bits": 4.5}
    front |= {"points": points, "comparisons": comparisons(points)}
    (path / "front.json").write_text(json.dumps(front))
    records = [
        {
            "data": f"{domain} heldout",
            "kind": "divergence",
            "split": "heldout",
            "checksum": "ab" * 32,
            "seed": 0,
            "n": 32,
            "value": 0.1,
            "standard_error": 0.01,
            "seconds": 4.2,
        }
        for domain in DOMAINS
        for _ in points
    ]
    (path / "verify.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "plan.json").write_text(json.dumps({"model_id": "models/made-up"}))
    return path


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
