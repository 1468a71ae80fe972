"""``kvbits methods`` and ``kvbits calibrate``: published methods, and plans made by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import AsJson, DeviceName, Dtype, DtypeName, ModelName, Seed, Verbose

if TYPE_CHECKING:
    from kvbits.methods import Method
    from kvbits.plan import CachePlan


@one_line_errors
def methods(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """List the methods: where they were published, what they need, what differs."""
    from kvbits.cli.output import console, table
    from kvbits.methods import METHODS
    from kvbits.methods.listing import facts

    rows = [facts(method) for method in METHODS.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    made = table("method", "source", "bits", "calibration", "settings")
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        made.add_row(row["name"], row["source"], row["bits"], row["calibration"], settings)
    console().print(made)
    for row in rows:
        if row["differs"]:
            typer.echo(f"{row['name']} differs from its source: {'; '.join(row['differs'])}.")


@one_line_errors
def calibrate(
    model: ModelName,
    method: Annotated[str, typer.Option(help="A name that `kvbits methods` lists.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for plan.json and what it is fitted with."),
    ],
    bits: Annotated[
        float | None, typer.Option(help="Width of keys and values, if the method has a choice.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as sink_tokens=4; repeatable."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Calibration text of your own; default: bundled text and tasks."),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each kind to use at most; default: all."),
    ] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    verbose: Verbose = False,
) -> None:
    """Make the plan of a model by a published method. Loads weights only if the method has to."""
    from kvbits.cli.models import load_config
    from kvbits.methods import build_method

    settings = settings_of(setting)
    if bits is not None:
        width = int(bits) if bits.is_integer() else bits
        settings = {"key_bits": width, "value_bits": width} | settings
    built = build_method(method, **settings)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {str(output)!r}")
    if built.needs_data:
        plan = _calibrated(built, model, text, documents, seed, device, dtype.value)
    else:
        plan = built.plan(load_config(model))
    path = output / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    typer.echo(f"{plan.describe()}; written to {path}")


def _calibrated(
    method: Method,
    model: str,
    text: Path | None,
    most: int | None,
    seed: int,
    device: str,
    dtype: str,
) -> CachePlan:
    from kvbits.cli.models import load_model
    from kvbits.cli.output import progress_bars
    from kvbits.evaluation.corpora import SetSize, default_sets
    from kvbits.evaluation.token_set import dataset

    loaded = load_model(model, device, dtype)
    size = SetSize()
    size = size._replace(text_documents=min(most or size.text_documents, size.text_documents))
    sets = default_sets(loaded.tokenizer, "calibration", size=size, seed=seed, text=text)
    sets = [each.first(most) if most else each for each in sets]
    documents = [document for each in sets for document in each.documents]
    with progress_bars() as bars:
        task = bars.add_task(f"calibrating {method.name}", total=method.passes * len(documents))
        plan = method.calibrate(loaded.model, documents, lambda: bars.advance(task))
    assert plan.provenance is not None
    used = tuple(dataset(each) for each in sets)
    return plan.with_provenance(
        plan.provenance.model_copy(update={"datasets": used, "seed": seed})
    )


def settings_of(texts: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """Read the values of an option that takes ``NAME=VALUE``."""
    return dict(_setting(text, flag) for text in texts or ())


def _setting(text: str, flag: str) -> tuple[str, Any]:
    """Read ``name=value``; the value as JSON where it is some, else as text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{flag} must be name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
