"""Small synthetic tables: no model is needed to test what is arithmetic."""

from __future__ import annotations

import numpy as np

from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.tables import EXACT_LABEL, Candidate, CostTable, SensitivityTable


def candidate_pairs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """The exact pair and every pair of widths, in the order of the columns."""
    return [(16, 16), *((key, value) for key in widths for value in widths)]


def column(widths: tuple[int, ...], pair: tuple[int, int]) -> int:
    """The column of a pair."""
    return candidate_pairs(widths).index(pair)


def make_costs(layers: int, widths: tuple[int, ...], unequal: bool = False) -> CostTable:
    """Per-token costs at head_dim 64: ``bits + 0.5`` effective bits a side, 16 exact."""
    pairs = candidate_pairs(widths)
    packed = [Candidate(f"K{key}V{value}", f"K{key}", f"V{value}") for key, value in pairs[1:]]
    stored = {16: 32, **{bits: 2 * bits + 1 for bits in widths}}  # half bits per value
    row = np.array([stored[key] + stored[value] for key, value in pairs], dtype=np.int64)
    heads = np.arange(1, layers + 1) if unequal else np.ones(layers, dtype=np.int64)
    columns = (Candidate(EXACT_LABEL, None, None), *packed)
    return CostTable(columns, row * heads[:, None], int(2 * heads.sum()), 0.5)


def make_table(widths: tuple[int, ...], kl_nats: np.ndarray) -> SensitivityTable:
    """A table of KLs ``[domains, L, 2 sides, widths]``."""
    domains, layers = kl_nats.shape[:2]
    sides = tuple(f"{side}{bits}" for side in "KV" for bits in widths)
    names = tuple(f"domain{i}" for i in range(domains))
    return SensitivityTable(names, sides, kl_nats.reshape(domains, layers, -1))


def make_problem(
    layers: int,
    widths: tuple[int, ...],
    seed: int,
    *,
    domains: int = 3,
    unequal: bool = False,
    objective: str = "minimax",
) -> Problem:
    """A problem whose KLs fall by about five per bit, as measured ones do."""
    generator = np.random.default_rng(seed)
    weight = generator.lognormal(sigma=1.5, size=(domains, layers, 2, 1))
    kl_nats = weight * 5.0 ** -np.array(widths, dtype=float)
    costs = make_costs(layers, widths, unequal)
    return build_problem(make_table(widths, kl_nats), costs, bits=4.0, objective=objective)
