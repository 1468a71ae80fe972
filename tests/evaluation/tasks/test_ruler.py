"""RULER-style tasks: as long as asked, answerable from the prompt alone, scored as RULER does."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kvbits.evaluation.tasks import Task, split_of
from kvbits.evaluation.tasks.base import estimate_tokens
from kvbits.evaluation.tasks.ruler import RULER, ruler_task, share_found
from kvbits.evaluation.tasks.ruler.base import largest_size

LENGTH = 4096


def examples(name, n=3, *, seed=0, split="test", **settings):
    task = ruler_task(name, length=settings.pop("length", LENGTH), **settings)
    return task, task.generate(n, seed=seed, split=split)


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [3500, 9000])
def test_prompt_and_answer_fill_the_length_and_never_pass_it(name, length):
    task, made = examples(name, length=length)
    for example in made:
        total = estimate_tokens(example.prompt) + task.max_new_tokens
        # a unit of filler is at most two documents or a needle of UUIDs, below 100 tokens
        assert length - 100 <= total <= length


@pytest.mark.parametrize("name", RULER)
def test_a_complete_answer_scores_one_and_an_unrelated_one_zero(name):
    task, made = examples(name)
    assert isinstance(task, Task)
    for example in made:
        assert task.score(example.completion, example) == 1.0
        assert task.is_correct(example.completion.upper(), example)
        assert task.score("I could not find it", example) == 0.0


@pytest.mark.parametrize("name", RULER)
def test_an_example_depends_on_its_settings_seed_and_number_only(name):
    _, three = examples(name)
    _, two = examples(name, 2)
    assert three[:2] == two
    assert examples(name, 1, seed=1)[1] != two[:1]
    assert three[0].prompt != three[1].prompt


def test_the_score_is_the_share_of_references_found_whatever_the_case():
    assert share_found("They are Alpha,\nBETA and gamma.", ["alpha", "beta", "delta", "x7"]) == 0.5
    task, (example,) = examples("niah_multiquery", 1)
    first, *_ = example.facts["references"]
    assert task.score(f" {first}", example) == 0.25
    assert not task.is_correct(f" {first}", example)


def needles_of(prompt):
    pattern = r"The magic (?:number|identifier) of (\S+) is (\S+)\."
    return re.findall(pattern, prompt.rsplit("\n\n", 1)[0])


@pytest.mark.parametrize("name", [name for name in RULER if name.startswith("niah")])
def test_needles_of_the_keys_asked_for_hold_the_references_and_no_others(name):
    for example in examples(name)[1]:
        question = example.prompt.rsplit("\n\n", 1)[1].split("?")[0]
        needles = needles_of(example.prompt)
        held = [value for key, value in needles if key in question]
        assert sorted(held) == sorted(example.facts["references"])
        assert all(split_of(value) == "test" for value in held)
        assert len(needles) > len(held) or name.startswith(
            ("niah_single", "niah_multiv", "niah_multiq")
        )


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_its_depth_says(depth):
    _, (example,) = examples("niah_single_1", 1, depth=depth)
    intro, text, _ = example.prompt.split("\n\n")
    place = text.index("The magic") / (len(text) - len("The magic number of a-b is 1234567."))
    # one line of noise of this length, and the needle's own
    assert place == pytest.approx(depth, abs=0.02)
    assert example.facts["depth"] == depth
    assert "hidden in the text below" in intro


def test_a_callers_text_is_the_haystack():
    filler = "A first sentence. And a second one! Is there a third?"
    _, (example,) = examples("niah_single_2", 1, filler=filler, length=400)
    assert example.prompt.count("And a second one!") > 10
    with pytest.raises(ValueError, match="filler must hold at least one sentence"):
        examples("niah_single_2", 1, filler="  ")


def test_following_assignments_gives_the_variables():
    for example in examples("vt", num_chains=2)[1]:
        text, question = example.prompt.split("\n\n")[-1].split("Question:")
        value = re.search(r"value (\d+)\?", question)[1]
        held: list[str] = []
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            if given == value or given in held:
                held.append(name)
        assert sorted(held) == sorted(example.facts["references"])
        assert len(held) == 5


def test_common_words_are_thirty_times_in_the_list_and_others_three_times():
    for example in examples("cwe")[1]:
        listed = example.prompt.split("\n\n")[-1].split("Question:")[0]
        counts = Counter(re.findall(r"\d+\. (\w+)", listed))
        common = counts.most_common(10)
        assert sorted(word for word, _ in common) == sorted(example.facts["references"])
        assert {count for _, count in common} == {30}
        assert set(counts.values()) == {30, 3}


def test_frequent_words_are_the_first_three_after_the_dots():
    for example in examples("fwe")[1]:
        words = example.prompt.split("\n")[1].split()
        (dots, _), *ranked = Counter(words).most_common(5)
        assert dots == "...."
        assert [word for word, _ in ranked[:3]] == example.facts["references"]
        assert ranked[2][1] > ranked[3][1]


def documents_of(prompt):
    return re.findall(r"Document \d+:\n(.+)", prompt)


def test_questions_are_answered_by_one_document():
    phrases = {
        "born": r"was born in (\w+)",
        "work": r"worked as a (\w+)",
        "fond": r"fond of (\w+)",
    }
    for example in examples("qa_1", 6)[1]:
        question = example.prompt.rsplit("Question:", 1)[1]
        person = re.search(r"(?:was|did) (\w+ \w+)", question)[1]
        pattern = next(found for word, found in phrases.items() if word in question)
        about = [text for text in documents_of(example.prompt) if person in text]
        assert len(about) == 1
        assert [re.search(pattern, about[0])[1]] == example.facts["references"]


def test_two_hops_lead_from_the_company_to_the_founders_birthplace():
    for example in examples("qa_2")[1]:
        company = re.search(r"company (\w+ \w+) born", example.prompt.rsplit("Question:", 1)[1])[1]
        found = documents_of(example.prompt)
        founded = [text for text in found if f"company {company} was founded" in text]
        person = re.search(r"founded by (\w+ \w+)", founded[0])[1]
        born = [text for text in found if f"{person} was born in" in text]
        assert (len(founded), len(born)) == (1, 1)
        answer = re.search(rf"{person} was born in (\w+)", born[0])[1]
        assert [answer] == example.facts["references"]
        assert answer not in founded[0]


def test_one_of_several_answers_is_enough_for_a_question():
    task, (example,) = examples("qa_1", 1)
    example.facts["references"].append("another name of it")
    assert task.score(f"It is {example.answer}.", example) == 1.0


@pytest.mark.parametrize("tokens_of", [lambda n: 50 + 7 * n, lambda n: 50 + n * n // 3])
def test_the_largest_size_leaves_no_room_for_one_unit_more(tokens_of):
    for budget in (50, 57, 1000, 5000):
        found = largest_size(tokens_of, budget, budget)
        assert tokens_of(found) <= budget < tokens_of(found + 1)


def test_a_length_without_room_for_the_question_is_refused():
    with pytest.raises(ValueError, match=r"length must leave room .* at least \d+ tokens here"):
        examples("cwe", 1, length=500)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("niah_single_2", {"depth": 1.5}, "depth must be between 0 and 1"),
        ("niah_multikey_1", {"num_queries": 9}, "num_queries must be between 1 and num_keys"),
        ("vt", {"hops": 0}, "hops and num_chains must be at least 1"),
        ("niah", {}, "ruler task must be one of niah_single_1"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        ruler_task(name, **settings)
