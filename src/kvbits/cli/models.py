"""Finding and loading a model: a folder, or a Hugging Face id, never a silent download."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import typer


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str


def load_config(name: str) -> Any:
    """Read a model's config.

    Raises:
        ValueError: there is no such model, or it cannot be fetched.
    """
    from transformers import AutoConfig

    return _fetch(AutoConfig.from_pretrained, name)


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder with ``config.json``, or a Hugging Face id.
        device: a torch device; ``auto`` is the first GPU if there is one, ``sharded`` all of
            them, and the host's memory and disk for what does not fit.
        dtype: ``auto`` is float32 on the CPU, where it is faster and loses nothing of a 16-bit
            checkpoint, and the checkpoint's own elsewhere.

    Raises:
        ValueError: there is no such model, or the device does not exist.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as model_logging

    model_logging.set_verbosity_error()
    model_logging.disable_progress_bar()
    is_sharded = device == "sharded"
    if is_sharded:
        _check_accelerate()
    place = resolve_device("auto" if is_sharded else device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer = _fetch(AutoTokenizer.from_pretrained, name)
    spread = {"device_map": "auto"} if is_sharded else {}
    model = _fetch(AutoModelForCausalLM.from_pretrained, name, dtype=kind, **spread)
    return Loaded((model if is_sharded else model.to(place)).eval(), tokenizer, name)


def _check_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise ValueError(
            "device sharded must be used with the package accelerate, got none; "
            "pip install 'kvbits[sharded]'"
        )


def load_pair(device: str, *, name: str, dtype: str) -> tuple[Any, Any]:
    """Load model and tokenizer as above, for workers, which know of a device and no more."""
    loaded = load_model(name, device, dtype)
    return loaded.model, loaded.tokenizer


def devices_of(workers: int, name: str) -> list[str]:
    """Return a device for each of several workers: all GPUs in turn unless one is named."""
    import torch

    count = torch.cuda.device_count() if name in ("auto", "cuda") and workers > 1 else 0
    return [f"cuda:{index % count}" if count else name for index in range(workers)]


def resolve_device(name: str) -> Any:
    """The device a name stands for, once torch has shown that it can use it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device must be one torch can use here, got {name!r}: {reason}"
        ) from error


def _fetch(load: Any, name: str, **settings: Any) -> Any:
    """Load from a folder or the local Hugging Face cache; say so before going to the network."""
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.CRITICAL)  # a failure becomes one line, below
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"MODEL must be a folder with config.json, got {name}")
        return _translated(load, name, settings)
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"MODEL must be an existing model folder or a hub id, got {name!r}")
    try:
        return load(name, local_files_only=True, **settings)
    except (OSError, ValueError):
        if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
            raise ValueError(
                f"MODEL must be a folder or a downloaded hub id while HF_HUB_OFFLINE is set, "
                f"got {name!r}"
            ) from None
    typer.echo(f"{name} is not a folder here; fetching it from the Hugging Face hub", err=True)
    return _translated(load, name, settings)


def _translated(load: Any, name: str, settings: dict[str, Any]) -> Any:
    try:
        return load(name, **settings)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"MODEL must be a loadable model, got {name!r}: {reason}") from error
