"""``kvbits inspect``: what a model caches, and what a memory budget buys at which width."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import AsJson, Memory, Mode, ModelName, PlanPath, Verbose

if TYPE_CHECKING:
    from pathlib import Path

    from kvbits.geometry import ModelGeometry
    from kvbits.plan import CachePlan

UNIFORM_PAIRS = ((16, 16), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
DEFAULT_CONTEXT = 4096


class Offer(NamedTuple):
    """What one plan costs, and what the budget buys with it."""

    name: str
    effective_bits: float
    bytes_at_context: int
    array_bytes: int  # once, beside the cache
    max_context: int | None
    max_batch: int | None


class Kernel(NamedTuple):
    """How a decode step over a run of layers executes on a GPU."""

    plan: str
    layers: str
    choice: str


@one_line_errors
def inspect(
    model: ModelName,
    plan: PlanPath = None,
    memory: Memory = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence; default: the model's maximum.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Where the uniform plans share scales.")] = (
        Mode.PER_TOKEN
    ),
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show layers, cache bytes, and what a memory budget buys. Reads the config, no weights."""
    from kvbits.cli.models import load_config
    from kvbits.geometry import ModelGeometry

    config = load_config(model)
    geometry = ModelGeometry.from_config(config)
    text_config = config.get_text_config(decoder=True)
    tokens = context or getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    plans = _plans(config, mode.value, plan)
    offers = [_offer(name, each, tokens, memory) for name, each in plans]
    kernels = [row for name, each in plans for row in _kernels(name, each, geometry, tokens)]
    if as_json:
        found = _as_json(model, geometry, offers, tokens, memory)
        found["kernels"] = [row._asdict() for row in kernels]
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(model, geometry, offers, tokens, memory)
        _print_kernels(kernels, tokens)


def _plans(config: Any, mode: Any, path: Path | None) -> list[tuple[str, CachePlan]]:
    """Return the uniform plans the model's shapes allow, and the given one."""
    from kvbits.plan import CachePlan

    plans = []
    for key, value in UNIFORM_PAIRS:
        name = "16 bits" if key == 16 else f"K{key}V{value}"
        plans.append((name, CachePlan.uniform(config, key, value, mode=mode)))
    if path is not None:
        given = CachePlan.load(path)
        given.check(config)
        plans.append((path.name, given))
    return plans


def _offer(name: str, plan: CachePlan, context: int, memory: int | None) -> Offer:
    from kvbits.memory import largest_fitting

    fits_context = fits_batch = None
    fixed = plan.array_bytes
    if memory is not None:
        fits_context = largest_fitting(lambda tokens: plan.bytes(tokens) + fixed <= memory)
        fits_batch = largest_fitting(lambda rows: plan.bytes(context, rows) + fixed <= memory)
    return Offer(name, plan.effective_bits, plan.bytes(context), fixed, fits_context, fits_batch)


def _runs(items: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return runs of equal items, each with the indices it covers."""
    runs: list[tuple[str, Any]] = []
    start = 0
    for _, run in groupby(items):
        same = list(run)
        end = start + len(same) - 1
        runs.append((f"{start}" if start == end else f"{start}-{end}", same[0]))
        start = end + 1
    return runs


def _layer_rows(geometry: ModelGeometry) -> list[tuple[str, ...]]:
    """Return one row per run of equal layers: indices, type, heads, widths, how it is stored."""
    return [
        (
            indices,
            layer.layer_type,
            str(layer.num_key_value_heads),
            f"{layer.key_head_dim} / {layer.value_head_dim}",
            f"{layer.values_per_token * 2:,}",
            "packed" if layer.is_packable else "as transformers does",
        )
        for indices, layer in _runs(geometry.layers)
    ]


def _kernels(name: str, plan: CachePlan, geometry: ModelGeometry, tokens: int) -> list[Kernel]:
    """Return the kernel choice of every run of layers that has the same."""
    from kvbits.attention.triton.schedule import describe

    queries = geometry.num_attention_heads
    choices = [
        describe(layer_plan, layer, queries, tokens) if layer.is_packable else None
        for layer_plan, layer in zip(plan.layers, geometry.layers, strict=True)
    ]
    return [Kernel(name, indices, choice) for indices, choice in _runs(choices) if choice]


def _as_json(
    model: str, geometry: ModelGeometry, offers: list[Offer], context: int, memory: int | None
) -> dict[str, Any]:
    return {
        "model": model,
        "architecture": geometry.architecture,
        "fingerprint": geometry.fingerprint,
        "layers": [layer.model_dump(mode="json") for layer in geometry.layers],
        "context": context,
        "memory_bytes": memory,
        "plans": [offer._asdict() for offer in offers],
    }


def _print(
    model: str, geometry: ModelGeometry, offers: list[Offer], context: int, memory: int | None
) -> None:
    from kvbits.cli.output import console, size, table

    heads = f"{geometry.num_attention_heads} query heads"
    layers = table("layers", "type", "KV heads", "key / value width", "bytes/token", "stored")
    for row in _layer_rows(geometry):
        layers.add_row(*row)
    console().print(f"{model}: {geometry.architecture}, {heads}", highlight=False)
    console().print(layers)
    columns = ["plan", "effective bits", f"cache at {context:,} tokens", "of 16 bits"]
    if memory is not None:
        columns += [f"tokens in {size(memory)}", f"sequences of {context:,}"]
    costs = table(*columns)
    for offer in offers:
        share = offer.bytes_at_context / max(1, offers[0].bytes_at_context)
        cells = [offer.name, f"{offer.effective_bits:.2f}", size(offer.bytes_at_context)]
        cells.append(f"{100 * share:.0f} %")
        if memory is not None:
            cells += [_at_most(offer.max_context), _at_most(offer.max_batch)]
        costs.add_row(*cells)
    console().print(costs)
    for offer in offers:
        if offer.array_bytes:
            console().print(
                f"{offer.name}: and {size(offer.array_bytes)} of arrays, once for all sequences",
                highlight=False,
            )


def _print_kernels(kernels: list[Kernel], context: int) -> None:
    from kvbits.cli.output import console, table

    choices = table(
        "plan", "layers", f"decode kernel on a GPU, one sequence of {context:,} tokens"
    )
    for row in kernels:
        choices.add_row(*row)
    console().print(choices)


def _at_most(count: int | None) -> str:
    if count is None:
        return ""
    from kvbits.memory import MOST_TOKENS

    return "no limit" if count >= MOST_TOKENS // 2 else f"{count:,}"
