"""``kvbits evaluate``: divergence, perplexity and task accuracy through the packed cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import (
    AsJson,
    DeviceName,
    Dtype,
    DtypeName,
    Mode,
    ModelName,
    PlanPath,
    Seed,
    Verbose,
)


@one_line_errors
def evaluate(
    model: ModelName,
    plan: PlanPath = None,
    key_bits: Annotated[int | None, typer.Option(help="Uniform width of keys.")] = None,
    value_bits: Annotated[int | None, typer.Option(help="Uniform width of values.")] = None,
    mode: Annotated[Mode, typer.Option(help="Where a uniform plan shares scales.")] = (
        Mode.PER_TOKEN
    ),
    task: Annotated[
        list[str] | None, typer.Option(help="Generated task, such as arithmetic; repeatable.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text or jsonl file to measure on; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder: every text file in it is a set of its own.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Hugging Face dataset NAME[:CONFIG[:SPLIT]] with a text column."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Problems per task.")] = 200,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of each text; default all.")
    ] = None,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems generated at once.")] = 64,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append one JSON line per measurement.")
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a plan, a uniform plan, or (with neither) the model at full precision.

    Without --task, --text, --data and --dataset: forward KL on the default held-out sets.
    """
    from kvbits.cli.measuring import Measuring, choose_tasks
    from kvbits.cli.models import load_config, load_model
    from kvbits.cli.plans import Wanted, choose

    names = [name for item in task or [] for name in item.split(",")]
    tasks = choose_tasks(names)
    per_channel = True if mode is Mode.KIVI and key_bits is not None else None
    wanted = Wanted(plan, None, key_bits, value_bits, per_channel_keys=per_channel)
    chosen = choose(load_config(model), wanted)
    sources: list[Path | str] = [*(text or []), *(dataset or [])]
    if data is not None:
        sources += text_files(data)
    measuring = Measuring(load_model(model, device, dtype.value), chosen, seed=seed, output=output)
    if not names and not sources:
        measuring.default_sets()
    for source in sources:
        measuring.text(source, windows, window_tokens)
    for each in tasks:
        measuring.task(each, n, batch_size)
    measuring.print(as_json=as_json)


def text_files(folder: Path) -> list[Path]:
    """Return the text files of a folder in the order of their names.

    Raises:
        ValueError: there is none.
    """
    suffixes = {".txt", ".raw", ".jsonl"}
    found = sorted(p for p in folder.glob("*") if p.suffix in suffixes) if folder.is_dir() else []
    if not found:
        raise ValueError(f"--data must be a folder with .txt, .raw or .jsonl files, got {folder}")
    return found
