"""A made-up run directory with the shapes of a real one, for tests and for looking at the page."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
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
        "summary": f"made up; {bits:.2f} effective bits",
        "pairs": pairs,
        "effective_bits": bits,
        "effective_bits_at_context": bits + 0.05,
        "loss": predicted["text"],
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
        is_rule = rival["origin"] in {"uniform", "ladder", "random"}
        is_near = rival["origin"] == "exact" and abs(rival["effective_bits"] - 4.5) < 1
        if not (is_rule and rival["effective_bits"] <= 4.5) and not (is_near and rival != chosen):
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


def verify_record(point: dict, domain: str, data: str = "ab") -> dict:
    """Four documents around the point's KL, and bins of which the first is still exact."""
    measured = point["measured_kl"][domain]
    value = measured["value"]
    starts = (0, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    positions = [
        {
            "start": start,
            "stop": stop,
            "kl_nats": value * start / 100,
            "kl_se": value * start / 1000,
            "num_tokens": stop - start,
        }
        for start, stop in pairwise(starts)
    ]
    return {
        "kind": "kl",
        "name": point["name"],
        "origin": point["origin"],
        "labels": point["labels"],
        "domain": domain,
        "task": None,
        "data": f"{domain} heldout",
        "split": "heldout",
        "checksum": data * 32,
        "seed": 0,
        "n": 4,
        "num_tokens": 400,
        "kl_nats": value,
        "kl_se": measured["se"],
        "top1_agreement": 0.98,
        "perplexity": 19.4,
        "perplexity_reference": 19.3,
        "excess_nll": value / 2,
        "excess_nll_se": measured["se"],
        "document_kl_nats": [value * share for share in (0.8, 0.9, 1.1, 1.2)],
        "document_tokens": [100] * 4,
        "positions": positions,
        "seconds": 4.2,
    }


def trials(points: list[dict], chosen: dict, rng: random.Random) -> list[dict]:
    """Searched and random plans in random order, the chosen one among them."""
    picked = [p for p in points if p["origin"] in ("exact", "random")]
    assert chosen in picked
    rng.shuffle(picked)
    return [
        {
            "choice": [0] * NUM_LAYERS,
            "labels": p["labels"],
            "effective_bits": p["effective_bits"],
            "kl_nats": list(p["predicted_kl"].values()),
            "loss": 5 * p["predicted_kl"]["text"],
            "predicted_loss": 4 * p["predicted_kl"]["text"],
            "stage": "search",
            "trial": number,
        }
        for number, p in enumerate(picked)
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stages(path: Path) -> None:
    """Errors of every pair, and what pruning and clustering make of them."""
    pairs = [(key, value) for key in BITS for value in BITS]
    rows = [
        {"layer": layer, "label": f"K{key}V{value}", "e_k": 0.1, "e_v": 0.1, "e_a": 0.1}
        | {"e_o": (1 + layer % 3) * (4.0**-key + 2.0**-value)}
        for layer in range(NUM_LAYERS)
        for key, value in pairs
    ]
    write_lines(path / "errors.jsonl", rows)
    kept = ["K16V16", "K8V8", "K4V8", "K4V4", "K2V4", "K2V2"]
    pruned = {
        "sensitivity": "e_o",
        "candidates": {str(layer): kept for layer in range(NUM_LAYERS)},
        "groups": [[layer for layer in range(NUM_LAYERS) if layer % 3 == i] for i in range(3)],
    }
    (path / "pruned.json").write_text(json.dumps(pruned))


def memory() -> list[dict]:
    lengths = [256 * 2**power for power in range(10)]
    return [
        {
            "context": tokens,
            "bytes": 1700 * tokens + 400_000,
            "bytes_16bit": 6144 * tokens,
            "effective_bits": 16 * (1700 * tokens + 400_000) / (6144 * tokens),
        }
        for tokens in lengths
    ]


def write_run(
    path: Path, seed: int = 0, *, weights: str = "cd" * 32, data: str = "ab", extra: tuple = ()
) -> Path:
    """Write study, sensitivities, records, front and plan.

    ``weights`` and ``data`` are what runs of one model and one held-out set share; ``extra`` are
    points beside the made-up ones.
    """
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    study = {
        "schema_version": 1,
        "model_id": "models/made-up",
        "settings": {"bits": 4.5, "strategy": "exact", "mode": "per_token", "seed": seed},
        "versions": {"kvbits": "0.1.0", "torch": "2.13.0"},
        "command": f"kvbits tune models/made-up --bits 4.5 --seed {seed}",
        "created": "2026-01-01T00:00:00+00:00",
        "data": {
            "calibration": dict.fromkeys(DOMAINS, "ef" * 32),
            "heldout": dict.fromkeys(DOMAINS, data * 32),
        },
        "model": {"architecture": "Qwen2ForCausalLM", "weights": weights, "dtype": "float32"},
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
    write_lines(path / "sensitivity.jsonl", rows)
    points = [*all_points(rng), *extra]
    searched = [p for p in points if p["origin"] == "exact" and p["effective_bits"] <= 4.5]
    chosen = max(searched, key=lambda p: p["effective_bits"])
    chosen["chosen"] = True
    write_lines(path / "search.jsonl", trials(points, chosen, rng))
    write_stages(path)
    front = {"schema_version": 2, "context": CONTEXT, "mode": "per_token", "budget_bits": 4.5}
    front |= {"points": points, "comparisons": comparisons(points), "memory": memory()}
    front |= {"normalised_by": dict.fromkeys(DOMAINS, 0.05), "budget_counted_at": None}
    front["bought"] = {"context": CONTEXT, "batch": 1, "bytes": 7_363_200, "memory": 25_165_824}
    front["bought"] |= {"bytes_16bit": 25_165_824, "tokens": 14_568, "tokens_16bit": CONTEXT}
    (path / "front.json").write_text(json.dumps(front))
    records = [verify_record(p, d, data) for d in DOMAINS for p in points if p["measured_kl"]]
    write_lines(path / "verify.jsonl", records)
    (path / "plan.json").write_text(json.dumps({"model_id": "models/made-up"}))
    return path


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
