"""Training and evaluation cannot overlap: facet by facet, by construction and in large samples."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from kvbits.evaluation.tasks import TASKS, ArithmeticChain, Example, Passkey, split_of
from kvbits.evaluation.tasks.base import draw


def facets(example: Example) -> Iterable[str]:
    """Every facet of an example, exactly as the generators hash it."""
    facts = example.facts
    match example.task:
        case "arithmetic":
            yield " ".join(facts["steps"])
            yield str(facts["numbers"])
            yield "|".join(facts["names"])
        case "key_value" | "lines":
            yield from facts["pairs"]
            yield from facts["pairs"].values()
        case "facts":
            yield from (f"{person}|{value}" for person, value in facts["facts"])
        case "passkey":
            yield facts["key"]
        case "copy":
            yield facts["list"]
        case "variables":
            yield facts["value"]


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_facet_belongs_to_the_split_asked_for(name: str, split: str) -> None:
    """With the hash as the judge, this proves disjointness for any seed and any number."""
    for seed in (0, 1):
        for example in TASKS[name]().generate(15, seed=seed, split=split):
            found = list(facets(example))
            assert found
            assert {split_of(facet) for facet in found} == {split}


def test_facts_of_arithmetic_are_what_the_problem_says() -> None:
    """The proof above is only as good as the facts: what they list must be what is said."""
    for family in ("ledger", "relations"):
        for example in ArithmeticChain(family=family).generate(50, seed=3, split="test"):
            told = {n for operand in example.facts["numbers"] for n in operand}
            said = {
                int(word) for word in example.prompt.replace(".", " ").split() if word.isdigit()
            }
            assert said == told
            assert example.facts["names"][0] in example.prompt


def test_no_evaluation_problem_occurs_in_a_large_training_sample() -> None:
    """20 000 training problems share no numbers, names, steps or wording with the others."""
    task = ArithmeticChain()
    train = task.generate(20_000, seed=11, split="train")
    for split in ("valid", "test"):
        others = task.generate(300, seed=11, split=split)
        for key in (
            lambda example: example.prompt,
            lambda example: str(example.facts["numbers"]),
            lambda example: str(example.facts["names"]),
            lambda example: str(example.facts["steps"]),
        ):
            assert not {key(e) for e in train} & {key(e) for e in others}


def test_heldout_sentences_never_occur_in_training() -> None:
    """Held-out wordings are separate templates: no fixed part of them appears in training."""
    train = " ".join(e.prompt for e in ArithmeticChain().generate(3000, seed=5, split="train"))
    for phrase in ("as a present", "in a drawer", "Compared with", "Tell me", "extra", "stolen"):
        assert phrase not in train
    heldout = ArithmeticChain(templates="heldout").generate(300, seed=5, split="test")
    assert any("Compared with" in example.prompt for example in heldout)


@pytest.mark.parametrize(
    "task", [ArithmeticChain(templates="heldout"), Passkey(templates="heldout")]
)
def test_heldout_templates_cannot_be_trained_on(task: ArithmeticChain | Passkey) -> None:
    with pytest.raises(ValueError, match="split must not be 'train' with templates='heldout'"):
        task.generate(1, seed=0, split="train")


def test_splits_have_the_announced_sizes() -> None:
    """5 % test, 5 % valid; the bounds are more than five standard errors (0.15 points) wide."""
    found = [split_of(str(i)) for i in range(20_000)]
    assert 0.04 < found.count("test") / len(found) < 0.06
    assert 0.04 < found.count("valid") / len(found) < 0.06


def test_drawing_from_too_few_values_fails_loudly() -> None:
    value = next(str(i) for i in range(100) if split_of(str(i)) == "train")
    with pytest.raises(RuntimeError, match="no value of split 'test' in 10000 draws"):
        draw(lambda: value, "test")
    assert draw(lambda: random.choice([value]), "train") == value
