"""NVIDIA Model Optimizer: FP8 and NVFP4, layer by layer, calibrated by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import yaml

from kvbits.export.base import Engine, Settings
from kvbits.export.formats import EXACT_SIDE, FP8_SIDE, NVFP4_SIDE, Format, SideFormat, both
from kvbits.plan import CachePlan

CONFIG, LAYERS = "modelopt_quant_cfg.yaml", "hf_quant_config.json"
QUANTIZERS = {"float8": {"num_bits": "e4m3"}, "nvfp4": {"num_bits": "e2m1"}}
NVFP4_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}  # JSON has no integer keys


class _WithoutAliases(yaml.SafeDumper):
    """Writes a value that occurs twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class ModelOpt(Engine):
    """A configuration for ``mtq.quantize``, and the layer map it exports."""

    name: ClassVar = "modelopt"
    checked: ClassVar = "Model Optimizer 0.47.0 and its main branch (layer map)"
    exact: ClassVar = both("none", EXACT_SIDE)
    formats: ClassVar = (
        both("FP8", FP8_SIDE),
        both("NVFP4", NVFP4_SIDE),
        Format("FP8_K_NVFP4_V", FP8_SIDE, NVFP4_SIDE),
    )
    reach: ClassVar = "layer"
    notes: ClassVar = (
        f"mtq.quantize(model, yaml.safe_load(open({CONFIG!r})), forward_loop) calibrates the "
        "scales",
        f"{LAYERS} is the layer map of releases after 0.47; without calibrated scales in the "
        "checkpoint an engine takes 1",
        "layers are named as Llama and Qwen name them: model.layers.N.self_attn",
    )

    def settings(self, formats: Sequence[Format], plan: CachePlan) -> Settings:
        packed = {i: formats[i] for i in plan.model.packable_layers if not formats[i].is_exact}
        config = yaml.dump(_quantizers(packed), Dumper=_WithoutAliases, sort_keys=False)
        layers = json.dumps(_layer_map(packed), indent=2) + "\n"
        return Settings(files={CONFIG: config, LAYERS: layers})


def _quantizers(packed: dict[int, Format]) -> dict[str, Any]:
    """Everything off, then both quantizers of every packed layer on."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for index, format in packed.items():
        for letter, side in (("k", format.key), ("v", format.value)):
            name = f"*layers.{index}.self_attn.{letter}_bmm_quantizer"
            entries.append({"quantizer_name": name, "cfg": _quantizer(side), "enable": True})
    return {"quant_cfg": entries, "algorithm": "max"}


def _quantizer(side: SideFormat) -> dict[str, Any]:
    blocks = {"block_sizes": NVFP4_BLOCKS} if side.family == "nvfp4" else {}
    return {**QUANTIZERS[side.family], **blocks}


def _layer_map(packed: dict[int, Format]) -> dict[str, Any]:
    names = {format.name for format in packed.values()}
    algorithm = None if not names else names.pop() if len(names) == 1 else "MIXED_PRECISION"
    layers = {f"model.layers.{i}.self_attn": {"quant_algo": f.name} for i, f in packed.items()}
    quantization = {
        "quant_algo": None,
        "kv_cache_quant_algo": algorithm,
        "kv_cache_quantized_layers": layers,
        "kv_cache_schema_version": 1,
    }
    return {"producer": {"name": "kvbits"}, "quantization": quantization}
