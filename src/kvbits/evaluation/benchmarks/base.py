"""What a benchmark is: items asked of a model, and a score for what it answered.

A benchmark says what to ask and how to judge. How prompts become tokens (few-shot examples as text
or as turns, chat template, cutting in the middle), batches, the cache, records and resumption are
the same for all, in ``prompts.py`` and ``running.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from kvbits.evaluation.benchmarks.source import DataFile, Source
from kvbits.evaluation.likelihood import Likelihood
from kvbits.evaluation.samples import Sample
from kvbits.evaluation.token_set import Segment, encode_continuation

Shot = tuple[str, str]


class Prompt(NamedTuple):
    """What a model is asked.

    Attributes:
        question: The question as text, or everything, where there is nothing else.
        shots: Examples before it, each a question and its answer; an answer brings the space or
            line break before it along, which turns of a chat leave out.
        system: System prompt of a chat; the first line of a text.
        lead: How the answer begins; the model continues it.
        separator: Stands between examples of a text.
        is_plain: Never wrapped in a chat template, whatever the run says.
        may_cut: Its middle may be left out to fit; a prompt without this that is too long is
            refused.
    """

    question: str
    shots: tuple[Shot, ...] = ()
    system: str = ""
    lead: str = ""
    separator: str = "\n\n"
    is_plain: bool = False
    may_cut: bool = False


class Generate(NamedTuple):
    """Ask for text; the response is a ``str``, cut before the first stop string.

    Attributes:
        prompt: The prompt.
        max_new_tokens: Tokens of the answer at most.
        stop: Strings that end it.
    """

    prompt: Prompt
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class Rank(NamedTuple):
    """Ask how likely answers are; the response is one ``Likelihood`` each.

    Attributes:
        prompt: What stands before each answer.
        answers: Texts, with the space before them.
    """

    prompt: Prompt
    answers: tuple[str, ...]


class Read(NamedTuple):
    """Ask how likely tokens are; the response is one ``Likelihood``, in a tuple.

    Attributes:
        segments: The tokens, and which of them count.
    """

    segments: tuple[Segment, ...]


Request = Generate | Rank | Read
Response = str | tuple[Likelihood, ...]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One example of a benchmark.

    Args:
        doc_id: Its number, unique in the benchmark.
        request: What is asked.
        doc: What it was made of; its hash tells examples apart.
        references: Right answers.
        task: Name under which it is counted, the benchmark's if empty. Means are not taken over
            tasks.
        group: Part of the task whose mean is reported too, such as a subject or a length.
    """

    doc_id: int
    request: Request
    doc: Mapping[str, Any]
    references: tuple[str, ...] = ()
    task: str = ""
    group: str = ""


class Scores(NamedTuple):
    """What became of an item.

    Attributes:
        metrics: Scores by name; of perplexities, the mean log-likelihood.
        weights: Tokens, words or bytes behind such a mean, by metric; 1 if not given.
    """

    metrics: dict[str, float]
    weights: dict[str, float] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What items are made from.

    Args:
        source: Where data files are read.
        tokenizer: The model's tokenizer, for prompts of a wanted length.
        shots: Examples before each question.
        seed: Seed of everything random.
        is_chat: Whether prompts are wrapped in a chat template.
    """

    source: Source
    tokenizer: Any = field(repr=False)
    shots: int
    seed: int
    is_chat: bool = False

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return len(encode_continuation(self.tokenizer, text))


class Benchmark(BaseModel, ABC):
    """A benchmark with its settings; immutable, and the same for every model.

    Attributes:
        name: What users call it.
        description: What it asks, in one line.
        origin: Where it was published.
        files: Data files it reads; none if it generates its items.
        default_shots: Examples before each question, if the user does not say.
        only_writes: Whether answers are written to be scored elsewhere.
        has_programs: Whether ``program`` says how an answer is scored by running it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ClassVar[str]
    description: ClassVar[str]
    origin: ClassVar[str]
    default_shots: ClassVar[int] = 0
    only_writes: ClassVar[bool] = False
    has_programs: ClassVar[bool] = False

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        """Data files that ``items`` reads under these settings, without few-shot examples."""
        return ()

    @property
    def example_files(self) -> tuple[DataFile[Any], ...]:
        """Data files that few-shot examples are taken from."""
        return ()

    @abstractmethod
    def items(self, setup: Setup) -> Iterable[Item]:
        """Make the items, always in the same order.

        Raises:
            ValueError: If a data file is missing, or there are fewer few-shot examples than asked.
            RecordError: If a data file is not of its schema.
        """

    @abstractmethod
    def score(self, item: Item, response: Any) -> Scores:
        """Judge a response: a ``str`` to ``Generate``, else a tuple of ``Likelihood``."""

    def summary(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Numbers of a whole run beside the means, such as a perplexity."""
        return {}

    def submission(self, item: Item, text: str) -> dict[str, Any] | None:
        """An answer in the form that the benchmark's own scorer reads, if it has one."""
        return None

    def program(self, item: Item, text: str) -> str | None:
        """A Python program that ends with code 0 if the answer is right, if that is how."""
        return None


def first_shots(shots: Sequence[Shot], setup: Setup) -> tuple[Shot, ...]:
    """The first examples, as many as were asked for.

    Raises:
        ValueError: If there are fewer.
    """
    if len(shots) < setup.shots:
        raise ValueError(f"--shots must be at most {len(shots)} here, got {setup.shots}")
    return tuple(shots[: setup.shots])


def most_likely(response: Sequence[Likelihood]) -> int:
    """Number of the answer of greatest likelihood; the first of equals."""
    return max(range(len(response)), key=lambda i: response[i].logprob)


def no_shots(benchmark: Benchmark, setup: Setup) -> None:
    """Raise ``ValueError`` if shots are asked of a benchmark that has none."""
    if setup.shots:
        raise ValueError(f"--shots must be 0 for {benchmark.name}, got {setup.shots}")
