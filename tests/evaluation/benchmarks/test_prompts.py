"""Prompts as tokens: text or turns, cut in the middle or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kvbits.evaluation.benchmarks.base import Generate, Prompt, Rank, Read
from kvbits.evaluation.benchmarks.prompts import Prompter
from kvbits.evaluation.token_set import Segment

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPT = Prompt("Q: two?\nA:", shots=(("Q: one?\nA:", " 1"),), system="Count.")


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def test_examples_are_text_without_a_template(tokenizer):
    text = "Count.\n\nQ: one?\nA: 1\n\nQ: two?\nA:"
    prompter = Prompter(tokenizer=tokenizer)
    assert prompter.text(PROMPT) == text
    ids = prompter.ids(PROMPT, 1)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_examples_are_one_turn_with_a_template(chat):
    prompter = Prompter(tokenizer=chat, chat_template=True)
    wanted = "[system]Count.[/][user]Q: one?\nA: 1\n\nQ: two?\nA:[/][assistant]"
    assert prompter.text(PROMPT) == wanted
    ids = prompter.ids(PROMPT, 1)
    assert chat.decode(ids) == wanted  # special tokens are the template's own affair


def test_examples_are_turns_where_that_is_asked_for(chat):
    prompter = Prompter(tokenizer=chat, chat_template=True, multi_turn=True)
    assert prompter.text(PROMPT) == (
        "[system]Count.[/][user]Q: one?\nA:[/][assistant]1[/][user]Q: two?\nA:[/][assistant]"
    )


def test_plain_prompts_are_never_wrapped_and_answers_can_be_led(chat):
    prompter = Prompter(tokenizer=chat, chat_template=True)
    assert prompter.text(Prompt("x", is_plain=True)) == "x"
    assert prompter.text(Prompt("x", lead=" Sure:")) == "[user]x[/][assistant]Sure:"
    assert Prompter(tokenizer=chat).text(Prompt("x", lead=" Sure:")) == "x Sure:"


def test_the_template_is_told_what_the_user_says(chat):
    chat.chat_template += "{% if not enable_thinking %}[quiet]{% endif %}"
    for value, end in ((True, "[assistant]"), (False, "[assistant][quiet]")):
        prompter = Prompter(
            tokenizer=chat, chat_template=True, chat_settings={"enable_thinking": value}
        )
        assert prompter.text(Prompt("x")).endswith(end)


def test_templates_are_refused_where_they_cannot_be(tokenizer, chat):
    with pytest.raises(ValueError, match="--chat-template must be given for a tokenizer that has"):
        Prompter(tokenizer=tokenizer, chat_template=True)
    with pytest.raises(ValueError, match="--multi-turn must be given with --chat-template"):
        Prompter(tokenizer=chat, multi_turn=True)
    with pytest.raises(ValueError, match="--chat-set must be given with --chat-template"):
        Prompter(tokenizer=chat, chat_settings={"enable_thinking": False})


@pytest.mark.parametrize("is_chat", [False, True])
def test_long_prompts_lose_their_middle_alone(chat, is_chat):
    """Both ends hold instructions; the template has to stay whole."""
    text = "begin " + "x" * 300 + " end?"
    prompter = Prompter(tokenizer=chat, chat_template=is_chat, context_length=120)
    ids = prompter.ids(Prompt(text, may_cut=True), 20)
    assert 98 <= len(ids) <= 100  # halves may lose a token each
    found = chat.decode(ids).removeprefix("<|endoftext|>")
    if is_chat:
        assert found.startswith("[user]")
        assert found.endswith("[/][assistant]")
        found = found.removeprefix("[user]").removesuffix("[/][assistant]")
    assert found.startswith("begin x")
    assert found.endswith("x end?")


def test_the_limit_of_the_user_counts_if_it_is_lower(tokenizer):
    prompt = Prompt("x" * 300, may_cut=True)
    assert len(Prompter(tokenizer=tokenizer, max_length=50).ids(prompt, 20)) in (49, 50)
    both = Prompter(tokenizer=tokenizer, max_length=150, context_length=120)
    assert len(both.ids(prompt, 20)) in (99, 100)
    assert len(Prompter(tokenizer=tokenizer).ids(prompt, 20)) == 301


def test_other_long_prompts_are_refused(tokenizer):
    prompter = Prompter(tokenizer=tokenizer, context_length=120)
    with pytest.raises(ValueError, match=r"at most 100 tokens to leave 20 .* got 301; use fewer"):
        prompter.ids(Prompt("x" * 300), 20)


def test_answers_are_the_tokens_that_follow_the_prompt(tokenizer):
    """Byte pairs across the seam would be other tokens; here the joined text has to come back."""
    request = Rank(Prompt("two plus two is"), (" four", " five"))
    first, second = Prompter(tokenizer=tokenizer).documents(request)
    assert [segment.is_counted for segment in first] == [False, True]
    assert first[0] == second[0]
    assert tokenizer.decode(first[0].ids[1:] + first[1].ids) == "two plus two is four"
    assert tokenizer.decode(second[1].ids) == " five"


def test_answers_of_an_empty_prompt_count_from_their_first_token(tokenizer):
    (document,) = Prompter(tokenizer=tokenizer).documents(Rank(Prompt(""), ("Dogs bark.",)))
    assert document[0].ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(document[1].ids) == "Dogs bark."


def test_answers_in_a_chat_begin_without_the_space(chat):
    prompter = Prompter(tokenizer=chat, chat_template=True)
    (document,) = prompter.documents(Rank(Prompt("Q"), (" A",)))
    assert chat.decode(document[1].ids) == "A"


def test_hashes_tell_prompts_apart(tokenizer, chat):
    plain, wrapped = Prompter(tokenizer=chat), Prompter(tokenizer=chat, chat_template=True)
    requests = [
        Generate(PROMPT, 5),
        Generate(PROMPT._replace(question="other"), 5),
        Rank(PROMPT, (" a", " b")),
        Rank(PROMPT, (" a", " c")),
        Read((Segment([1, 2], True),)),
        Read((Segment([1, 2], False),)),
    ]
    hashes = [each.prompt_hash(request) for each in (plain, wrapped) for request in requests]
    assert len(set(hashes)) == 10  # of token ids, a template changes nothing
    assert plain.prompt_hash(requests[0]) == Prompter(tokenizer=chat).prompt_hash(requests[0])
