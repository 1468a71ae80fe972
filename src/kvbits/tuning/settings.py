"""Everything that decides what a study measures and finds; stored in ``study.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbits.codecs.base import Width
from kvbits.evaluation.corpora import SetSize
from kvbits.evaluation.sources import Counting, parse_source
from kvbits.evaluation.tasks import TASKS
from kvbits.plan import MODES, WIDTHS
from kvbits.plan.modes import EXACT_BITS
from kvbits.tuning.candidates import Granularity, check_names
from kvbits.tuning.drop import DropRule, fewest_problems

_SIZES = SetSize()


BUDGETS = ("bits", "memory", "max_kl", "max_drop")
DEFAULT_BITS = 4.0
DROP_PROBLEMS = 200
Strategy = Literal["exact", "exact+", "moead", "nsga2", "tpe", "uniform", "ladder", "random"]
LEARNING: tuple[Strategy, ...] = ("moead", "nsga2", "tpe")
"""Strategies that measure many trials and learn from each."""
RECIPES: dict[str, dict[str, Any]] = {
    "kvtuner": {
        "strategy": "moead",
        "widths": (8, 4, 2),
        "trials": 200,
        "population": 50,
        "limits": (4.0, 6.0),
    },
}
"""Published ways to search, as settings.

``kvtuner`` prunes, clusters, and runs 200 trials of MOEA/D under each of two soft limits.

Source: KVTuner (arXiv 2502.04420).
Differs from the paper: limits count metadata; the objective is KL through the cache, not the
accuracy of generated answers; a population of 50, which the paper does not say.
"""


class TuneSettings(BaseModel):
    """Settings of one study; immutable. Two studies with equal settings give equal results.

    Attributes:
        bits: Budget in effective bits: stored bits per value, metadata included. It is 4 where no
            budget of another kind is given.
        memory: Budget in bytes for ``batch`` rows of ``context`` tokens, all layers together.
        max_kl: Budget in quality: nats per token in the worst domain, on calibration data.
        max_drop: Budget in quality: share of the problems of the first task by which a plan may
            be worse than full precision, such as 0.01.
        drop_rule: What of the paired difference counts for ``max_drop``: the ``estimate``, or the
            far end of its 95 % ``interval``.
        strategy: ``exact`` solves the additive model; ``exact+`` corrects it by measuring its
            solutions; ``moead``, ``nsga2`` and ``tpe`` measure every trial; ``uniform``,
            ``ladder`` and ``random`` are what a search has to beat.
        mode: ``per_token`` or ``kivi``; None where ``candidates`` are given.
        candidates: Methods to choose from in every layer, such as ``kvarn`` or
            ``kivi:sink_tokens=4``; by default those of the mode alone.
        widths: Candidate code widths; every pair of those a method has is a candidate, and 16 for
            both sides.
        granularity: ``side``: keys and values of a layer have widths of their own; ``layer``: they
            share one; ``head``: keys and values of every key/value head have widths of their own.
        sensitivity: What the programme adds up: ``kl``, the isolated forward KL; ``fisher``, the
            error weighted by one backward pass; ``e_o``, the error of the attention output;
            ``accuracy``, the problems of the first task that one packed side gets wrong.
        objective: What the search minimises of the domains' KLs, each relative to uniform plans
            of the same size: ``minimax`` the worst, ``sum`` the weighted mean, ``balanced`` the
            two together.
        domain_weights: Weights of text, reasoning and recall in the mean; equal by default.
        context: Tokens of a row at which sizes are counted, residual and page rounding
            included; None counts what one more token of a long context adds.
        batch: Rows of a cache of ``context`` tokens.
        report_context: Tokens at which the front also states each plan's size.
        seed: Of the generated documents, NSGA-II and the random plans.
        text: Path of calibration text; the bundled sample by default.
        heldout_text: Path of the text to verify on; the bundled held-out sample by default.
        calibration: Domains in place of text, reasoning and recall, as ``evaluation.sources``
            reads them: ``code``, ``chat=prompts.jsonl``, ``wiki=hf:NAME``, ``x=task:copy``.
        count: Of documents with questions, count the ``answers`` only or ``all`` tokens.
        chat_documents: Conversations per split.
        answer_tokens: Most tokens of an answer that the model itself gives.
        text_documents: Windows of text per split; at least two, or no standard error exists.
        text_tokens: Tokens of a window.
        reasoning_documents: Arithmetic problems per split; many, because a few tokens of a few
            problems hold most of the KL.
        recall_documents: Recall documents per split.
        recall_tokens: Approximate tokens of a recall document.
        trials: Plans that strategies measure which go by measuring, under each limit.
        population: Population of ``moead`` and ``nsga2``; random trials that ``tpe`` starts with.
        parallel: Trials that ``moead``, ``nsga2`` and ``tpe`` propose before the first of them is
            known, so that several workers have something to do. It decides what is found; how many
            workers there are does not.
        limits: Soft limits in effective bits that those strategies search under one after the
            other, results joined; by default the budget alone.
        random_plans: Random plans to compare with.
        tasks: Tasks run on full precision, the chosen plan and the best rivals.
        task_n: Problems per task; 0 runs none. 200 where ``max_drop`` is given: as many to choose
            by and as many others to verify on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: float | None = Field(default=None, gt=0, le=EXACT_BITS)
    memory: int | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, gt=0, lt=1)
    drop_rule: DropRule = "estimate"
    strategy: Strategy = "exact"
    mode: Literal["per_token", "kivi"] | None = None
    candidates: tuple[str, ...] = ()
    widths: tuple[Width, ...] = (8, 4, 3, 2)
    granularity: Granularity = "side"
    sensitivity: Literal["kl", "fisher", "e_o", "accuracy"] = "kl"
    objective: Literal["balanced", "minimax", "sum"] = "minimax"
    domain_weights: tuple[float, ...] | None = None
    context: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    report_context: int = Field(default=4096, ge=1)
    seed: int = Field(default=0, ge=0)
    text: str | None = None
    heldout_text: str | None = None
    calibration: tuple[str, ...] = ()
    count: Counting = "answers"
    chat_documents: int = Field(default=_SIZES.chat_documents, ge=2)
    answer_tokens: int = Field(default=96, ge=1)
    text_documents: int = Field(default=_SIZES.text_documents, ge=2)
    text_tokens: int = Field(default=_SIZES.text_tokens, ge=2)
    reasoning_documents: int = Field(default=24, ge=2)
    recall_documents: int = Field(default=_SIZES.recall_documents, ge=2)
    recall_tokens: int = Field(default=_SIZES.recall_tokens, ge=64)
    trials: int = Field(default=100, ge=1)
    population: int = Field(default=20, ge=2)
    parallel: int = Field(default=1, ge=1)
    limits: tuple[Annotated[float, Field(gt=0)], ...] = ()
    random_plans: int = Field(default=3, ge=0)
    tasks: tuple[str, ...] = ("arithmetic",)
    task_n: int = Field(default=32, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Give studies without a mode or methods the first mode, and without a budget 4 bits."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if not filled.get("candidates") and filled.get("mode") is None:
            filled["mode"] = MODES[0]
        if all(filled.get(name) is None for name in BUDGETS):
            filled["bits"] = DEFAULT_BITS
        if filled.get("max_drop") is not None:
            filled.setdefault("task_n", DROP_PROBLEMS)
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths must be given, each once, got {self.widths}")
        if self.candidates:
            if self.mode:
                raise ValueError(
                    f"mode must not be given together with candidates, got {self.mode!r}; "
                    "per-token and kivi are among the methods"
                )
            check_names(self.candidates, self.widths)
        packed = sorted(set(WIDTHS) - {EXACT_BITS})
        for width in () if self.candidates else self.widths:
            if width not in packed:
                raise ValueError(f"widths must be among {packed}, got {width}")
        self._check_budget()
        self._check_search()
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks must be among {', '.join(sorted(TASKS))}, got {task!r}")
        for source in self.calibration:
            parse_source(source)
        if self.calibration and self.text is not None:
            raise ValueError(
                "text must not be given together with calibration, which names all domains; "
                f"give calibration text={self.text}"
            )
        if (self.text is None) != (self.heldout_text is None):
            raise ValueError(
                "text and heldout_text must be given together, got one of them; a plan must be "
                "verified on text it was not tuned on, of the same kind"
            )
        return self

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} must be the only budget, got {given[1]} too")
        if self.memory is not None and self.context is None:
            raise ValueError(
                "context must be given with memory, got none; a budget in bytes is "
                "for a number of tokens"
            )
        if self.sensitivity == "accuracy" and not (self.tasks and self.task_n):
            raise ValueError(
                "tasks must name one with sensitivity accuracy, got none or no problem"
            )
        if self.max_drop is not None:
            self._check_drop(self.max_drop)
        elif self.drop_rule != "estimate":
            raise ValueError(f"drop_rule must be given with max_drop, got {self.drop_rule} alone")

    def _check_drop(self, most: float) -> None:
        if not self.tasks:
            raise ValueError("tasks must name one with max_drop, which is a drop in it, got none")
        fewest = fewest_problems(most, self.drop_rule)
        if self.task_n < fewest:
            raise ValueError(
                f"task_n must be at least {fewest} to tell a drop of {100 * most:g} % by its "
                f"{self.drop_rule}, got {self.task_n}; give more problems with -n"
            )

    def _check_search(self) -> None:
        if self.domain_weights is not None and self.objective == "minimax":
            raise ValueError(
                "domain_weights must be given with objective sum or balanced, got minimax, which "
                "has no use for them"
            )
        for name in ("limits", "parallel"):
            is_given = getattr(self, name) != type(self).model_fields[name].default
            if is_given and self.strategy not in LEARNING:
                raise ValueError(
                    f"{name} must be given with strategy moead, nsga2 or tpe, got {self.strategy}"
                )
        if self.limits and (self.bits is None or min(self.limits) > self.bits):
            raise ValueError(
                f"limits must have one within the budget of {self.bits} bits, got {self.limits}"
            )

    @property
    def sizes(self) -> SetSize:
        """Documents and tokens of the default token sets."""
        return SetSize(
            text_documents=self.text_documents,
            text_tokens=self.text_tokens,
            reasoning_documents=self.reasoning_documents,
            recall_documents=self.recall_documents,
            recall_tokens=self.recall_tokens,
            chat_documents=self.chat_documents,
        )
