"""Records of examples, and two runs compared; no harness is needed."""

from __future__ import annotations

import sys

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from kvbits.cli import app
from kvbits.errors import RecordError
from kvbits.evaluation.comparison import compare
from kvbits.evaluation.harness_run import check_names, identity, open_run, run_samples, run_task
from kvbits.evaluation.samples import Sample, from_harness, read_samples, write_samples
from kvbits.evaluation.statistics import mcnemar


def sample(doc_id, score, **changes):
    fields = {
        "task": "gsm8k",
        "filter": "strict-match",
        "doc_id": doc_id,
        "doc_hash": f"doc {doc_id}",
        "prompt_hash": "p",
        "metrics": {"exact_match": float(score)},
    }
    return Sample(**(fields | changes))


def run_of(*scores):
    return [sample(i, score) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (2, 9), (12, 3), (40, 61), (300, 360)]
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(only_a, only_b):
    n = only_a + only_b
    expected = binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_flips_are_named_in_both_directions():
    first, second = run_of(1, 1, 0, 0, 1, 1), run_of(1, 0, 1, 0, 0, 0)
    (row,) = compare(first, second)
    assert (row.first, row.second, row.n) == (4 / 6, 2 / 6, 6)
    assert (row.gained, row.lost) == ((2,), (1, 4, 5))
    assert row.difference.difference == pytest.approx(-2 / 6)
    assert row.p_value == pytest.approx(binomtest(1, 4).pvalue)


def test_a_run_against_itself_differs_in_nothing():
    (row,) = compare(run_of(1, 0, 1), run_of(1, 0, 1))
    assert row.difference.difference == 0
    assert row.difference.low < 0 < row.difference.high
    assert (row.gained, row.lost, row.p_value) == ((), (), 1.0)


def test_longer_answers_show_beside_equal_accuracy():
    first = [sample(i, 1, response_tokens=n) for i, n in enumerate((10, 20, 0))]
    second = [sample(i, 1, response_tokens=n) for i, n in enumerate((20, 40, 2))]
    (row,) = compare(first, second)
    assert row.difference.difference == 0
    assert row.length_ratio == pytest.approx(
        (2.0, 2.0, 2.0)
    )  # an empty answer counts as one token
    assert compare(first, first)[0].length_ratio == pytest.approx((1.0, 1.0, 1.0))


def test_answers_that_were_not_generated_have_no_length():
    (row,) = compare(run_of(1, 0), run_of(1, 1))
    assert row.length_ratio is None
    one = [sample(0, 1, response_tokens=5)]
    assert compare(one, one)[0].length_ratio is None


def test_means_are_weighted_by_words():
    def run(*values):
        metrics = [{"metrics": {"word_perplexity": v}} for v in values]
        weights = [{"weights": {"word_perplexity": w}} for w in (1.0, 3.0)]
        return [
            sample(i, 0, **m, **w) for i, (m, w) in enumerate(zip(metrics, weights, strict=True))
        ]

    (row,) = compare(run(-1.0, -2.0), run(-2.0, -2.5))
    assert row.first == pytest.approx((-1 - 6) / 4)
    assert row.second == pytest.approx((-2 - 7.5) / 4)
    assert row.difference.difference == pytest.approx(-2.5 / 4)
    assert row.gained is row.lost is row.p_value is None


def test_only_shared_examples_count():
    (row,) = compare(run_of(1, 0, 1), run_of(1, 1))
    assert row.n == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([sample(0, 1, doc_hash="another")], "the same doc_hash in both runs"),
        ([sample(0, 1, prompt_hash="other shots")], "same few-shot examples and chat template"),
        ([sample(0, 1, task="mmlu")], "none shared"),
        ([sample(0, 1), sample(0, 1)], "occur once in a run"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(second, message):
    with pytest.raises(RecordError, match=message):
        compare(run_of(1), second)


def test_samples_of_the_harness_are_read():
    logged = {
        "doc_id": 7,
        "filter": "none",
        "doc_hash": "d",
        "prompt_hash": "p",
        "metrics": ["exact_match", "word_perplexity", "f1_parts", "nothing"],
        "exact_match": True,
        "word_perplexity": (-30.0, 10),
        "f1_parts": ("a", "b"),
        "nothing": float("nan"),
        "filtered_resps": ["42"],
    }
    (read,) = from_harness({"task": [logged]})
    assert read.metrics == {"exact_match": 1.0, "log-likelihood (word_perplexity)": -3.0}
    assert read.weights == {"log-likelihood (word_perplexity)": 10.0}
    assert read.response == "42"
    assert read.response_tokens is None


@pytest.mark.parametrize(
    ("responses", "expected"),
    [([["so it is 42"]], 4), ([[(-1.0, False)], [(-2.0, True)]], None), ([["a", "b"]], None)],
)
def test_a_whole_answer_of_the_harness_is_counted_before_filters(responses, expected):
    logged = {"doc_id": 0, "filter": "none", "doc_hash": "d", "prompt_hash": "p", "metrics": []}
    logged |= {"filtered_resps": ["42"], "resps": responses}
    (read,) = from_harness({"task": [logged]}, lambda text: len(text.split()))
    assert read.response_tokens == expected


def test_samples_survive_their_file(tmp_path):
    samples = [*run_of(1, 0), sample(2, 1, response="line\nbreak \u2028 and é")]
    write_samples(tmp_path / "x.samples.jsonl", samples)
    assert read_samples(tmp_path / "x.samples.jsonl") == samples


def test_a_damaged_sample_is_refused(tmp_path):
    path = tmp_path / "x.samples.jsonl"
    path.write_text(run_of(1)[0].model_dump_json().replace('"doc_id":0', '"doc_id":"0"') + "\n")
    with pytest.raises(RecordError, match=r"x\.samples\.jsonl:1 doc_id must be valid"):
        read_samples(path)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "", "a b"])
def test_a_task_cannot_write_outside_its_folder(name):
    with pytest.raises(ValueError, match="to be kept in files"):
        check_names([name])


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_run_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError, match=r"run\.json must be"):
        open_run(tmp_path, identity(None, {}, {}))


# ----- the commands


def store(folder, scores):
    """A finished run of one task."""
    logged = [
        {
            **sample(i, score).model_dump(exclude={"metrics", "weights", "response"}),
            "metrics": ["exact_match"],
            "exact_match": score,
            "filtered_resps": ["x"],
            "resps": [["x " * (4 - score)]],
        }
        for i, score in enumerate(scores)
    ]
    open_run(folder, identity(None, {}, {}))
    found = {"results": {"gsm8k": {}}, "samples": {"gsm8k": logged}}
    run_task(folder, "gsm8k", lambda name: dict(found), lambda text: len(text.split()))
    return folder


def test_compare_evals_prints_differences_and_flips(tmp_path):
    first, second = store(tmp_path / "a", [1, 1, 0]), store(tmp_path / "b", [0, 0, 1])
    result = CliRunner().invoke(app, ["compare-evals", str(first), str(second), "--flips"])
    assert result.exit_code == 0, result.output
    assert "-0.3333" in result.output
    assert "gsm8k, exact_match, strict-match: gained 2" in result.output
    assert "gsm8k, exact_match, strict-match: lost 0, 1" in result.output
    assert "length B/A: geometric mean" in result.output
    # of 3, 3 and 4 tokens in one run and 4, 4 and 3 in the other
    assert f"{(4 / 3) ** (1 / 3):.3f} [" in result.output


@pytest.mark.parametrize("finished", [True, False])
def test_compare_evals_refuses_what_is_no_run(tmp_path, finished):
    store(tmp_path / "a", [1])
    if not finished:
        open_run(tmp_path / "b", identity(None, {}, {}))
    arguments = ["compare-evals", str(tmp_path / "a"), str(tmp_path / "b")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert ("must be an --output of kvbits" if finished else "a finished task") in line
    with pytest.raises(RecordError):
        run_samples(tmp_path / "b")


def test_eval_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "kvbits.evaluation.lm_eval", raising=False)
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "--tasks", "gsm8k"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "pip install 'kvbits[eval]'" in line
