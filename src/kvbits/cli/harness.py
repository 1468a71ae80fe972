"""``kvbits eval`` and ``kvbits compare-evals``: lm-evaluation-harness on a packed cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import (
    AsJson,
    DeviceName,
    Dtype,
    DtypeName,
    ModelName,
    PlanPath,
    Seed,
    Verbose,
)

if TYPE_CHECKING:
    from kvbits.evaluation.comparison import Comparison

MAX_FLIPS_SHOWN = 10


@one_line_errors
def eval_(
    model: ModelName,
    tasks: Annotated[str, typer.Option(help="Names, such as gsm8k,mmlu; or patterns.")],
    plan: PlanPath = None,
    method: Annotated[
        str | None, typer.Option(help="A method of `kvbits methods` that needs no calibration.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Width of the method's codes.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples; default: the task's.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Wrap prompts as the tokenizer says.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool, typer.Option(help="With a chat template: few-shot examples as turns.")
    ] = True,
    system_instruction: Annotated[
        str | None, typer.Option(help="System prompt; default: the task's.")
    ] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="For generation, such as temperature=0.6,do_sample=True.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task; default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt at most; default: the model's.")
    ] = None,
    quantize_prefill: Annotated[
        bool, typer.Option(help="Let prompts of generation see decoded states, too.")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results and every example; resumable."),
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a plan's cache; without plan or method, at 16 bits.

    Log-likelihoods, too, are those of the packed cache. `kvbits evaluate` is kvbits' own
    measurement: divergence from full precision, perplexity and generated tasks, nothing to fetch.
    """
    from kvbits.cli.models import load_model
    from kvbits.evaluation import harness_run
    from kvbits.evaluation.lm_eval import KVBitsLM, evaluate, find_tasks, versions

    if not verbose:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, names = find_tasks(tasks.split(","), include_path)
    loaded = load_model(model, device, dtype.value)
    lm = KVBitsLM(
        loaded.model,
        tokenizer=loaded.tokenizer,
        plan=plan,
        method=method,
        bits=bits,
        quantize_prefill=quantize_prefill,
        batch_size=batch_size,
        max_length=max_length,
    )
    settings: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
        "gen_kwargs": gen_kwargs,
        "limit": limit,
    }
    if output is not None:
        harness_run.check_names(names)
        own: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "seed": seed}
        own |= {"quantize_prefill": quantize_prefill, "model": Path(loaded.name).name}
        found = harness_run.identity(lm.plan, settings | own, versions(lm))
        harness_run.open_run(output, found)

    def run(name: str) -> dict[str, Any]:
        return evaluate(lm, [name], manager=manager, seed=seed, **settings)

    def count_tokens(text: str) -> int:
        return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    results = {name: harness_run.run_task(output, name, run, count_tokens) for name in names}
    if as_json:
        typer.echo(json.dumps(results, indent=2, default=str))
        return
    name = "full precision" if lm.plan is None else lm.plan.describe()
    _print_results(f"{loaded.name}: {name}", results)
    if output is not None:
        typer.echo(f"results and examples: {output}")


def _print_results(title: str, results: dict[str, dict[str, Any]]) -> None:
    from kvbits.cli.output import console, table

    rows = table("task", "filter", "metric", "value", "standard error", "n")
    for found in results.values():
        for task, scores in found["results"].items():
            n = found.get("n-samples", {}).get(task, {}).get("effective", "")
            for name, value in scores.items():
                metric, separator, filter = name.partition(",")
                if not separator or metric.endswith("_stderr") or isinstance(value, str):
                    continue
                error = scores.get(f"{metric}_stderr,{filter}")
                error = f"{error:.4f}" if isinstance(error, float) else ""
                rows.add_row(task, filter, metric, f"{value:.4f}", error, str(n))
    console().print(title)
    console().print(rows)


@one_line_errors
def compare_evals(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="An --output of kvbits eval or score.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same tasks.")],
    flips: Annotated[bool, typer.Option("--flips", help="Name the examples that flip.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare two runs of `kvbits eval` or `kvbits score` example by example.

    Differences with their intervals, flips in both directions, and how much longer answers got.
    """
    from kvbits.evaluation import harness_run
    from kvbits.evaluation.comparison import compare

    found = compare(harness_run.run_samples(first), harness_run.run_samples(second))
    if as_json:
        typer.echo(json.dumps([_plain(row) for row in found], indent=2))
        return
    typer.echo(f"A: {harness_run.describe_run(first)}")
    typer.echo(f"B: {harness_run.describe_run(second)}")
    _print_comparisons(found)
    if flips:
        for row in found:
            _print_flips(row)


def _plain(row: Comparison) -> dict[str, Any]:
    length = row.length_ratio and row.length_ratio._asdict()
    return row._asdict() | {"difference": row.difference._asdict(), "length_ratio": length}


def _print_comparisons(found: list[Comparison]) -> None:
    from kvbits.cli.output import console, table

    rows = table(
        "task", "metric", "A", "B", "B − A", "95 %", "gained", "lost", "p", "length B/A", "n"
    )
    for row in found:
        gap, low, high = row.difference
        metric = f"{row.metric}, {row.filter}"
        flips = ["", "", ""]
        if row.gained is not None and row.lost is not None:
            flips = [str(len(row.gained)), str(len(row.lost)), f"{row.p_value:.3g}"]
        means = f"{row.first:.4f}", f"{row.second:.4f}", f"{gap:+.4f}"
        length = ""
        if row.length_ratio is not None:
            length = "{:.3f} [{:.3f}, {:.3f}]".format(*row.length_ratio)
        interval = f"[{low:+.4f}, {high:+.4f}]"
        rows.add_row(row.task, metric, *means, interval, *flips, length, str(row.n))
    console().print(rows)
    if any(row.length_ratio for row in found):
        typer.echo("length B/A: geometric mean of the ratios of generated tokens, with 95 %")


def _print_flips(row: Comparison) -> None:
    for words, numbers in (("gained", row.gained), ("lost", row.lost)):
        if numbers:
            more = f" and {len(numbers) - MAX_FLIPS_SHOWN} more" * (len(numbers) > MAX_FLIPS_SHOWN)
            shown = ", ".join(map(str, numbers[:MAX_FLIPS_SHOWN]))
            typer.echo(f"{row.task}, {row.metric}, {row.filter}: {words} {shown}{more}")
