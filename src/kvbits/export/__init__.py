"""Plans in the terms of serving engines; what they cannot hold is said, layer by layer."""

from __future__ import annotations

from kvbits.export.base import Engine, Export, LayerChange, Settings
from kvbits.export.kvtuner import KVTuner
from kvbits.export.llama_cpp import LlamaCpp
from kvbits.export.lmdeploy import LMDeploy
from kvbits.export.modelopt import ModelOpt
from kvbits.export.sglang import Sglang
from kvbits.export.tensorrt_llm import TensorRTLLM
from kvbits.export.transformers import Transformers
from kvbits.export.vllm import Vllm
from kvbits.plan import CachePlan

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (
        Vllm,
        TensorRTLLM,
        Sglang,
        ModelOpt,
        LMDeploy,
        LlamaCpp,
        Transformers,
        KVTuner,
    )
}
"""Every engine, by name."""

__all__ = ["ENGINES", "Engine", "Export", "LayerChange", "Settings", "export_plan"]


def export_plan(plan: CachePlan, engine: str, *, allow_narrower: bool = False) -> Export:
    """Put a plan in the terms of an engine, by the nearest formats it has.

    Args:
        plan: The plan.
        engine: A key of ``ENGINES``.
        allow_narrower: Whether codes may be narrower than the plan's.

    Raises:
        ValueError: If there is no such engine.
        PlanError: If it cannot hold the model, or has no format that packs anything.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    return ENGINES[engine]().export(plan, allow_narrower=allow_narrower)
