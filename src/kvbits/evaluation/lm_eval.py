"""lm-evaluation-harness on packed caches: its tasks, its scoring, our cache.

The harness scores answers with one forward pass that never reads a cache back: with its own model
class, log-likelihoods are those of full precision whatever the cache. Here both paths go through
the plan: generation on a fresh cache each call, and log-likelihoods by teacher forcing in chunks,
as ``stream.py`` does it.

Importing this registers the model class ``kvbits`` with the harness.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvbits._version import __version__
from kvbits.evaluation.records import library_versions
from kvbits.evaluation.stream import (
    DEFAULT_CHUNK,
    attention_for,
    cache_nbytes,
    new_cache,
    stream_logits,
)
from kvbits.methods import Method, build_method
from kvbits.plan import CachePlan

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness must be installed to run its tasks; pip install 'kvbits[eval]'"
    ) from error


@register_model("kvbits")
class KVBitsLM(HFLM):  # type: ignore[misc]
    """The harness's transformers model on the cache of a plan.

    Args:
        pretrained: Model, folder or hub id, as for the harness's ``hf``.
        plan: The plan or its file; None, without a method too, is full precision.
        method: A published method in place of a plan: one that needs no calibration, or its name.
        bits: Width of keys and values, if the method is named and has a choice.
        quantize_prefill: Whether prompts of generation, too, see decoded states. Log-likelihoods
            always do: each query sees what one-token decoding would have shown it.
        chunk_tokens: Tokens of a forward pass of log-likelihoods; results do not depend on it.
        **settings: As for ``hf``: ``tokenizer``, ``batch_size``, ``device``, ``dtype``, ...

    Raises:
        ValueError: If plan and method are both given, the method needs calibration, or the model
            is not a decoder.
        PlanError: If the plan does not fit the model.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        plan: CachePlan | str | Path | None = None,
        method: Method | str | None = None,
        bits: int | None = None,
        quantize_prefill: bool = False,
        chunk_tokens: int = DEFAULT_CHUNK,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, **settings)
        if self.backend != "causal":
            raise ValueError(f"pretrained must be a causal language model, got {self.backend!r}")
        self.plan = _plan(self.model.config, plan, method, bits)
        self.quantize_prefill, self.chunk_tokens = quantize_prefill, chunk_tokens
        self.cache_bytes = 0  # of a call's cache, at most

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits ``[B, T, V]`` of ids ``[B, T]``, padded on the right, through the cache."""
        if self.plan is None:
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        cache = new_cache(self.model, self.plan)
        stream = stream_logits(
            self.model, inps, self.plan, chunk_tokens=self.chunk_tokens, cache=cache
        )
        with self._precision():
            logits = torch.cat(list(stream), dim=1)
        self._count(cache)
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate on a new cache; arguments as the harness's."""
        if self.plan is None:
            exact: torch.Tensor = super()._model_generate(*args, **kwargs)
            return exact
        cache = new_cache(self.model, self.plan, quantize_prefill=self.quantize_prefill)
        with attention_for(self.model, self.plan):
            made: torch.Tensor = super()._model_generate(*args, past_key_values=cache, **kwargs)
        self._count(cache)
        return made

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model: the harness's facts, and the plan."""
        info: dict[str, Any] = super().get_model_info()
        info["kvbits_version"] = __version__
        info["cache_plan"] = None if self.plan is None else self.plan.describe()
        info["effective_bits"] = 16.0 if self.plan is None else self.plan.effective_bits
        info["quantize_prefill"] = self.quantize_prefill
        return info

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        """The harness's mixed precision, as around its own calls."""
        dtype = self.mixed_precision_dtype
        made: contextlib.AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=dtype, enabled=dtype is not None
        )
        return made

    def _count(self, cache: Any) -> None:
        self.cache_bytes = max(self.cache_bytes, cache_nbytes(cache))


def evaluate(
    lm: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    manager: TaskManager | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Run tasks of the harness, with the record of every example.

    Args:
        lm: A model of the harness, such as ``KVBitsLM``.
        tasks: Names of tasks or groups, or patterns such as ``mmlu_*``.
        include_path: Folder with task files of your own.
        manager: What ``find_tasks`` returned, if the tasks were found before.
        seed: Seed of everything random, the choice of few-shot examples included.
        **settings: As for ``lm_eval.simple_evaluate``: ``num_fewshot``, ``limit``,
            ``apply_chat_template``, ``fewshot_as_multiturn``, ``gen_kwargs``, ...

    Raises:
        ValueError: If a task is unknown.
    """
    names = list(tasks)
    if manager is None:
        manager, names = find_tasks(tasks, include_path)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with _random_state():
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=manager,
            log_samples=True,
            **dict.fromkeys(seeds, seed),
            **settings,
        )
    return found


def versions(lm: KVBitsLM) -> dict[str, str]:
    """Versions that scores depend on, and what the model runs on."""
    place = {"device": lm.device.type, "dtype": str(lm.model.dtype).removeprefix("torch.")}
    harness = {"lm_eval": importlib.metadata.version("lm_eval")}
    return library_versions() | harness | place


def find_tasks(
    tasks: Sequence[str], include_path: str | Path | None = None
) -> tuple[TaskManager, list[str]]:
    """Find tasks by name or pattern, in a folder of your own first.

    Reading the harness's own tasks takes ten seconds, so it is done only where they are needed.

    Returns:
        The manager that knows them, and their names.

    Raises:
        ValueError: If one is unknown.
    """
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=folder)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"tasks must be known to lm-evaluation-harness or lie in include_path, got "
                f"{name!r}; `lm-eval ls tasks` lists them"
            )
    return manager, [found for name in tasks for found in sorted(manager.match_tasks([name]))]


def _plan(
    config: Any,
    plan: CachePlan | str | Path | None,
    method: Method | str | None,
    bits: int | None,
) -> CachePlan | None:
    """The plan that is asked for, checked against the model."""
    if method is not None:
        if plan is not None:
            raise ValueError("plan must be given without method, got both")
        widths = {} if bits is None else {"key_bits": bits, "value_bits": bits}
        built = build_method(method, **widths) if isinstance(method, str) else method
        if built.needs_data:
            raise ValueError(
                f"method must need no calibration here, got {built.name!r}; make its plan with "
                "kvbits calibrate and pass that"
            )
        return built.plan(config)
    if bits is not None:
        raise ValueError(f"bits must be given with a method, got {bits} without one")
    found = CachePlan.load(plan) if isinstance(plan, str | Path) else plan
    if found is not None:
        found.check(config)
    return found


@contextlib.contextmanager
def _random_state() -> Any:
    """Leave the caller's random states as they were; the harness seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
