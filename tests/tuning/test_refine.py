from __future__ import annotations

from kvbits.tuning.progress import Silent
from kvbits.tuning.refine import better_measured, refinement_candidates
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve
from kvbits.tuning.search.trials import Listed, run_trials


def test_candidates_fit_and_hold_the_programme_s_solution_first(problem):
    candidates = refinement_candidates(problem, 4.0)
    assert candidates[0] == solve(problem, problem.costs.budget(4.0))
    assert len(set(candidates)) == len(candidates) >= 3
    assert all(problem.costs.effective_bits(choice) <= 4.0 for choice in candidates)
    assert baselines.best(problem, baselines.uniform(problem), 4.0)[1].choice in candidates


def domains_of(problem, choice, factors=(1.0, 1.0, 1.0, 1.0)):
    """Four documents of ten tokens per domain; ``factors`` scale the KL of each document."""
    return [
        {
            "kl_nats": kl * sum(factors) / 4,
            "document_kl_nats": [kl * factor for factor in factors],
            "document_tokens": [10] * 4,
        }
        for kl in problem.predicted_kl(choice).tolist()
    ]


def refined(problem, path, factors):
    """Refine with the model as the measurement, but for the proposal scaled by ``factors``."""
    candidates = refinement_candidates(problem, 4.0)

    def evaluate(choice):
        return domains_of(problem, choice, *([factors] if choice == candidates[0] else []))

    measured = run_trials(
        problem, Listed(candidates), evaluate, trials=99, run=RunDir(path), progress=Silent()
    )
    return better_measured(problem, measured, candidates[0]), candidates


def test_additive_model_is_followed_where_measurements_agree(problem, tmp_path):
    chosen, candidates = refined(problem, tmp_path, (1.0, 1.0, 1.0, 1.0))
    assert chosen == candidates[0]


def test_consistent_failure_of_the_proposal_overrules_the_model(problem, tmp_path):
    """Ten times worse than predicted in every document, as recall may turn out at two bits."""
    chosen, candidates = refined(problem, tmp_path, (10.0, 11.0, 9.0, 10.0))
    assert chosen != candidates[0]


def test_one_bad_document_does_not_overrule_the_model(problem, tmp_path):
    """The mean is as bad as above, but a single document made it: its interval spans zero."""
    chosen, candidates = refined(problem, tmp_path, (37.0, 1.0, 1.0, 1.0))
    assert chosen == candidates[0]
