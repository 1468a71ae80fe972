"""The allocation problem: what every candidate is expected to cost in KL, and what that counts.

Domains differ in scale: a KL that is small for running text breaks an exact recall. So the KL of
each domain is divided by what the best uniform plan of the same size is expected to have there
(``reference_kl``): a loss below one means "better than any uniform plan of this size in every
domain".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from kvbits.tuning.tables import Allocation, Choice, CostTable, FloatArray, SensitivityTable

Objective: TypeAlias = Literal["balanced", "minimax", "sum"]

# Shares of the worst domain and of the mean of all domains in what is minimised. The mean alone
# follows the noise of domains whose KL hangs on a few tokens; the worst alone gives up every gain
# that costs the best-measured domain a little.
SHARES: dict[Objective, tuple[float, float]] = {
    "balanced": (0.5, 0.5),
    "minimax": (1.0, 0.0),
    "sum": (0.0, 1.0),
}

# A domain whose reference KL is below this share of the largest domain's counts as that share:
# differences down there are too small to matter and, on a few documents, too noisy to be ordered.
DOMAIN_FLOOR = 0.05


class Problem(NamedTuple):
    """One allocation problem: additive KLs beside the costs, and how domains are weighed."""

    costs: CostTable
    kl_nats: FloatArray  # [domains, L, P], nats per token
    norms: FloatArray  # [domains], nats per token; the KL that counts as a loss of one
    weights: FloatArray  # [domains], of the mean; they sum to one
    objective: Objective

    @property
    def loss(self) -> FloatArray:
        """Normalised KLs, ``[domains, L, P]``."""
        return self.kl_nats / self.norms[:, None, None]

    def at(self, bits: float) -> Problem:
        """Return the same problem with losses relative to uniform plans of another size."""
        return self._replace(norms=reference_kl(self.costs, self.kl_nats, bits))

    def predicted_kl(self, choice: Choice) -> FloatArray:
        """Return the additive KL of a choice, ``[domains]``, nats per token."""
        layers = np.arange(len(choice))
        return np.asarray(self.kl_nats[:, layers, list(choice)].sum(axis=1))

    def score(self, kl_nats: Sequence[float] | FloatArray) -> float:
        """Return the objective of per-domain KLs, predicted or measured, ``[domains]``."""
        return float(self.scores(np.asarray(kl_nats)))

    def scores(self, kl_nats: FloatArray) -> FloatArray:
        """Return the objective of each of several plans: ``[..., domains]`` to ``[...]``."""
        normalised = kl_nats / self.norms
        worst, mean = SHARES[self.objective]
        return np.asarray(worst * normalised.max(-1) + mean * (self.weights * normalised).sum(-1))

    def allocation(self, choice: Choice) -> Allocation:
        """Return a choice with its size, its predicted KLs and its objective."""
        predicted = self.predicted_kl(choice)
        bits = self.costs.effective_bits(choice)
        return Allocation(choice, bits, tuple(map(float, predicted)), self.score(predicted))


def build_problem(
    table: SensitivityTable | FloatArray,
    costs: CostTable,
    *,
    bits: float,
    objective: Objective = "balanced",
    weights: Sequence[float] | None = None,
) -> Problem:
    """Join sensitivities and costs; losses are relative to uniform plans of ``bits``.

    Args:
        table: Isolated KLs, or what each candidate costs, ``[domains, L, P]``.
        costs: Sizes.
        bits: Effective bits of the budget.
        objective: What is minimised.
        weights: Of the domains, ``[domains]``; equal by default.
    """
    kl_nats = (
        table.candidate_kl(costs.candidates) if isinstance(table, SensitivityTable) else table
    )
    weight = np.ones(len(kl_nats)) if weights is None else np.asarray(weights, float)
    norms = reference_kl(costs, kl_nats, bits)
    return Problem(costs, kl_nats, norms, weight / weight.sum(), objective)


def reference_kl(costs: CostTable, kl_nats: FloatArray, bits: float) -> FloatArray:
    """Return the KL a uniform plan of ``bits`` effective bits is expected to have, ``[domains]``.

    At the size of a uniform plan, the least additive KL of any uniform plan not larger; between
    sizes, interpolated in the logarithm, in which KL falls nearly linearly with bits. Full
    precision, whose KL is zero, is left out. Domains are then floored (``DOMAIN_FLOOR``).
    """
    layers = costs.units.shape[0]
    totals = kl_nats.sum(axis=1)  # [domains, P]
    sizes = np.array([costs.effective_bits((p,) * layers) for p in range(len(costs.candidates))])
    lossy = [p for p in np.argsort(sizes, kind="stable") if totals[:, p].max() > 0]
    if not lossy:
        return np.ones(len(totals))
    least = np.minimum.accumulate(totals[:, lossy], axis=1)
    logs = np.log(np.maximum(least, 1e-12))
    # Of equal sizes the last holds the minimum, which np.interp must see alone.
    last = np.append(np.diff(sizes[lossy]) > 0, True)
    norms = np.exp([np.interp(bits, sizes[lossy][last], row[last]) for row in logs])
    return np.asarray(np.maximum(norms, DOMAIN_FLOOR * norms.max()))
