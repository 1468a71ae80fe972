"""Small synthetic tables: no model is needed to test what is arithmetic."""

from __future__ import annotations

import numpy as np

from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.tables import CostTable, SensitivityTable, candidate_pairs


def make_costs(layers: int, widths: tuple[int, ...], unequal: bool = False) -> CostTable:
    """Per-token costs at head_dim 64: ``bits + 0.5`` effective bits a side, 16 exact."""
    pairs = candidate_pairs(widths)
    stored = {16: 32, **{bits: 2 * bits + 1 for bits in widths}}  # half bits per value
    row = np.array([stored[key] + stored[value] for key, value in pairs], dtype=np.int64)
    heads = np.arange(1, layers + 1) if unequal else np.ones(layers, dtype=np.int64)
    return CostTable(pairs, row * heads[:, None], int(2 * heads.sum()), 0.5)


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
    names = tuple(f"domain{i}" for i in range(domains))
    table = SensitivityTable(names, widths, kl_nats)
    costs = make_costs(layers, widths, unequal)
    return build_problem(table, costs, bits=4.0, objective=objective)
