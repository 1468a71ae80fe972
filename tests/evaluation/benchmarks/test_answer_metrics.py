"""Metrics against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from kvbits.errors import MissingLibraryError
from kvbits.evaluation.benchmarks.answers import after_last, code_blocks, last_boxed, numbers
from kvbits.evaluation.benchmarks.formulas import is_same, normalized
from kvbits.evaluation.benchmarks.labels import (
    class_score,
    code_line_score,
    count_score,
    paragraph_score,
)
from kvbits.evaluation.benchmarks.math500 import final_formula
from kvbits.evaluation.benchmarks.overlap import (
    chinese_f1,
    chinese_rouge_l,
    edit_similarity,
    english_f1,
    rouge_l,
)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("Paris", "Paris, the", 1.0),  # punctuation and articles do not count
        # 1 of 5 words is right, the only one wanted: 2 * 0.2 / 1.2
        ("Paris is capital of France", "Paris", 1 / 3),
        # the trap: comparing letters of first words made these two 1.0
        ("stone", "notes", 0.0),
        (
            "Paris is the capital of France",
            "Paris, Texas",
            2 * (1 / 5) * (1 / 2) / (1 / 5 + 1 / 2),
        ),
        ("b b a", "b", 2 * (1 / 2) / (1 / 2 + 1)),  # a is an article; one b counts
        ("", "x", 0.0),
    ],
)
def test_english_f1_counts_words(answer, reference, value):
    assert english_f1(answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # common subsequence "the cat": 2 of 3 words each
        ("the cat ran", "the cat sat", 2 / 3),
        # order counts: "cat the" has one word in common, in order
        ("cat the", "the cat", 1 / 2),
        # two sentences: {a b} from the first, {c} from the second: 3 of 4 and 3 of 3
        ("a b x. c", "a b. c", 2 * (3 / 4) / (3 / 4 + 1)),
        # words count once each: {a} of {a} and {a} of {a, b}
        ("a a a", "a b", 2 * (1 / 2) / (1 / 2 + 1)),
        ("", "a", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l_unites_common_subsequences_of_sentences(answer, reference, value):
    assert rouge_l(answer, reference) == pytest.approx(value, abs=1e-7)  # its own epsilon


def test_rouge_l_reads_sentences_of_any_length():
    """The package that LongBench uses runs out of recursion here and is counted as 0."""
    words = " ".join(f"w{i}" for i in range(1500))
    assert rouge_l(words, words) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("abcd", "abcd", 1.0),
        # matching blocks "b", "d" hold 2 of 4 + 4 characters twice
        ("abcd", "xbyd", 0.5),
        ("ab", "abc", 0.8),
        ("abc", "xyz", 0.0),
        ("a", "abc", 0.5),
    ],
)
def test_edit_similarity_is_twice_the_matches_over_all_characters(answer, reference, value):
    assert edit_similarity(answer, reference) == value


def test_code_is_the_first_line_that_is_code():
    assert code_line_score("\n```python\n# next\nreturn x\nreturn y", "return x") == 1.0
    assert code_line_score("# only a comment", "return x") == 0.0
    # a block of "return " and nothing else: 2 * 7 / (8 + 8) = 0.875, in hundredths
    assert code_line_score("return y", "return x") == 0.88


def test_a_class_is_shared_among_those_that_are_named():
    """The trap: taking the right class for the only one would give each of these 1."""
    classes = ["Country", "State", "Other location", "location"]
    assert class_score("It is State", "State", classes) == 1.0
    assert class_score("State or Country", "State", classes) == 0.5
    assert class_score("Country", "State", classes) == 0.0
    assert class_score("nothing of these", "State", classes) == 0.0
    # "location" is part of the right name, so naming it is no second guess
    assert class_score("Other location", "Other location", classes) == 1.0


def test_counts_and_paragraphs_are_shares_of_the_numbers():
    assert count_score("There are 12 of 30", "12") == 0.5
    assert count_score("none", "12") == 0.0
    assert paragraph_score("Paragraph 7", "Paragraph 7") == 1.0
    assert paragraph_score("Paragraph 17", "Paragraph 7") == 0.0
    assert paragraph_score("段落7，不是3", "段落7") == 0.5


def test_chinese_is_cut_into_words():
    pytest.importorskip("jieba")
    # 我 爱 北京 天安门 and 我 爱 北京: 3 of 4 and 3 of 3; the comma does not count
    assert chinese_f1("我爱，北京天安门", "我爱北京") == pytest.approx(2 * 0.75 / 1.75)
    assert chinese_rouge_l("我爱北京天安门", "我爱北京") == pytest.approx(2 * 0.75 / 1.75)


def test_chinese_without_jieba_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingLibraryError, match=r"jieba must be installed .*kvbits\[zh\]"):
        chinese_f1("我", "我")


def test_numbers_keep_sign_decimals_and_thousands():
    assert [str(n) for n in numbers("-3, $1,234.5 and .5; 2.")] == ["-3", "1234.5", "0.5", "2"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"$\boxed{5}$", "5"),
        (r"\boxed{\frac{a}{b}} then \boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"\fbox{x}", "x"),
        (r"\boxed{1} and \boxed{2", "1"),  # the second was cut off
        (r"\boxed", None),
        ("no box", None),
    ],
)
def test_the_last_closed_box_counts(text, wanted):
    assert last_boxed(text) == wanted


def test_a_formula_may_stand_outside_a_box():
    assert final_formula("The answer is $x+1$.\nDone") == "$x+1$"
    assert final_formula(r"The answer is 3, I mean \boxed{4}") == "4"
    assert final_formula("I do not know") is None


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}2)"),
        ("x = 5", "5"),
        ("1,000", "1000"),
        (r"10\%", "10"),
        (r"\$32.50", "32.5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"5\text{ inches}", "5"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"2\frac{1}{2}", "2.5"),
        (r"\{1, 2\}", r"\left\{1,2\right\}"),
        ("(-\\infty, 2]", r"(-\infty,2]"),
        ("1, 2", "1,2"),
        ("6.0", "6"),
    ],
)
def test_spellings_of_one_formula_are_the_same(answer, reference):
    assert is_same(answer, reference)
    assert is_same(reference, answer)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("12", "1,2"),
        ("5", "-5"),
        ("", "5"),
        (r"\frac{1}{0}", "1"),
        ("x^2", "x^3"),
        ("0.33", r"\frac{1}{3}"),
    ],
)
def test_other_formulas_are_not(answer, reference):
    assert not is_same(answer, reference)


def test_every_formula_is_the_same_as_itself_normalized():
    for text in (r"\frac{\sqrt3}{2}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "3 - 2i"):
        assert is_same(normalized(text), text)


def test_code_and_marks():
    assert code_blocks("no code") == []
    assert code_blocks("```\nx\n```\nor\n```py\ny\n") == ["x\n", "y\n"]
    assert after_last("a: 1 a: 2", "a:") == " 2"
    assert after_last("a", "b") is None
