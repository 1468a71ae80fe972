"""Every generated task: deterministic, answerable, scored as documented."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvbits.evaluation.tasks import (
    TASKS,
    ArithmeticChain,
    FactRecall,
    KeyValueRecall,
    Passkey,
    Task,
    VariableTracking,
)
from kvbits.evaluation.tasks.base import estimate_tokens


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def test_tasks_satisfy_the_protocol(task: Task) -> None:
    assert isinstance(task, Task)
    assert TASKS[task.name] is type(task)
    assert task.stop
    assert task.max_new_tokens > 0


def test_same_seed_gives_same_examples_whatever_their_number(task: Task) -> None:
    few, many = task.generate(3, seed=7, split="valid"), task.generate(6, seed=7, split="valid")
    assert few == many[:3]
    assert few != task.generate(3, seed=8, split="valid")
    assert few != task.generate(3, seed=7, split="test")


def test_the_expected_completion_is_correct_and_another_is_not(task: Task) -> None:
    first, *others = task.generate(6, seed=1, split="test")
    assert task.is_correct(first.completion, first)
    assert task.is_correct(first.completion + "<|endoftext|> more text", first)
    assert not task.is_correct("", first)
    wrong = [other for other in others if other.answer != first.answer]
    assert wrong
    assert not any(task.is_correct(other.completion, first) for other in wrong)


def test_the_answer_can_be_read_out_of_the_prompt(task: Task) -> None:
    """All but arithmetic are look-ups, so the answer must stand in the prompt."""
    if task.name == "arithmetic":
        pytest.skip("arithmetic answers are computed")
    for example in task.generate(10, seed=2, split="test"):
        assert example.answer in example.prompt


def test_every_written_equation_holds() -> None:
    for example in ArithmeticChain().generate(300, seed=4, split="test"):
        *lines, last = example.completion.split("\n")
        assert len(lines) == example.facts["num_steps"]
        assert 3 <= len(lines) <= 8
        for line in lines:
            left, sign, right, result = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)$", line).groups()
            a, b = int(left), int(right)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert value == int(result)
            assert 0 < value <= 400
        assert last == f"The answer is {example.answer}."
        assert lines[-1].endswith(f"= {example.answer}")


@pytest.mark.parametrize("steps", [3, 8])
def test_the_number_of_steps_can_be_fixed(steps: int) -> None:
    task = ArithmeticChain(min_steps=steps, max_steps=steps)
    for example in task.generate(20, seed=0, split="valid"):
        assert example.completion.count("=") == steps


@pytest.mark.parametrize(("low", "high"), [(0, 3), (5, 4), (3, 9)])
def test_impossible_step_counts_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="1 <= min_steps <= max_steps <= 8, got"):
        ArithmeticChain(min_steps=low, max_steps=high)


@pytest.mark.parametrize("length", [512, 2048, 3500])
def test_passkey_prompts_have_the_length_asked_for(length: int) -> None:
    """Within 3 %: prose comes in whole sentences of about 15 tokens."""
    for depth in (0.0, 0.5, 1.0):
        example = Passkey(length=length, depth=depth).generate(1, seed=0, split="test")[0]
        assert abs(estimate_tokens(example.prompt) - length) < max(20, 0.03 * length)


def test_passkey_length_follows_the_callers_tokenizer() -> None:
    """Counted in words, 300 tokens are 300 words."""
    task = Passkey(length=300, count_tokens=lambda text: len(text.split()))
    example = task.generate(1, seed=0, split="test")[0]
    assert 270 <= len(example.prompt.split()) <= 320


def test_passkey_stands_at_the_depth_asked_for() -> None:
    for depth in (0.0, 0.3, 1.0):
        example = Passkey(length=2000, depth=depth).generate(1, seed=3, split="test")[0]
        found = example.prompt.index(example.answer) / len(example.prompt)
        assert abs(found - depth) < 0.08


def test_key_value_has_the_pairs_and_the_depth_asked_for() -> None:
    example = KeyValueRecall(num_pairs=25, depth=1.0).generate(1, seed=0, split="test")[0]
    assert example.prompt.count('": "') == 25
    assert example.facts["asked"] == list(example.facts["pairs"])[-1]


def test_a_callers_text_is_used_as_filler() -> None:
    text = "The owl of Minerva flies at dusk. " * 500
    for task in (Passkey(filler=text), FactRecall(filler=text), VariableTracking(filler=text)):
        assert "owl of Minerva" in task.generate(1, seed=0, split="test")[0].prompt


def test_an_unknown_split_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        task.generate(1, seed=0, split="dev")  # type: ignore[arg-type]


def test_tasks_import_without_torch_or_pydantic() -> None:
    """The recipe runs where only the training stack is installed."""
    code = (
        "import sys, kvbits.evaluation.tasks\n"
        "print(sorted({'torch', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
