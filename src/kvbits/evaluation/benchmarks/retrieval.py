"""Recall from long contexts, read from files: lines, pass keys, key-value pairs, short stories."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from kvbits.evaluation.benchmarks.base import (
    Benchmark,
    Generate,
    Item,
    Prompt,
    Scores,
    Setup,
    no_shots,
)
from kvbits.evaluation.benchmarks.source import DataFile, Row


class Retrieval(Benchmark):
    """Whether the answer contains what was to be found; what the subclasses share."""

    file: ClassVar[DataFile[Any]]
    new_tokens: ClassVar[int] = 32
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def files(self) -> tuple[DataFile[Any], ...]:
        return (self.file,)

    def items(self, setup: Setup) -> Iterable[Item]:
        no_shots(self, setup)
        for number, row in enumerate(setup.source.read(self.file)):
            text, wanted, group = self.ask(row)
            yield Item(
                doc_id=number,
                request=Generate(Prompt(text), self.new_tokens, self.stop),
                doc=row.model_dump(),
                references=(wanted,),
                group=group,
            )

    @abstractmethod
    def ask(self, row: Any) -> tuple[str, str, str]:
        """The prompt of a row, what the answer has to contain, and the row's group."""

    def score(self, item: Item, response: str) -> Scores:
        return Scores({"acc": float(item.references[0].lower() in response.lower())})


class LineRow(Row):
    """A record of lines, and the register of one of them."""

    num_lines: int
    prompt: str
    target: str


class LongEvalLines(Retrieval):
    """The register of one line among hundreds."""

    name: ClassVar = "longeval_lines"
    description: ClassVar = "the number of one line among hundreds"
    origin: ClassVar = "LongEval, github.com/DachengLi1/LongChat"
    file: ClassVar = DataFile("longeval_lines.jsonl", LineRow, origin="LongEval's lines task")

    def ask(self, row: LineRow) -> tuple[str, str, str]:
        return row.prompt, row.target, f"{row.num_lines} lines"


class StoreRow(Row):
    """Key-value pairs, and one of them."""

    ordered_kv_records: tuple[tuple[str, str], ...]
    key: str
    value: str


class KeyValueStore(Retrieval):
    """The value of one key among random ones."""

    name: ClassVar = "kv_retrieval"
    description: ClassVar = "the value of one of 75 random keys"
    origin: ClassVar = "Lost in the Middle, arXiv 2307.03172"
    new_tokens: ClassVar = 64
    file: ClassVar = DataFile(
        "kv_retrieval_75.jsonl",
        StoreRow,
        origin="kv_retrieval_data of github.com/nelson-liu/lost-in-the-middle",
    )

    def ask(self, row: StoreRow) -> tuple[str, str, str]:
        store = json.dumps(dict(row.ordered_kv_records), indent=1)
        text = (
            f"This JSON object maps keys to values.\n\n{store}\n\nWhat is the value of the key "
            f'below?\n\nKey: "{row.key}"\nValue:'
        )
        return text, row.value, ""


class PassKeyRow(Row):
    """Filler with a pass key inside."""

    input: str
    target: str
    passkey_position: int


class KiviPassKey(Retrieval):
    """The pass key of KIVI's example, hidden in repeated sentences."""

    name: ClassVar = "kivi_passkey"
    description: ClassVar = "KIVI's pass key in repeated sentences"
    origin: ClassVar = "arXiv 2402.02750"
    file: ClassVar = DataFile(
        "kivi_passkey.jsonl",
        PassKeyRow,
        origin="passkey_examples.jsonl of github.com/jy-yuan/KIVI",
    )

    def ask(self, row: PassKeyRow) -> tuple[str, str, str]:
        return f"{row.input}\nWhat is the pass key? The pass key is", row.target, ""


class StoryRow(Row):
    """A story, a question on it and the answer."""

    name: str
    story: str
    question: str
    answer: str


class Babi(Retrieval):
    """Questions on short stories, in twenty kinds."""

    name: ClassVar = "babi"
    description: ClassVar = "questions on short stories, of twenty kinds"
    origin: ClassVar = "arXiv 1502.05698"
    stop: ClassVar = ("\n",)
    file: ClassVar = DataFile("babi_test.jsonl", StoryRow, origin="the test split of bAbI, 1k")

    def ask(self, row: StoryRow) -> tuple[str, str, str]:
        return f"{row.story}\nQuestion: {row.question}\nAnswer:", row.answer, row.name
