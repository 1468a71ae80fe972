"""``kvbits bench``: speed and memory on this machine, as tables, records and figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import OneLineGroup, one_line_errors
from kvbits.cli.options import DeviceName, Dtype, DtypeName, Impl, ImplName, ModelName, Verbose

if TYPE_CHECKING:
    from kvbits.bench.workloads import Variant

app = typer.Typer(
    cls=OneLineGroup,
    no_args_is_help=True,
    help="Measure speed and memory on this machine; write records and figures.",
)

OutputDir = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for records and the page of figures.")
]
Commit = Annotated[
    str | None, typer.Option(help="Commit the records name, where git cannot be asked.")
]
Plans = Annotated[
    list[str] | None,
    typer.Option(
        "--plan",
        help="dynamic, quanto4 (stock quantized cache), a pair such as K4V2 or K4V2@kivi128, a "
        "plan or a KVTuner file; repeatable.",
    ),
]
CELL_COLUMNS = ("name", "batch", "context", "time_us", "speedup", "roofline_share", "schedule")
ENCODING_COLUMNS = ("suite", "name", "time_us", "gb_s")
COUNTER_COLUMNS = (
    "suite",
    "name",
    "time_us",
    "memory_share",
    "issue_share",
    "tensor_share",
    "warps",
    "registers",
    "stalls",
)
DECODE_COLUMNS = ("variant", "batch", "context", "step_ms", "tokens_per_second", "speedup")
BYTES_COLUMNS = ("cache_bytes", "peak_bytes")
PROFILE_COLUMNS = ("kernel_ms",)
LARGEST_COLUMNS = ("variant", "effective_bits", "largest_batch", "peak_bytes")
DEFAULT_OUTPUT = Path("runs/bench")
DEFAULT_PLANS = ("K16V16", "K8V8", "K4V4", "K4V2", "K2V2")


@app.command()
@one_line_errors
def kernels(
    suite: Annotated[
        list[str] | None, typer.Option(help="Suite to run; repeatable; default: all.")
    ] = None,
    search: Annotated[
        bool, typer.Option(help="Also look for faster schedules than the shipped ones.")
    ] = False,
    output: OutputDir = DEFAULT_OUTPUT,
    commit: Commit = None,
    verbose: Verbose = False,
) -> None:
    """Time attention and encoding kernels against 16-bit attention. Needs a CUDA device."""
    _need_gpu()
    from kvbits.bench import encoding, kernel_suite
    from kvbits.bench.compiling import CellJob, compile_ahead

    suites = kernel_suite.suites()
    known = [*suites, "encoding"]
    wanted = suite or known
    for name in wanted:
        if name not in known:
            raise ValueError(f"--suite must be one of {', '.join(known)}, got {name!r}")
    jobs = [CellJob(cell, search) for name in wanted for cell in suites.get(name, [])]
    _say("compiling kernels")
    _report_failures(compile_ahead(jobs))
    path = output / "kernels.jsonl"
    for name in wanted:
        if name == "encoding":
            _write(path, "kernels", commit, name, encoding.measure(), ENCODING_COLUMNS)
            continue
        records = kernel_suite.measure(name, suites[name], is_searched=search)
        _write(path, "kernels", commit, name, records, CELL_COLUMNS)
    _draw(path)


@app.command()
@one_line_errors
def counters(
    output: OutputDir = DEFAULT_OUTPUT, commit: Commit = None, verbose: Verbose = False
) -> None:
    """Read hardware counters of kernels through Nsight Compute: what limits each of them."""
    _need_gpu()
    from kvbits.bench import counters as benchmark

    path = output / "counters.jsonl"
    _write(path, "counters", commit, "kernels", benchmark.measure(), COUNTER_COLUMNS)


@app.command()
@one_line_errors
def decode(
    model: ModelName,
    plan: Plans = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Rows and tokens such as 8x32768; repeatable.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=5, help="Tokens to make.")] = 36,
    prompt: Annotated[
        bool,
        typer.Option(help="Run the context through the model instead of storing random states."),
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved runs; the median counts.")] = 1,
    profile: Annotated[
        bool, typer.Option(help="Also record what a step is made of, by kind of kernel; on a GPU.")
    ] = False,
    impl: ImplName = Impl.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")] = None,
    output: OutputDir = DEFAULT_OUTPUT,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    commit: Commit = None,
    verbose: Verbose = False,
) -> None:
    """Time whole decode steps: tokens per second, step time and peak memory by cache.

    A folder with a config and no weights gets random ones: speed does not depend on them.
    """
    from kvbits.bench import decode as benchmark
    from kvbits.bench.workloads import Workload, parse_shape

    if profile and not _has_gpu(device):
        raise ValueError("--profile must be left out where there is no CUDA device, got --profile")
    loaded = _load(model, device, dtype, threads)
    variants = _variants(plan or DEFAULT_PLANS, loaded)
    shapes = [parse_shape(text) for text in shape or ["1x1024", "1x4096"]]
    _compile_layers(variants, loaded)
    records = benchmark.measure(
        loaded,
        variants,
        [Workload(*each, new_tokens) for each in shapes],
        is_prompted=prompt,
        repeats=repeats,
        impl=impl.value,
        is_profiled=profile,
    )
    columns = DECODE_COLUMNS + (("generated_per_second",) if prompt else ()) + BYTES_COLUMNS
    columns += PROFILE_COLUMNS if profile else ()
    path = output / "decode.jsonl"
    facts: dict[str, Any] = {"dtype": str(loaded.dtype).removeprefix("torch.")}
    if loaded.device.type == "cpu":
        facts["threads"] = _threads()
    _write(path, "decode", commit, Path(model).name, records, columns, facts)
    _draw(path)


@app.command()
@one_line_errors
def memory(
    model: ModelName,
    plan: Plans = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; default: 32768, on a CPU 2048.")
    ] = None,
    output: OutputDir = DEFAULT_OUTPUT,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    commit: Commit = None,
    verbose: Verbose = False,
) -> None:
    """Find the largest batch that decodes, by decoding it; on a CPU, the peak of a process."""
    from kvbits.bench import memory as largest
    from kvbits.bench import process_memory
    from kvbits.bench.workloads import parse_variant
    from kvbits.cli.models import load_config

    names = plan or DEFAULT_PLANS
    path = output / "memory.jsonl"
    if not _has_gpu(device):
        config = load_config(model)
        for name in names:
            parse_variant(name, config)  # a bad name should fail before any process starts
        records = process_memory.measure(
            model,
            names,
            context or process_memory.CONTEXT,
            "bfloat16" if dtype is Dtype.AUTO else dtype.value,
        )
        columns = ("variant", "effective_bits_at_context", "formula_bytes", *BYTES_COLUMNS)
        _write(path, "process_memory", commit, Path(model).name, records, columns)
        return
    loaded = _load(model, device, dtype, None)
    variants = _variants(names, loaded)
    _compile_layers(variants, loaded)
    found = largest.measure(loaded, variants, context or largest.CONTEXT)
    _write(path, "memory", commit, Path(model).name, found, LARGEST_COLUMNS)
    _draw(path)


def _write(
    path: Path,
    benchmark: str,
    commit: str | None,
    subject: str,
    records: Iterable[dict[str, Any]],
    columns: tuple[str, ...],
    facts: dict[str, Any] | None = None,
) -> None:
    """Append each record as it comes, and print all as a table.

    ``subject`` is the model or the suite.
    """
    from kvbits.bench.machine import describe
    from kvbits.cli.output import console, table
    from kvbits.evaluation.jsonl import append_json_line

    shared = describe(benchmark, commit=commit) | (facts or {})
    rows = []
    for record in _progress(subject, records):
        append_json_line(path, shared | {"subject": subject} | record)
        rows.append([_cell(record, column) for column in columns])
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    made = table(*(columns[index].replace("_", " ") for index in filled))
    for row in rows:
        made.add_row(*(row[index] for index in filled))
    console().print(f"{subject}; records in {path}", highlight=False)
    console().print(made)


def _progress(title: str, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from kvbits.cli.output import progress_bars

    with progress_bars() as bars:
        task = bars.add_task(title, total=None)
        for record in records:
            bars.advance(task)
            yield record


def _cell(record: dict[str, Any], column: str) -> str:
    from kvbits.cli.output import size

    value = record.get(column, record.get("cell", {}).get(column))
    if value is None:
        return str(record.get("error", "")) if column == "step_ms" else ""
    if column.endswith("_bytes"):
        return size(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {part:g}" for key, part in value.items())
    if column.endswith("_share"):
        return f"{100 * value:.0f} %"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _draw(path: Path) -> None:
    from kvbits.bench.figures import write_page
    from kvbits.evaluation.jsonl import read_json_lines

    page = write_page(read_json_lines(path), path.with_suffix(".html"))
    if page:
        _say(f"figures in {page}")


def _load(model: str, device: str, dtype: Dtype, threads: int | None) -> Any:
    """The model, with random weights where its folder has none."""
    import torch

    from kvbits.bench.random_model import has_weights, random_model
    from kvbits.cli.models import load_config, load_model, resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    if has_weights(model):
        return load_model(model, device, dtype.value).model
    _say(f"{model} has no weights; taking random ones")
    return random_model(load_config(model), str(resolve_device(device)), dtype.value)


def _variants(names: Iterable[str], model: Any) -> list[Variant]:
    from kvbits.bench.workloads import parse_variant

    return [parse_variant(name, model.config) for name in names]


def _compile_layers(variants: list[Variant], model: Any) -> None:
    if model.device.type != "cuda":
        return
    from kvbits.bench.compiling import compile_ahead, layer_jobs

    plans = [variant.plan for variant in variants if variant.plan is not None]
    _say("compiling kernels")
    _report_failures(compile_ahead(layer_jobs(plans)))


def _report_failures(failures: list[str]) -> None:
    for line in failures:
        _say(f"did not compile: {line}")


def _need_gpu() -> None:
    if not _has_gpu("auto"):
        raise ValueError(
            "kvbits bench must run on a CUDA device to time kernels, got none; "
            "kvbits bench decode runs on CPUs too"
        )


def _has_gpu(device: str) -> bool:
    import torch

    return torch.cuda.is_available() and device != "cpu"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _say(line: str) -> None:
    typer.echo(line, err=True)
