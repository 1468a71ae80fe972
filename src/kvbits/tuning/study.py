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
from kvbits.evaluation.corpora import TokenSet, default_sets
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning import rivals
from kvbits.tuning.calibrated import calibrating
from kvbits.tuning.candidates import Candidates, MakePlan, of_methods, of_mode
from kvbits.tuning.cluster import cluster_layers
from kvbits.tuning.costs import cost_table
from kvbits.tuning.front import Findings, front_document, plan_with_account
from kvbits.tuning.identity import Data, identity, versions
from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.progress import Progress, Silent
from kvbits.tuning.prune import pareto_sets
from kvbits.tuning.refine import refine, refinement_candidates
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import exact, nsga2
from kvbits.tuning.sensitivity import Meter, profile_errors, profile_kl
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.tables import (
    Allocation,
    Choice,
    CostTable,
    FloatArray,
    sensitivity_table,
)
from kvbits.tuning.verify import TaskSettings, Verifier


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
    run: RunDir
    progress: Progress


def tune(
    model: Any,
    tokenizer: Any,
    settings: TuneSettings,
    run_dir: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    data: Data | None = None,
) -> TuneResult:
    """Find a plan for a budget, verify it, and write ``plan.json`` and ``front.json``.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        settings: What to search for.
        run_dir: Created, or continued where it belongs to the same study.
        progress: Told about stages and steps.
        data: Token sets in place of the default ones for text, reasoning and recall.

    Raises:
        RecordError: ``run_dir`` was made with other settings, data or another model, is in use
            or is damaged.
        ValueError: No plan fits the budget.
        UnsupportedModelError: The model has no layer that can be packed.
    """
    candidates = _candidates(model, settings)
    costs = _costs(candidates, settings)
    data = data or default_data(tokenizer, settings)
    _check_weights(settings, data.calibration)
    run, progress = RunDir(run_dir), progress or Silent()
    with run.lock():
        run.check_identity(identity(model, settings, data))
        make = calibrating(model, data.calibration, run=run, progress=progress)
        candidates = _candidates(model, settings, make)
        study = _Study(model, tokenizer, settings, data, candidates, costs, run, progress)
        findings = _verify(study, _search(study))
        document = front_document(findings)
        plan = plan_with_account(findings, data.calibration, versions())
        run.write_json("front.json", document)
        plan.save(run.file("plan.json"))
    return TuneResult(plan, document, run.path)


def default_data(tokenizer: Any, settings: TuneSettings) -> Data:
    """Return text, reasoning and recall documents; no document is in both splits."""
    size, seed = settings.sizes, settings.seed
    return Data(
        default_sets(tokenizer, "calibration", size=size, seed=seed, text=settings.text),
        default_sets(tokenizer, "heldout", size=size, seed=seed, text=settings.heldout_text),
    )


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
    if settings.mode is not None:
        return of_mode(model.config, settings.mode, settings.widths)
    return of_methods(model.config, settings.candidates, settings.widths, make)


def _costs(candidates: Candidates, settings: TuneSettings) -> CostTable:
    costs = cost_table(candidates, context=settings.context)
    smallest = costs.units.min(axis=1).sum() * costs.unit_bits / costs.num_values
    if smallest > settings.bits + 1e-9:
        raise ValueError(
            f"bits must be at least {smallest:.2f} effective bits, what the smallest plan stores "
            f"with its metadata, got {settings.bits:g}; raise bits or add narrower widths"
        )
    return costs


def _check_weights(settings: TuneSettings, token_sets: Sequence[TokenSet]) -> None:
    weights = settings.domain_weights
    if weights is not None and len(weights) != len(token_sets):
        raise ValueError(
            f"domain_weights must have one weight for each of the {len(token_sets)} domains, "
            f"got {len(weights)}"
        )


class _Found(NamedTuple):
    problem: Problem
    front: list[Allocation]
    chosen: Allocation


def _search(study: _Study) -> _Found:
    settings, costs, run = study.settings, study.costs, study.run
    meter = Meter(study.model, study.data.calibration, study.candidates)
    error_records = profile_errors(meter, run=run, progress=study.progress)
    table = sensitivity_table(
        profile_kl(meter, run=run, progress=study.progress),
        domains=tuple(meter.token_sets),
        sides=[option.label for option in study.candidates.sides],
        layers=study.candidates.layers,
    )
    problem = build_problem(
        table,
        costs,
        bits=settings.bits,
        objective=settings.objective,
        weights=settings.domain_weights,
    )
    errors = np.array([record["e_o"] for record in error_records]).reshape(costs.units.shape)
    space = _prune(study, errors)
    if settings.strategy == "nsga2":
        front = _evolve(study, meter, problem, space)
        return _Found(problem, front, _fitting(problem, front, settings))
    # The programme needs no pruning: it takes every candidate of every layer.
    front = exact.solve_front(problem, exact.budget_grid(costs, settings.bits))
    chosen = refine(
        problem,
        refinement_candidates(problem, settings.bits),
        meter.document_kl,
        run=run,
        progress=study.progress,
    )
    return _Found(problem, front, chosen)


def _fitting(problem: Problem, front: Sequence[Allocation], settings: TuneSettings) -> Allocation:
    chosen = rivals.choose(problem, front, settings.bits)
    if chosen is None:
        raise ValueError(
            f"trials must be enough to find a plan within {settings.bits:g} bits, "
            f"got {settings.trials}; strategy exact always finds one"
        )
    return chosen


def _evolve(study: _Study, meter: Meter, problem: Problem, space: nsga2.Space) -> list[Allocation]:
    def evaluate(choice: Choice) -> tuple[float, ...]:
        return tuple(domain["kl_nats"] for domain in meter.document_kl(choice))

    settings = study.settings
    limits = nsga2.Settings(settings.trials, settings.population, settings.seed, settings.bits)
    return nsga2.search(problem, space, evaluate, limits, run=study.run, progress=study.progress)


def _prune(study: _Study, errors: FloatArray) -> nsga2.Space:
    """Prune and cluster on e_o; write ``pruned.json``."""
    costs, layers = study.costs, study.candidates.layers
    kept = pareto_sets(costs, errors)
    groups = cluster_layers(kept, errors)
    candidates = {
        str(layer): [costs.candidates[index].label for index in indices]
        for layer, indices in zip(layers, kept, strict=True)
    }
    named = [[layers[row] for row in group] for group in groups]
    study.run.write_json(
        "pruned.json", {"sensitivity": "e_o", "candidates": candidates, "groups": named}
    )
    return nsga2.Space(groups, tuple(kept[group[0]] for group in groups))


def _verify(study: _Study, found: _Found) -> Findings:
    settings = study.settings
    entries = rivals.list_entries(
        found.problem,
        found.front,
        strategy=settings.strategy,
        bits=settings.bits,
        chosen=found.chosen,
        random_seeds=[1000 * settings.seed + n for n in range(settings.random_plans)],
    )
    verifier = Verifier(
        Meter(study.model, study.data.heldout, study.candidates),
        study.tokenizer,
        TaskSettings(settings.tasks, settings.task_n, settings.seed),
        study.run,
    )
    domains = tuple(token_set.domain for token_set in study.data.calibration)
    findings = Findings(
        settings, found.problem, domains, entries, found.front, found.chosen, verifier
    )
    verifier.run_all(entries, study.progress)
    return findings
