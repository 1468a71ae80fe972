"""The last step of the exact search: measure a few good plans at the budget, take the best.

Isolated KLs add up well above three bits; below, errors of several layers can break what none
breaks alone. So the additive model proposes, and a measurement of the whole plan on the same
calibration data disposes. Held-out data takes no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve
from kvbits.tuning.tables import Allocation, Choice

Evaluate: TypeAlias = Callable[[Choice], tuple[float, ...]]

RECORDS = "search.jsonl"


def refinement_candidates(problem: Problem, bits: float) -> list[Choice]:
    """Return the distinct plans worth measuring within the budget, the search's own first.

    The solutions for the worst domain and for the mean of all domains, and the best uniform plan
    and ladder, so that the choice is never one that a rule of thumb is measured to beat.
    """
    budget = problem.costs.budget(bits)
    objectives = (
        problem,
        problem._replace(objective="minimax"),
        problem._replace(objective="sum"),
    )
    choices = [solve(variant, budget) for variant in objectives]
    for family in (baselines.uniform(problem), baselines.ladders(problem)):
        best = baselines.best(problem, family, bits)
        choices.append(best[1].choice if best is not None else None)
    return list(dict.fromkeys(choice for choice in choices if choice is not None))


def refine(
    problem: Problem,
    candidates: Sequence[Choice],
    evaluate: Evaluate,
    *,
    run: RunDir,
    progress: Progress,
) -> Allocation:
    """Measure the candidates on calibration data; return the one of least measured loss.

    Of equals the earlier candidate wins. Measurements are lines of ``search.jsonl`` and are not
    repeated.
    """
    measured = {tuple(r["choice"]): tuple(r["kl_nats"]) for r in run.records(RECORDS)}
    progress.start("search", len(candidates))
    for choice in candidates:
        if choice not in measured:
            measured[choice] = evaluate(choice)
            run.append(RECORDS, _record(problem, choice, measured[choice]))
        progress.advance()
    progress.finish()
    best = min(candidates, key=lambda choice: problem.score(measured[choice]))
    return problem.allocation(best)


def _record(problem: Problem, choice: Choice, kl_nats: tuple[float, ...]) -> dict[str, object]:
    return {
        "choice": choice,
        "pairs": problem.costs.pairs_of(choice),
        "effective_bits": problem.costs.effective_bits(choice),
        "kl_nats": kl_nats,
        "loss": problem.score(kl_nats),
        "predicted_loss": problem.allocation(choice).loss,
    }
