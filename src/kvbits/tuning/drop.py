"""The smallest plan that a task's answers allow: bisection over a front, by paired measurement.

Accuracy is noisy where KL is not: a plan that changes three answers of two hundred is 1.5 points
away, give or take two. So every plan answers the same problems as full precision, the difference
is paired, and what is not known is said: the interval, and whether it leaves the limit out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

from kvbits.evaluation.accuracy import Accuracy, run_task
from kvbits.evaluation.statistics import Z95, Difference, paired_difference, proportion
from kvbits.evaluation.tasks import TASKS, Split
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import Candidates, SideOption
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.tables import Allocation, Choice
from kvbits.tuning.team import Alone, Kind, Team

RECORDS, SIDE_RECORDS = "drop.jsonl", "accuracy.jsonl"
DROP, SIDES = Kind("drop"), Kind("accuracy", ("kl_nats",))
SPLIT: Split = "valid"  # problems of the test split are for reporting

DropRule: TypeAlias = Literal["estimate", "interval"]


class DropLimit(NamedTuple):
    """How much worse than full precision a plan may be at a task.

    Attributes:
        most: Share of the problems, such as 0.01.
        rule: ``estimate``: the measured difference counts; ``interval``: the far end of its 95 %
            interval, so that chance lets a worse plan pass once in forty measurements.
        task: Name of the task.
        n: Problems.
        seed: Their seed.
    """

    most: float
    rule: DropRule
    task: str
    n: int
    seed: int

    def allows(self, difference: Difference) -> bool:
        """Whether a plan with this paired difference may be chosen."""
        worst = difference.difference if self.rule == "estimate" else difference.low
        return worst >= -self.most - 1e-12


def fewest_problems(most: float, rule: DropRule) -> int:
    """Return the fewest problems on which a drop of ``most`` can be told from a larger one.

    With ``estimate`` one answer must weigh no more than the limit. With ``interval`` a plan that
    changes no answer must pass: the interval of Bonett and Price is then Z √2 / (n + 2) wide.
    """
    if rule == "estimate":
        return math.ceil(1 / most - 1e-9)
    return math.ceil(Z95 * math.sqrt(2) / most - 2)


def solve(model: Any, tokenizer: Any, problems: DropLimit, plan: CachePlan | None) -> Accuracy:
    """Let a plan, or full precision, answer the calibration problems."""
    return run_task(
        model,
        tokenizer,
        TASKS[problems.task](),
        n=problems.n,
        seed=problems.seed,
        split=SPLIT,
        plan=plan,
    )


class Answers:
    """What plans answer to one set of problems; every plan is one line of ``drop.jsonl``.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        candidates: What the columns of a choice mean.
        limit: Says which problems.
        run: Where the records are, and go.
        progress: Told about every plan.
        team: Measures; this process alone by default.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        candidates: Candidates,
        limit: DropLimit,
        run: RunDir,
        progress: Progress,
        team: Team | None = None,
    ) -> None:
        self._model, self._tokenizer, self._candidates = model, tokenizer, candidates
        self.limit, self._run, self._progress = limit, run, progress
        self._team = team or Alone()
        self._known: dict[Choice, tuple[bool, ...]] = {
            tuple(record["choice"]): tuple(record["correct"]) for record in run.records(RECORDS)
        }

    def correct(self, choice: Choice) -> tuple[bool, ...]:
        """Return which problems a plan solves."""
        if choice not in self._known:
            for _, record in self._team.measure(DROP, [choice], self._measure, {}):
                self._known[choice] = tuple(record["correct"])
                self._run.append(RECORDS, record)
        return self._known[choice]

    def _measure(self, choice: Choice) -> dict[str, Any]:
        plan = self._candidates.plan(choice) if any(choice) else None
        result = solve(self._model, self._tokenizer, self.limit, plan)
        return {
            "choice": choice,
            "labels": self._candidates.labels(choice),
            "task": self.limit.task,
            "split": SPLIT,
            "seed": self.limit.seed,
            "correct": list(result.correct),
            "seconds": round(result.seconds, 3),
        }

    def difference(self, choice: Choice) -> Difference:
        """Return a plan's accuracy minus that of full precision, with its 95 % interval."""
        return paired_difference(self.correct(choice), self.correct((0,) * len(choice)))

    def smallest(self, front: Sequence[Allocation]) -> Allocation:
        """Return the smallest plan of a front that the limit allows, found by bisection.

        The last plan must be full precision, which is allowed unmeasured. The next smaller plan
        than the one returned was measured and is not allowed; a still smaller one that happens to
        pass would be luck, since accuracy does not rise as bits fall.
        """
        refused, allowed = -1, len(front) - 1
        self._progress.start("task accuracy", max(1, len(front).bit_length()))
        while allowed - refused > 1:
            middle = (refused + allowed) // 2
            if self.limit.allows(self.difference(front[middle].choice)):
                allowed = middle
            else:
                refused = middle
            self._progress.advance()
        self._progress.finish()
        return front[allowed]

    def account(self, chosen: Choice) -> dict[str, Any]:
        """Return what was measured of the chosen plan, for ``front.json``."""
        limit, difference = self.limit, self.difference(chosen)
        return {
            "task": limit.task,
            "most": limit.most,
            "rule": limit.rule,
            "n": limit.n,
            "split": SPLIT,
            "accuracy_16bit": proportion(self.correct((0,) * len(chosen)))[0],
            **_told(difference, limit),
        }


class SideAnswers:
    """What one packed side of one row gets wrong; every codec is one line of ``accuracy.jsonl``.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        candidates: The rows and the codecs.
        problems: Which problems.
        run: Where the records are, and go.
    """

    def __init__(
        self, model: Any, tokenizer: Any, candidates: Candidates, problems: DropLimit, run: RunDir
    ) -> None:
        self._model, self._tokenizer, self._candidates = model, tokenizer, candidates
        self._problems, self._run = problems, run

    def lost(self, progress: Progress, team: Team) -> list[dict[str, Any]]:
        """Return, as lines of a sensitivity profile, the share of problems lost by every side."""
        records = self._run.records(SIDE_RECORDS)
        known = {(record["layer"], record["label"]): record for record in records}
        rows, sides = self._candidates.layers, self._candidates.sides
        steps = {(row, option.label): option for row in rows for option in sides}
        progress.start("accuracy of sides", len(steps))
        progress.advance(len(known))
        measured = team.measure(SIDES, steps, lambda step: self._lost(step[0], steps[step]), known)
        for _, record in measured:
            self._run.append(SIDE_RECORDS, record)
            records.append(dict(record))
            progress.advance()
        progress.finish()
        return records

    def _lost(self, row: int, option: SideOption) -> dict[str, Any]:
        plan = self._candidates.isolated(row, option)
        correct = solve(self._model, self._tokenizer, self._problems, plan).correct
        lost = sum(x and not y for x, y in zip(self._full, correct, strict=True))
        record = {"layer": row, "side": option.side, "bits": option.bits}
        return record | {"label": option.label, "kl_nats": lost / len(correct), "n": len(correct)}

    @cached_property
    def _full(self) -> Sequence[bool]:
        """What full precision solves."""
        return solve(self._model, self._tokenizer, self._problems, None).correct


def _told(difference: Difference, limit: DropLimit) -> dict[str, Any]:
    """A difference, whether it shows the limit to be kept, and else about how many problems would.

    The width of the interval falls with the root of the number of problems.
    """
    margin = difference.difference + limit.most
    width = difference.difference - difference.low
    is_shown = difference.low >= -limit.most
    needed = math.ceil(limit.n * (width / margin) ** 2) if margin > 0 and not is_shown else None
    return {**difference._asdict(), "is_shown": is_shown, "problems_needed": needed}
