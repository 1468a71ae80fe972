"""What every benchmark promises, and what is special about each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_examples import EXAMPLES, write_files

from kvbits.evaluation.benchmarks import BENCHMARKS, build_benchmark
from kvbits.evaluation.benchmarks.base import Generate, Item, Rank, Setup
from kvbits.evaluation.benchmarks.gaokao import letters, part_score
from kvbits.evaluation.benchmarks.gsm8k import final_number, own_problems
from kvbits.evaluation.benchmarks.lambada import LambadaRow
from kvbits.evaluation.benchmarks.listing import facts, markdown_table
from kvbits.evaluation.benchmarks.longbench import BY_LENGTH, NEVER_CHAT, datasets
from kvbits.evaluation.benchmarks.source import FolderSource
from kvbits.evaluation.samples import Sample


@pytest.fixture
def make_items(tmp_path: Path, tokenizer: Any) -> Any:
    def make(name: str, shots: int = 0, is_chat: bool = False, **settings: Any) -> list[Item]:
        example = EXAMPLES[name]
        write_files(tmp_path, example.files)
        setup = Setup(
            source=FolderSource(tmp_path),
            tokenizer=tokenizer,
            shots=shots,
            seed=0,
            is_chat=is_chat,
        )
        benchmark = build_benchmark(name, **{**example.settings, **settings})
        return list(benchmark.items(setup))

    return make


def test_every_benchmark_has_an_example():
    assert set(EXAMPLES) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_items_are_numbered_once_and_come_the_same_every_time(name, make_items):
    first, second = make_items(name), make_items(name)
    assert first == second
    assert first
    numbers = [item.doc_id for item in first]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_score_one_and_wrong_ones_nothing(name, make_items):
    example = EXAMPLES[name]
    if not example.metric:
        pytest.skip(f"no fixed answer to {name} is worth all or nothing")
    benchmark = build_benchmark(name, **example.settings)
    item = make_items(name)[0]
    assert benchmark.score(item, example.right).metrics[example.metric] == 1.0
    assert benchmark.score(item, example.wrong).metrics[example.metric] == 0.0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_listing_says_where_to_get_every_file(name):
    found = facts(BENCHMARKS[name])
    assert found["description"]
    for file in found["files"] + found["example_files"]:
        assert file["schema"]
        assert file["place"]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name].files])
def test_a_missing_file_is_named_with_its_place_and_form(name, tmp_path, tokenizer):
    benchmark = build_benchmark(name, **EXAMPLES[name].settings)
    setup = Setup(source=FolderSource(tmp_path), tokenizer=tokenizer, shots=0, seed=0)
    file = benchmark.files[0]
    with pytest.raises(ValueError, match=r"--data must hold .* without it; take .* with ") as info:
        list(benchmark.items(setup))
    assert file.name in str(info.value)
    assert file.schema in str(info.value)


def test_the_documents_hold_the_table():
    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert markdown_table() in text


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"benchmark must be one of gsm8k, .*, got 'gsm9k'"):
        build_benchmark("gsm9k")
    with pytest.raises(ValueError, match="max_new_tokens"):
        build_benchmark("gsm8k", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"datasets: must be all or among .*, got 'qsper'"):
        build_benchmark("longbench", datasets="qsper")


def test_lambada_takes_whole_passages_too():
    row = LambadaRow.model_validate({"text": "Sets in the west"})
    assert (row.context, row.target) == ("Sets in the", "west")


# --- GSM8K


def test_gsm8k_takes_the_first_training_problems_as_shots(make_items):
    prompt = make_items("gsm8k", shots=2)[0].request.prompt
    assert len(prompt.shots) == 2
    assert prompt.shots[0] == (
        "Question: Ann has 4 pens and buys 3. How many?\nAnswer:",
        " 4 + 3 = 7\n#### 7",
    )
    with pytest.raises(ValueError, match="--shots must be at most 9 here, got 10"):
        make_items("gsm8k", shots=10)


def test_own_examples_need_no_file_and_come_to_what_they_say(make_items):
    assert len(make_items("gsm8k", shots=8, examples="own")[0].request.prompt.shots) == 8
    for row in own_problems():
        lines = row.answer.split("\n")
        for line in lines[:-1]:  # every step is an equation that holds
            left, _, right = line.rpartition("=")
            terms = left.replace("$", "").split()
            start = next(i for i, word in enumerate(terms) if word[0].isdigit())
            result = int(right.replace("$", "").split()[0].rstrip("."))
            assert eval(" ".join(terms[start:])) == result, line
        assert str(result) in lines[-1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("He has 3 + 4 = 7.\n#### 7", "7"),
        ("#### $1,234.50 in all", "1234.50"),
        ("#### -12", "-12"),
        ("The answer is 18. Then 5 more words", "18"),
        ("First 3, and then 4", "4"),
        ("The total is 7.", "7"),
        ("#### 42 apples, not 43", "42"),
    ],
)
def test_final_number_is_read_from_where_chains_of_thought_put_it(text, wanted):
    assert str(final_number(text)) == wanted


def test_gsm8k_strict_wants_the_mark(make_items):
    benchmark, item = build_benchmark("gsm8k"), make_items("gsm8k")[0]
    assert benchmark.score(item, "The answer is 7.").metrics == {"acc": 1.0, "strict": 0.0}
    assert benchmark.score(item, "#### 7.00").metrics == {"acc": 1.0, "strict": 1.0}
    assert benchmark.score(item, "no number").metrics == {"acc": 0.0, "strict": 0.0}


# --- MMLU


def test_mmlu_shots_are_of_the_same_subject(make_items):
    for item in make_items("mmlu", shots=5):
        assert len(item.request.prompt.shots) == 5
        assert item.request.prompt.shots[0][1] == " B"
        assert item.group.replace("_", " ") in item.request.prompt.system
        assert isinstance(item.request, Rank)
        assert item.request.answers == (" A", " B", " C", " D")


def test_mmlu_stem_leaves_other_subjects_out(make_items):
    assert [item.group for item in make_items("mmlu_stem")] == ["abstract_algebra", "astronomy"]
    assert len(make_items("mmlu")) == 3


# --- GAOKAO


@pytest.mark.parametrize(
    ("text", "kind", "parts", "wanted"),
    [
        ("A和B都不对。【答案】C。", "single", 1, ["C"]),
        ("排除A，所以选D", "single", 1, ["D"]),
        ("不知道", "single", 1, [""]),
        ("【答案】A\n【答案】：B", "parts", 2, ["A", "B"]),
        ("1. C 2. D 3. A", "parts", 3, ["C", "D", "A"]),
        ("C", "parts", 2, ["C", ""]),
        ("B错。【答案】 A、C、D", "several", 1, ["ACD"]),
        ("【答案】GFABC", "matching", 5, list("GFABC")),
    ],
)
def test_letters_are_read_by_kind_of_question(text, kind, parts, wanted):
    assert letters(text, kind, parts) == wanted


def test_part_of_several_right_letters_gives_half():
    assert part_score("CA", "AC", "several") == 1.0
    assert part_score("A", "AC", "several") == 0.5
    assert part_score("AB", "AC", "several") == 0.0
    assert part_score("", "AC", "several") == 0.0
    assert part_score("A", "AC", "single") == 0.0


def test_gaokao_weighs_questions_by_their_points(make_items):
    benchmark, item = build_benchmark("gaokao"), make_items("gaokao")[0]
    assert benchmark.score(item, "【答案】B").weights == {"score": 6.0}


# --- LongBench


def test_longbench_has_its_21_datasets_and_lengths():
    found = datasets()
    assert len(found) == 21
    assert {d.max_new_tokens for d in found.values()} == {32, 64, 128, 512}
    for name, dataset in found.items():
        assert "{context}" in dataset.prompt, name
        # the trap of copies in YAML: line breaks that became a backslash and an n
        assert "\\n" not in dataset.prompt, name
        assert "\n" in dataset.prompt, name
    assert set(BY_LENGTH) <= set(found)


def test_longbench_wraps_no_few_shot_or_code_prompt(make_items):
    items = make_items("longbench", is_chat=True)
    plain = {i.task.removeprefix("longbench_") for i in items if i.request.prompt.is_plain}
    assert plain == NEVER_CHAT
    assert all(item.request.prompt.may_cut for item in items)


def test_longbench_scores_the_first_line_of_few_shot_answers(make_items):
    benchmark = build_benchmark("longbench")
    items = {item.task: item for item in make_items("longbench")}
    text = "\nAnn\nDialogue: of its own"
    assert benchmark.score(items["longbench_triviaqa"], text).metrics == {"score": 1.0}
    found = benchmark.score(items["longbench_hotpotqa"], text).metrics["score"]
    assert found == pytest.approx(2 * (1 / 5) / (1 / 5 + 1))  # precision 1/5, recall 1


@pytest.mark.parametrize("name", datasets())
def test_longbench_scores_every_dataset_by_its_metric(name, make_items):
    if datasets()[name].metric.startswith("chinese"):
        pytest.importorskip("jieba")
    (item,) = make_items("longbench", datasets=name)
    benchmark = build_benchmark("longbench")
    right = benchmark.score(item, item.references[0]).metrics["score"]
    assert right == pytest.approx(1.0, abs=1e-7)  # ROUGE's own epsilon
    assert benchmark.score(item, "xyz 99").metrics["score"] == 0.0
    assert benchmark.score(item, "").metrics["score"] == 0.0


def test_longbench_takes_the_best_reference_and_braces_in_contexts(tmp_path, make_items):
    row = {"input": "{x}", "context": "a {context} b", "answers": ["no", "Ann"], "length": 9000}
    write_files(tmp_path, {"longbench/lcc_e.jsonl": [row | {"answers": ["x = 1"]}]})
    write_files(tmp_path, {"longbench/hotpotqa_e.jsonl": [row]})
    items = make_items("longbench", datasets="lcc,hotpotqa", by_length=True)
    assert [item.task for item in items] == ["longbench_hotpotqa", "longbench_lcc"]
    assert {item.group for item in items} == {"8k+"}
    assert "a {context} b" in items[0].request.prompt.question
    benchmark = build_benchmark("longbench", by_length=True)
    assert benchmark.score(items[0], "Ann").metrics == {"score": 1.0}


def test_longbench_averages_datasets_not_items():
    def sample(task: str, number: int, score: float) -> Sample:
        return Sample(
            task=task, filter="none", doc_id=number, doc_hash="", prompt_hash="",
            metrics={"score": score},
        )  # fmt: skip

    samples = [sample("a", 0, 1.0), sample("a", 1, 0.0), sample("a", 2, 0.5), sample("b", 3, 0.1)]
    found = build_benchmark("longbench").summary(samples)
    assert found == {"mean of the datasets": pytest.approx(0.3)}


# --- code


def test_humaneval_program_runs_the_test_on_the_completion(make_items):
    benchmark, item = build_benchmark("humaneval"), make_items("humaneval")[0]
    block = "```python\ndef double(x):\n    return x + x\n```"
    draft, use = block.replace("x + x", "x"), "```python\nprint(double(2))\n```"
    for text in ("    return 2 * x\n", f"{block}\nDone.", f"{draft}\nNo:\n{block}\n{use}"):
        program = benchmark.program(item, text)
        exec(compile(program, "own", "exec"), {})  # texts of this test, not of a model
    wrong = benchmark.program(item, "    return 3 * x\n")
    with pytest.raises(AssertionError):
        exec(compile(wrong, "own", "exec"), {})
    assert benchmark.submission(item, "    return 1") == {
        "task_id": "Own/0",
        "completion": "    return 1",
    }


def test_humaneval_stops_at_the_next_function_but_not_in_a_chat(make_items):
    assert "\ndef " in make_items("humaneval")[0].request.stop
    chat = make_items("humaneval", is_chat=True)[0].request
    assert chat.stop == ()
    assert "```python" in chat.prompt.question


def test_livecodebench_chooses_by_date_and_writes_code(make_items):
    items = make_items("livecodebench", since="2024-09-01")
    assert [item.doc["question_id"] for item in items] == ["2"]
    assert "class Solution" in items[0].request.prompt.question
    benchmark = build_benchmark("livecodebench")
    assert not benchmark.has_programs
    found = benchmark.submission(items[0], "```\ndraft\n```\nSo:\n```python\nprint(1)\n```")
    assert found == {"question_id": "2", "code_list": ["print(1)\n"]}


def test_kv_retrieval_shows_the_pairs_as_json(make_items):
    request = make_items("kv_retrieval")[0].request
    assert isinstance(request, Generate)
    store = request.prompt.question.split("\n\n")[1]
    assert json.loads(store) == {"k1": "v1", "k2": "v2"}
