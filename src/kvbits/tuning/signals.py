"""What the allocator adds up: forward KL, or a cheaper or dearer stand-in for it.

Every signal is a table of what each candidate costs in each row and domain. Only isolated KLs are
in nats as they stand; the others are brought to nats by measuring one uniform plan, so that what
is predicted, measured and reported is one thing. That changes no order within a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from kvbits.errors import CalibrationError
from kvbits.tuning.drop import SideAnswers
from kvbits.tuning.fisher import profile_fisher
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, profile_errors, profile_kl
from kvbits.tuning.tables import CostTable, FloatArray, sensitivity_table
from kvbits.tuning.team import Team

Signal: TypeAlias = Literal["kl", "fisher", "e_o", "accuracy"]
ANCHORS = "anchor.jsonl"


class Profiling(NamedTuple):
    """What a signal may use.

    Attributes:
        meter: The model with its calibration sets and candidates.
        costs: Sizes of the candidates.
        answers: To the problems of the study's first task.
        run: Takes the records.
        progress: Told about steps.
        team: Measures.
    """

    meter: Meter
    costs: CostTable
    answers: SideAnswers
    run: RunDir
    progress: Progress
    team: Team

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.meter.token_sets)

    def of_sides(self, records: Sequence[Mapping[str, Any]]) -> FloatArray:
        """Add up sides: records with ``kl_nats`` to ``[domains, rows, P]``."""
        candidates = self.meter.candidates
        table = sensitivity_table(
            records,
            domains=self.domains,
            sides=[option.label for option in candidates.sides],
            layers=candidates.layers,
        )
        return table.candidate_kl(self.costs.candidates)


def kl(given: Profiling) -> FloatArray:
    """Isolated forward KL: every codec of every row in a pass of its own."""
    return given.of_sides(
        profile_kl(given.meter, run=given.run, progress=given.progress, team=given.team)
    )


def fisher(given: Profiling) -> FloatArray:
    """Fisher-weighted squared error: one backward pass for all rows and codecs."""
    records = profile_fisher(given.meter, run=given.run, progress=given.progress)
    return anchored(given, given.of_sides(records))


def attention_output(given: Profiling) -> FloatArray:
    """KVTuner's e_o, the same for all domains: one forward pass for all rows and candidates."""
    records = profile_errors(given.meter, run=given.run, progress=given.progress, team=given.team)
    errors = np.array([record["e_o"] for record in records]).reshape(given.costs.units.shape)
    return anchored(given, np.repeat(errors[None], len(given.domains), axis=0))


def accuracy(given: Profiling) -> FloatArray:
    """Share of the first task's problems that only full precision solves, with one side packed.

    The same for all domains. A side whose loss is too small for the number of problems counts
    nothing, so that many problems are needed: KL is the better signal wherever it can be had.
    """
    lost = given.of_sides(
        [
            record | {"domain": domain}
            for record in given.answers.lost(given.progress, given.team)
            for domain in given.domains
        ]
    )
    if not lost.any():
        raise CalibrationError(
            "sensitivity accuracy must see a problem that some codec alone gets wrong, got none; "
            "give more problems with -n, narrower widths, or sensitivity kl"
        )
    return anchored(given, lost)


SIGNALS: Mapping[Signal, Callable[[Profiling], FloatArray]] = {
    "kl": kl,
    "fisher": fisher,
    "e_o": attention_output,
    "accuracy": accuracy,
}


def anchored(given: Profiling, table: FloatArray) -> FloatArray:
    """Scale ``[domains, rows, P]`` so that the narrowest uniform plan has the KL it measures."""
    rows = table.shape[1]
    column = int(given.costs.units.sum(axis=0).argmin())
    records = given.run.records(ANCHORS)
    if not records:
        measured = given.meter.document_kl((column,) * rows)
        given.run.append(ANCHORS, {"kl_nats": [domain["kl_nats"] for domain in measured]})
        records = given.run.records(ANCHORS)
    totals = table[:, :, column].sum(axis=1)
    scale = np.array(records[0]["kl_nats"]) / np.where(totals > 0, totals, 1.0)
    return np.asarray(table * scale[:, None, None])
