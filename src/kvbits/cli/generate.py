"""``kvbits generate``: stream text from a model on a packed cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli.failures import one_line_errors
from kvbits.cli.options import (
    DeviceName,
    Dtype,
    DtypeName,
    ModelName,
    PlanPath,
    Seed,
    Verbose,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvbits.cli.models import Loaded
    from kvbits.plan import CachePlan


@one_line_errors
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="Text to continue; `-` reads standard input.")],
    plan: PlanPath = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    seed: Seed = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = Dtype.AUTO,
    verbose: Verbose = False,
) -> None:
    """Stream text, then say what the cache took. Without --plan the cache is transformers' own."""
    import torch
    from transformers import TextStreamer

    from kvbits.cli.models import load_model
    from kvbits.generation import Sampling, stop_ids
    from kvbits.generation import generate as decode

    cache_plan = _load_plan(plan)
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    loaded = load_model(model, device, dtype.value)
    ids = _encode(loaded, text, chat)
    torch.manual_seed(seed)
    cache = _new_cache(loaded, cache_plan, ids.shape[1] + max_new_tokens)
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    typer.echo(text, nl=False)
    started = time.perf_counter()
    made = decode(
        loaded.model,
        ids,
        cache,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature),
        stop_ids=stop_ids(loaded.model, loaded.tokenizer),
        on_tokens=lambda tokens: streamer.put(torch.tensor(tokens)),
    )
    streamer.end()
    seconds = time.perf_counter() - started
    typer.echo(f"\n{_account(loaded, cache_plan, cache)}", err=True)
    typer.echo(f"{made.tokens.shape[1]} tokens in {seconds:.1f} s", err=True)


def _load_plan(path: Path | None) -> CachePlan | None:
    """Read the plan before the model: a bad file should fail at once."""
    from kvbits.plan import CachePlan

    return None if path is None else CachePlan.load(path)


def _encode(loaded: Loaded, text: str, chat: bool) -> Any:
    import torch

    from kvbits.evaluation.corpora import encode_document

    if not text:
        raise ValueError("--prompt must hold text, got none")
    if not chat:
        ids = encode_document(loaded.tokenizer, text)
    elif loaded.tokenizer.chat_template is None:
        raise ValueError(f"--chat must be used with a chat model, got {loaded.name} without one")
    else:
        messages = [{"role": "user", "content": text}]
        ids = loaded.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    return torch.tensor([ids], device=loaded.model.device)


def _new_cache(loaded: Loaded, plan: CachePlan | None, most_tokens: int) -> Any:
    """An empty cache; on a GPU one with room for all tokens, so that steps can be captured."""
    from transformers import DynamicCache

    from kvbits.errors import UnsupportedModelError

    if plan is None:
        return DynamicCache(config=loaded.model.config)
    if loaded.model.device.type != "cuda":
        return plan.new_cache(loaded.model)
    try:
        return plan.new_cache(loaded.model, max_tokens=most_tokens)
    except UnsupportedModelError:  # recurrent layers, for one, have no pages to reserve
        return plan.new_cache(loaded.model)


def _account(loaded: Loaded, plan: CachePlan | None, cache: Any) -> str:
    """Say how many bytes the cache holds, against a 16-bit cache of the same tokens."""
    from kvbits.cli.output import size
    from kvbits.plan import CachePlan

    tokens = cache.get_seq_length()
    full = CachePlan.uniform(loaded.model.config, 16, 16).bytes_16bit(tokens)
    if plan is None:
        return f"cache: {tokens} tokens in {size(full)} at 16 bits, no plan"
    share = f"{full / cache.nbytes:.1f} times smaller than {size(full)} at 16 bits"
    bits = f"{plan.effective_bits_at(tokens):.2f} effective bits"
    return f"cache: {tokens} tokens in {size(cache.nbytes)}, {share}; {bits} at this length"
