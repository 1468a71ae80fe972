"""Small data files of every benchmark, in its schema, and responses whose scores are known.

All texts are made up here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvbits.evaluation.benchmarks.gaokao import KINDS
from kvbits.evaluation.benchmarks.longbench import datasets
from kvbits.evaluation.likelihood import Likelihood

Rows = Sequence[Mapping[str, Any]]


class Example(NamedTuple):
    """A benchmark's files, and two responses to its first item.

    Attributes:
        files: Rows by file name.
        right: A response of full score.
        wrong: A response of score 0.
        settings: What to make the benchmark with.
        metric: The metric that tells them apart; empty if answers are only written, if scores have
            no full mark, or if items are generated.
    """

    files: Mapping[str, Rows]
    right: Any
    wrong: Any
    settings: Mapping[str, Any] = {}
    metric: str = "acc"


def ranked(*logprobs: float) -> tuple[Likelihood, ...]:
    return tuple(Likelihood(value, 1, value == max(logprobs)) for value in logprobs)


TEXTS = [{"text": f"The {word} lamp stood near the bridge."} for word in ("old", "green", "new")]
WORD_PROBLEMS = [
    {
        "question": f"Ann has {n} pens and buys 3. How many?",
        "answer": f"{n} + 3 = {n + 3}\n#### {n + 3}",
    }
    for n in (4, 5, 6)
]
MATHS = [
    {"problem": "What is $1/2$?", "solution": r"It is $\boxed{\frac12}$.", "answer": r"\frac12"},
    {
        "problem": "What is $2x$ at 3?",
        "solution": r"$\boxed{6}$",
        "answer": "6",
        "subject": "Algebra",
    },
]
CHOICES = [
    {"question": "Two plus two?", "subject": subject, "choices": ["1", "4", "3", "5"], "answer": 1}
    for subject in ("abstract_algebra", "philosophy", "astronomy")
]
LONG = {
    "input": "Who?",
    "context": "Ann lives here.",
    "answers": ["Ann"],
    "length": 4,
    "all_classes": ["Ann", "Bob"],
}
FUNCTIONS = [
    {
        "task_id": "Own/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "test": "def check(f):\n    assert f(2) == 4\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
    }
]
PASS_KEY = "The grass is green. The pass key is 74509. The sky is blue."

EXAMPLES: dict[str, Example] = {
    "gsm8k": Example(
        {"gsm8k_test.jsonl": WORD_PROBLEMS, "gsm8k_train.jsonl": WORD_PROBLEMS * 3},
        " 4 + 3 = 7\n#### 7",
        " 4 + 3 = 8\n#### 8",
    ),
    "math500": Example({"math500.jsonl": MATHS}, r"so $\boxed{0.5}$", r"so $\boxed{2}$"),
    "mmlu": Example(
        {"mmlu_test.jsonl": CHOICES, "mmlu_dev.jsonl": CHOICES * 5},
        ranked(-3, -1, -2, -4),
        ranked(-1, -3, -2, -4),
    ),
    "mmlu_stem": Example(
        {
            # the keys of another copy of the set
            "mmlu_stem.jsonl": [
                {("type" if key == "subject" else key): value for key, value in row.items()}
                for row in CHOICES
            ],
            "mmlu_dev.jsonl": CHOICES * 5,
        },
        ranked(-3, -1, -2, -4),
        ranked(-1, -3, -2, -4),
    ),
    "gaokao": Example(
        {
            f"gaokao/{name}.json": [
                {"question": "哪个对？\nA. 一\nB. 二", "answer": ["B"], "score": 6, "index": 0}
            ]
            for name in KINDS
        },
        "推理。【答案】B",
        "推理。【答案】A",
        metric="score",
    ),
    "longbench": Example(
        {
            f"longbench/{name}.jsonl": [LONG]
            for name in datasets()
            if not name.startswith("passage")
        }
        | {
            "longbench/passage_count.jsonl": [LONG | {"answers": ["3"]}],
            "longbench/passage_retrieval_en.jsonl": [LONG | {"answers": ["Paragraph 3"]}],
            "longbench/passage_retrieval_zh.jsonl": [LONG | {"answers": ["段落3"]}],
        },
        "Ann",
        "Bob",
        metric="score",
    ),
    "longeval_lines": Example(
        {
            "longeval_lines.jsonl": [
                {"num_lines": 1, "key": "a", "prompt": "line a: <42>. What is a?", "target": "42"}
            ]
        },
        "It is <42>.",
        "It is <24>.",
    ),
    "kv_retrieval": Example(
        {
            "kv_retrieval_75.jsonl": [
                {"ordered_kv_records": [["k1", "v1"], ["k2", "v2"]], "key": "k2", "value": "v2"}
            ]
        },
        ' "v2"',
        ' "v1"',
    ),
    "kivi_passkey": Example(
        {"kivi_passkey.jsonl": [{"input": PASS_KEY, "target": "74509", "passkey_position": 1}]},
        " 74509.",
        " 74508.",
    ),
    "babi": Example(
        {
            "babi_test.jsonl": [
                {
                    "task": 1,
                    "name": "where",
                    "story": "Ann is at home.",
                    "question": "Where is Ann?",
                    "answer": "home",
                }
            ]
        },
        " home",
        " school",
    ),
    "lambada": Example(
        {"lambada_test.jsonl": [{"context": "The capital of France is", "target": "Paris"}]},
        (Likelihood(-1.0, 1, True),),
        (Likelihood(-2.0, 1, False),),
    ),
    "blimp": Example(
        {
            "blimp_100.jsonl": [
                {"uid": "agreement", "good": "The cat sleeps.", "bad": "The cat sleep."},
                {"UID": "agreement", "sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks."},
            ]
        },
        ranked(-5, -6),
        ranked(-6, -5),
    ),
    "humaneval": Example({"humaneval.jsonl": FUNCTIONS}, "    return 2 * x", "", metric=""),
    "livecodebench": Example(
        {
            "livecodebench.jsonl": [
                {
                    "question_id": "1",
                    "question_content": "Print 1.",
                    "starter_code": "",
                    "difficulty": "easy",
                    "contest_date": "2024-08-03T00:00:00",
                },
                {
                    "question_id": "2",
                    "question_content": "Return 1.",
                    "starter_code": "class Solution:\n    def one(self):",
                    "difficulty": "hard",
                    "contest_date": "2024-09-03T00:00:00",
                },
            ]
        },
        "```python\nprint(1)\n```",
        "",
        metric="",
    ),
    "wikitext2": Example(
        {"wikitext2_test.raw": TEXTS}, ranked(-5), ranked(-6), {"window": 16}, metric=""
    ),
    "c4": Example(
        {"c4_validation.jsonl": TEXTS},
        ranked(-5),
        ranked(-6),
        {"window": 16, "windows": 2},
        metric="",
    ),
    "passkey": Example({}, "", "", {"lengths": 256, "depths": 2, "n": 1}, metric=""),
    "needle": Example({}, "", "", {"lengths": 512, "depths": 2, "n": 1}, metric=""),
    "ruler": Example({}, "", "", {"lengths": 1024, "tasks": "vt,qa_1", "n": 1}, metric=""),
    "recall": Example({}, "", "", {"length": 256, "n": 1}, metric=""),
    "arithmetic": Example({}, "", "", {"n": 2}, metric=""),
}


def write_files(folder: Path, files: Mapping[str, Rows]) -> Path:
    """Write data files; those of one JSON object hold a list ``example``."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        if path.suffix == ".json":
            text = json.dumps({"keywords": path.stem, "example": list(rows)})
        path.write_text(text, encoding="utf-8")
    return folder
