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
    from transformers import DynamicCache, TextStreamer

    import kvbits
    from kvbits.cli.models import load_model

    cache_plan = _load_plan(plan)
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    loaded = load_model(model, device, dtype.value)
    ids = _encode(loaded, text, chat)
    torch.manual_seed(seed)
    if cache_plan is None:
        cache = DynamicCache(config=loaded.model.config)
    else:
        kvbits.enable(loaded.model)
        cache = cache_plan.new_cache(loaded.model)
    typer.echo(text, nl=False)
    started = time.perf_counter()
    output = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=None,
        top_k=None,
        pad_token_id=_pad_id(loaded),
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - started
    num_new = output.shape[1] - ids.shape[1]
    typer.echo(f"\n{_account(loaded, cache_plan, cache)}", err=True)
    typer.echo(f"{num_new} tokens in {seconds:.1f} s", err=True)


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


def _pad_id(loaded: Loaded) -> int | None:
    """Return a padding id, which generate wants to know even for one row."""
    for value in (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return None


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
