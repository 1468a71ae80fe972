"""One command's worth of tuning: measure, prune, cluster, search, verify, write the plan.

Every stage appends to its own file in the run directory and is skipped where it is complete, so a
run killed at any point goes on where it stopped and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvbits.errors import UnsupportedModelError
from kvbits.evaluation.corpora import DataSplit, TokenSet, default_sets
from kvbits.evaluation.sources import Wanted, counting_all, source_sets
from kvbits.evaluation.stream import reads_packed
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning import rivals
from kvbits.tuning.budget import limit_of
from kvbits.tuning.calibrated import calibrating, check_calibrated
from kvbits.tuning.candidates import Candidates, MakePlan, of_methods, of_mode
from kvbits.tuning.cluster import cluster_layers
from kvbits.tuning.costs import cost_table
from kvbits.tuning.drop import Answers, DropLimit, SideAnswers
from kvbits.tuning.front import Findings, front_document, plan_with_account
from kvbits.tuning.given import GivenRival, check_given
from kvbits.tuning.identity import Data, documents, identity, versions
from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.progress import Progress, Silent
from kvbits.tuning.prune import pareto_sets
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search.optuna_samplers import check_optuna
from kvbits.tuning.search.trials import Limit, Space
from kvbits.tuning.sensitivity import Meter, profile_errors
from kvbits.tuning.settings import DEFAULT_BITS, TuneSettings
from kvbits.tuning.signals import SIGNALS, Profiling
from kvbits.tuning.strategies import Found, Search, search
from kvbits.tuning.tables import CostTable, FloatArray
from kvbits.tuning.team import Alone, Team
from kvbits.tuning.verify import TaskSettings, Verifier

SPLITS: tuple[DataSplit, ...] = ("calibration", "heldout")


class TuneResult(NamedTuple):
    """What a study found and where it stands on disk."""

    plan: CachePlan
    front: dict[str, Any]
    run_dir: Path


class _Study(NamedTuple):
    model: Any
    tokenizer: Any
    settings: TuneSettings
    data: Data
    candidates: Candidates
    costs: CostTable
    limit: Limit
    run: RunDir
    progress: Progress
    team: Team
    answers: Answers | None
    given: Sequence[GivenRival]


def tune(
    model: Any,
    tokenizer: Any,
    settings: TuneSettings,
    run_dir: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    data: Data | None = None,
    team: Team | None = None,
    given: Sequence[GivenRival] = (),
    command: str | None = None,
) -> TuneResult:
    """Find a plan for a budget, verify it, and write ``plan.json`` and ``front.json``.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        settings: What to search for.
        run_dir: Created, or continued where it belongs to the same study.
        progress: Told about stages and steps.
        data: Token sets in place of the default ones for text, reasoning and recall.
        team: Measures; this process alone by default (``kvbits.tuning.scale`` has others).
        given: Plans from elsewhere to verify beside the found one. A finished run may be given
            more of them.
        command: How the study was called, for the reader of the report.

    Raises:
        RecordError: ``run_dir`` was made with other settings, data or another model, is in use
            or is damaged.
        ValueError: No plan fits the budget.
        UnsupportedModelError: The model has no layer that can be packed.
    """
    candidates = _candidates(model, settings)
    costs = cost_table(candidates, context=settings.context, batch=settings.batch)
    limit = limit_of(settings, candidates, costs)
    if settings.strategy in ("nsga2", "tpe"):
        check_optuna()
    data = data or default_data(tokenizer, settings, model)
    _check_weights(settings, data.calibration)
    run, progress, team = RunDir(run_dir), progress or Silent(), team or Alone()
    known = identity(model, settings, data, command)
    with run.lock(), team.join(known, run, data):
        run.check_identity(known)
        run.write_json("documents.json", documents(data))
        make = calibrating(model, data.calibration, run=run, progress=progress)
        candidates = _candidates(model, settings, make)
        check_calibrated(run, team)
        check_given(given, candidates)
        answers = _answers(model, tokenizer, settings, candidates, run, progress, team)
        study = _Study(
            *(model, tokenizer, settings, data, candidates, costs, limit, run, progress, team),
            answers,
            given,
        )
        findings = _verify(study, *_search(study))
        document = front_document(findings)
        plan = plan_with_account(findings, data.calibration, versions())
        run.write_json("front.json", document)
        plan.save(run.file("plan.json"))
    return TuneResult(plan, document, run.path)


def default_data(tokenizer: Any, settings: TuneSettings, model: Any = None) -> Data:
    """Return the documents of the study's domains; no document is in both splits.

    Args:
        tokenizer: The model's tokenizer.
        settings: Names the domains; text, reasoning and recall by default.
        model: Answers prompts, where a domain has some.
    """
    texts = {"calibration": settings.text, "heldout": settings.heldout_text}
    return Data(*(_sets(tokenizer, settings, model, split, texts[split]) for split in SPLITS))


def _sets(
    tokenizer: Any, settings: TuneSettings, model: Any, split: DataSplit, text: str | None
) -> list[TokenSet]:
    size, seed = settings.sizes, settings.seed
    if settings.calibration:
        wanted = Wanted(tokenizer, model, split, size, seed, settings.answer_tokens)
        return source_sets(settings.calibration, wanted, settings.count)
    sets = default_sets(tokenizer, split, size=size, seed=seed, text=text)
    return [counting_all(each) for each in sets] if settings.count == "all" else sets


def _candidates(model: Any, settings: TuneSettings, make: MakePlan | None = None) -> Candidates:
    """The study's candidates; without ``make``, those of calibrated methods have their size only.

    Raises:
        UnsupportedModelError: The model has no layer that can be packed.
    """
    geometry = ModelGeometry.from_config(model.config)
    if not geometry.packable_layers:
        raise UnsupportedModelError(
            "model must have a full attention layer, the only kind that is packed, got "
            f"{geometry.architecture} with none"
        )
    by, widths = settings.granularity, settings.widths
    if settings.mode is not None:
        return of_mode(model.config, settings.mode, widths, granularity=by)
    return of_methods(model.config, settings.candidates, widths, make, granularity=by)


def _answers(
    model: Any,
    tokenizer: Any,
    settings: TuneSettings,
    candidates: Candidates,
    run: RunDir,
    progress: Progress,
    team: Team,
) -> Answers | None:
    """Answers to the task of a ``max_drop``, None for other budgets."""
    if settings.max_drop is None:
        return None
    return Answers(model, tokenizer, candidates, _problems_of(settings), run, progress, team)


def _problems_of(settings: TuneSettings) -> DropLimit:
    """The calibration problems of the first task, and how many of them may be lost."""
    most, task = settings.max_drop or 0.0, next(iter(settings.tasks), "")
    return DropLimit(most, settings.drop_rule, task, settings.task_n, settings.seed)


def _check_weights(settings: TuneSettings, token_sets: Sequence[TokenSet]) -> None:
    weights = settings.domain_weights
    if weights is not None and len(weights) != len(token_sets):
        raise ValueError(
            f"domain_weights must have one weight for each of the {len(token_sets)} domains, "
            f"got {len(weights)}"
        )


def _search(study: _Study) -> tuple[Problem, Found]:
    settings, costs, run = study.settings, study.costs, study.run
    meter = Meter(study.model, study.data.calibration, study.candidates)
    is_seen = reads_packed(study.model)
    if is_seen:
        error_records = profile_errors(meter, run=run, progress=study.progress, team=study.team)
    sides = SideAnswers(
        study.model, study.tokenizer, study.candidates, _problems_of(settings), run
    )
    profiling = Profiling(meter, costs, sides, run, study.progress, study.team)
    problem = build_problem(
        SIGNALS[settings.sensitivity](profiling),
        costs,
        bits=study.limit.bits or DEFAULT_BITS,
        objective=settings.objective,
        weights=settings.domain_weights,
    )
    if is_seen:
        errors = np.array([record["e_o"] for record in error_records]).reshape(costs.units.shape)
        space = _prune(study, "e_o", errors)
    else:  # attention of the model's own does not show what it caches
        space = _prune(study, settings.sensitivity, problem.loss.max(axis=0))
    given = Search(
        problem,
        space,
        meter.document_kl,
        settings,
        study.limit,
        run,
        study.progress,
        study.team,
        study.answers,
    )
    return problem, search(given)


def _prune(study: _Study, sensitivity: str, errors: FloatArray) -> Space:
    """Prune and cluster on e_o, or what the programme adds up; write ``pruned.json``."""
    costs, layers = study.costs, study.candidates.layers
    kept = pareto_sets(costs, errors)
    groups = cluster_layers(kept, errors)
    candidates = {
        str(layer): [costs.candidates[index].label for index in indices]
        for layer, indices in zip(layers, kept, strict=True)
    }
    named = [[layers[row] for row in group] for group in groups]
    study.run.write_json(
        "pruned.json", {"sensitivity": sensitivity, "candidates": candidates, "groups": named}
    )
    return Space(groups, tuple(kept[group[0]] for group in groups))


def _verify(study: _Study, problem: Problem, found: Found) -> Findings:
    settings = study.settings
    bits = study.limit.bits or found.chosen.effective_bits
    entries = rivals.list_entries(
        problem,
        found.front,
        origin=rivals.searched_origin(settings.strategy),
        bits=bits,
        chosen=found.chosen,
        random_seeds=[1000 * settings.seed + n for n in range(settings.random_plans)],
    )
    entries += rivals.given_entries(problem, study.given, study.candidates)
    verifier = Verifier(
        Meter(study.model, study.data.heldout, study.candidates),
        study.tokenizer,
        TaskSettings(settings.tasks, settings.task_n, settings.seed),
        study.run,
        study.team,
    )
    domains = tuple(token_set.domain for token_set in study.data.calibration)
    findings = Findings(
        *(settings, problem, domains, bits, entries, found.front, found.chosen, verifier),
        None if study.answers is None else study.answers.account(found.chosen.choice),
    )
    verifier.run_all(entries, study.progress)
    return findings
