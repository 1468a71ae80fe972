"""CachePlan: the codecs of every layer of one model, as a strict and versioned JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from kvbits import memory
from kvbits._version import __version__
from kvbits.codecs.arrays import CONTEXT, by_name
from kvbits.codecs.base import Width
from kvbits.errors import PlanError
from kvbits.geometry import ModelGeometry, num_cache_layers
from kvbits.layer_plan import LayerPlan
from kvbits.plan import arrays, files, fitting, hub, kvtuner, loading, modes, summary
from kvbits.plan.modes import EXACT_BITS, Mode, Pair, Settings
from kvbits.plan.provenance import Metric, Provenance

if TYPE_CHECKING:
    from kvbits.attention.api import Impl
    from kvbits.cache.hf import QuantizedCache

FORMAT: Literal["kvbits-cache-plan"] = "kvbits-cache-plan"
SCHEMA_VERSION: Literal[1] = 1


class CachePlan(BaseModel):
    """How the cache of one model is stored, layer by layer; immutable.

    Make one with ``uniform``, ``from_pairs`` or ``load``; use it with ``new_cache``.

    Args:
        model: Geometry of the model the plan is for.
        fingerprint: Fingerprint of that geometry; computed if left out.
        model_id: Name of the model, for people.
        layers: One layer plan per layer of the model.
        kvbits_version: Version that wrote the plan.
        provenance: How the plan was made.
        metrics: What was measured with it.

    Raises:
        PlanError: If the layer plans do not fit the geometry.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, protected_namespaces=()
    )

    format: Literal["kvbits-cache-plan"] = FORMAT
    schema_version: Literal[1] = SCHEMA_VERSION
    kvbits_version: str = __version__
    model_id: str | None = None
    model: ModelGeometry
    fingerprint: str = Field(default_factory=lambda data: data["model"].fingerprint)
    layers: tuple[LayerPlan, ...] = Field(min_length=1)
    provenance: Provenance | None = None
    metrics: tuple[Metric, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        # PlanError is no ValueError, so pydantic lets it through as it is.
        if self.fingerprint != self.model.fingerprint:
            raise PlanError(
                f"fingerprint must match the model section, {self.model.fingerprint[:12]}..., "
                f"got {loading.shorten(self.fingerprint)}; the file was edited by hand"
            )
        fitting.check_layers(self.layers, self.model)
        _ = self.arrays  # raises where two of one name differ
        return self

    # ----- making plans

    @classmethod
    def uniform(
        cls,
        config: Any,
        key_bits: int,
        value_bits: int,
        mode: Mode = "per_token",
        **settings: Unpack[Settings],
    ) -> CachePlan:
        """Give every packable layer one pair of widths; other layers keep the stock cache.

        Args:
            config: Transformers config, or a ``ModelGeometry``.
            key_bits: 2, 3, 4, 8 or 16.
            value_bits: 2, 3, 4, 8 or 16.
            mode: ``per_token`` or ``kivi``.
            **settings: What to change about the mode; see ``Settings``.

        Raises:
            ValueError: If a width or a setting is out of range.
            PlanError: If the codecs do not suit the model's head dimensions.
        """
        model = _geometry(config)
        exact = (EXACT_BITS, EXACT_BITS)
        pairs = [(key_bits, value_bits) if layer.is_packable else exact for layer in model.layers]
        plan = cls.from_pairs(config, pairs, mode, **settings)
        return plan.with_provenance(Provenance(method="uniform", mode=mode))

    @classmethod
    def from_pairs(
        cls,
        config: Any,
        pairs: Iterable[Sequence[int]],
        mode: Mode = "per_token",
        **settings: Unpack[Settings],
    ) -> CachePlan:
        """Make a plan from one ``(key_bits, value_bits)`` per layer; (16, 16) is the stock layer.

        Args:
            config: Transformers config, or a ``ModelGeometry``.
            pairs: One pair per layer of the model, in order.
            mode: ``per_token`` or ``kivi``.
            **settings: What to change about the mode; see ``Settings``.

        Raises:
            ValueError: If a width or a setting is out of range.
            PlanError: If the number of pairs or a packed layer does not fit the model.
        """
        each = [[modes.as_pair(pair)] for pair in pairs]
        plan = cls._from_head_pairs(config, each, mode, settings)
        return plan.with_provenance(Provenance(method="pairs", mode=mode))

    @classmethod
    def from_layers(
        cls, config: Any, layers: Iterable[LayerPlan], provenance: Provenance | None = None
    ) -> CachePlan:
        """Make a plan from one layer plan per layer of the model.

        Args:
            config: Transformers config, or a ``ModelGeometry``.
            layers: In order.
            provenance: How they were chosen.

        Raises:
            PlanError: If a layer plan does not suit its layer.
        """
        model, model_id = _geometry(config), _model_id(config)
        return cls(model=model, model_id=model_id, layers=tuple(layers), provenance=provenance)

    @classmethod
    def from_kvtuner_yaml(
        cls, path: str | Path, config: Any, *, mode: Mode, **settings: Unpack[Settings]
    ) -> CachePlan:
        """Import a KVTuner file: per layer, or per layer and head, ``nbits_key``/``nbits_value``.

        The file does not say which mode it was tuned for, so ``mode`` must be given. Layers that
        cannot be packed may be left out of the file.

        Args:
            path: The YAML file.
            config: Transformers config, or a ``ModelGeometry``.
            mode: ``per_token`` or ``kivi``, as in the file's name.
            **settings: What to change about the mode; see ``Settings``.

        Raises:
            PlanError: If the file is malformed or does not fit the model.
        """
        head_pairs = kvtuner.read(Path(path), _geometry(config))
        plan = cls._from_head_pairs(config, head_pairs, mode, settings)
        return plan.with_provenance(Provenance(method="kvtuner", mode=mode))

    @classmethod
    def _from_head_pairs(
        cls, config: Any, head_pairs: Sequence[Sequence[Pair]], mode: Mode, settings: Settings
    ) -> CachePlan:
        """Build a plan from the pairs of each layer: one for all heads, or one per head."""
        model = _geometry(config)
        modes.check_mode(mode)
        modes.check_settings(settings)
        if len(head_pairs) != len(model.layers):
            raise PlanError(
                f"pairs must have one entry for each of the {len(model.layers)} layers of the "
                f"model, got {len(head_pairs)}"
            )
        try:
            layers = tuple(
                modes.layer_plan(layer, pairs, mode, settings)
                for layer, pairs in zip(model.layers, head_pairs, strict=True)
            )
        except ValidationError as error:
            raise ValueError(loading.one_sentence(error)) from None
        return cls.from_layers(config, layers)

    def with_provenance(self, provenance: Provenance) -> CachePlan:
        """The same plan with another account of how it was made."""
        return self.model_copy(update={"provenance": provenance})

    def with_metrics(self, metrics: Iterable[Metric]) -> CachePlan:
        """The same plan with other measured numbers."""
        return self.model_copy(update={"metrics": tuple(metrics)})

    # ----- files

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and what its codecs were fitted with to a file beside it.

        A reader sees the old plan with its arrays or the new one, never a part. Arrays of a plan
        that is replaced stay where they are: another plan may name them.
        """
        path, tensors = Path(path), self.arrays
        data = json.loads(self.model_dump_json())
        if tensors:
            data[arrays.FIELD] = arrays.write(path.parent, tensors).model_dump()
        files.write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CachePlan:
        """Read a plan file.

        Raises:
            PlanError: If the file is not a valid plan; one sentence says where and why.
        """
        path = Path(path)
        return cls.from_json(files.read_text(path), source=str(path), folder=path.parent)

    @classmethod
    def from_json(
        cls, text: str, *, source: str = "text", folder: str | Path | None = None
    ) -> CachePlan:
        """Parse the JSON of a plan strictly.

        Args:
            text: The JSON.
            source: Names it in messages.
            folder: Where the file of its arrays lies, if it has one.

        Raises:
            PlanError: As ``load``.
        """
        data = loading.parse_object(text, source)
        loading.check_header(data, FORMAT, SCHEMA_VERSION, source)
        record = data.pop(arrays.FIELD, None)
        found = arrays.read(record, None if folder is None else Path(folder))
        try:
            plan = cls.model_validate_json(json.dumps(data), context={CONTEXT: found})
        except ValidationError as error:
            raise PlanError(loading.one_sentence(error)) from None
        arrays.check_all_used(found)
        return plan

    def to_kvtuner_yaml(self, path: str | Path) -> None:
        """Write the widths as a KVTuner file; the mode, groups and windows are not in it.

        Raises:
            PlanError: If a layer keeps a side exact, which KVTuner cannot express.
        """
        mode = self.provenance.mode if self.provenance else None
        files.write_text(Path(path), kvtuner.write(self.layers, self.model, mode))

    # ----- the Hugging Face hub

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Commit ``plan.json`` and a generated card, ``README.md``, to a model repository.

        Args:
            repo_id: ``owner/name``; the repository is made if it does not exist.
            private: Whether a new repository is private; None is the account's default.
            token: Access token; None is the one of ``hf auth login``.
            endpoint: Server to use in place of ``HF_ENDPOINT``, or of the hub itself.

        Returns:
            Address of the commit.

        Raises:
            PlanError: If the hub refuses or cannot be reached.
        """
        return hub.push(self, repo_id, private=private, token=token, endpoint=endpoint)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> CachePlan:
        """Read the plan of a repository, as strictly as ``load``.

        Args:
            repo_id: ``owner/name``.
            revision: Branch, tag or commit; name a commit to get the same plan every time.
            token: As for ``push_to_hub``.
            endpoint: As for ``push_to_hub``.

        Raises:
            PlanError: If it cannot be fetched, or is not a valid plan.
        """
        with TemporaryDirectory() as folder:
            fetched = hub.pull(
                repo_id, Path(folder), revision=revision, token=token, endpoint=endpoint
            )
            return cls.load(fetched)

    # ----- use

    def check(self, config: Any) -> None:
        """Refuse a model this plan was not made for.

        Raises:
            PlanError: With the first thing that differs.
        """
        fitting.check_same_geometry(self.model, _geometry(config))

    def new_cache(
        self,
        model: Any,
        *,
        quantize_prefill: bool = False,
        impl: Impl = "auto",
        max_tokens: int | None = None,
    ) -> QuantizedCache:
        """Make an empty cache for ``model``, to pass as ``past_key_values``.

        Args:
            model: A transformers model.
            quantize_prefill: Whether each query of a multi-token forward sees decoded states for
                what one-token decoding would have packed by then; needs ``kvbits.enable(model)``.
            impl: ``auto`` appends and attends by kernels where they can run (a CUDA device,
                16-bit states, a layout they read) and by plain PyTorch elsewhere; ``triton``
                refuses the latter, ``reference`` the former. ``compiled`` attends by
                ``torch.compile``: many times faster on a CPU, once each layout has been compiled.
            max_tokens: Reserve room for this many tokens a row, padding included, so that decoding
                allocates nothing and can be captured in a CUDA graph.

        Raises:
            PlanError: If the plan was made for another geometry.
            UnsupportedModelError: If room cannot be reserved for a layer of the model.
        """
        from kvbits.cache.hf import QuantizedCache, watch_padding

        self.check(model.config)
        watch_padding(model)
        layers = self.layers[: num_cache_layers(model.config)]
        return QuantizedCache(
            layers,
            model.config,
            quantize_prefill=quantize_prefill,
            impl=impl,
            max_tokens=max_tokens,
        )

    # ----- what it costs

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What codecs were fitted with, by name; a file beside the plan holds it.

        Raises:
            PlanError: If two arrays of one name differ.
        """
        try:
            return by_name(array for layer in self.layers for array in layer.arrays)
        except ValueError as error:
            raise PlanError(str(error)) from None

    @property
    def array_bytes(self) -> int:
        """Bytes of ``arrays``: once for a model, however many caches and tokens there are."""
        return sum(tensor.nbytes for tensor in self.arrays.values())

    @property
    def pairs(self) -> list[tuple[Width, Width]]:
        """``(key_bits, value_bits)`` of every layer.

        Raises:
            PlanError: If heads of one layer differ.
        """
        for index, layer in enumerate(self.layers):
            if len(layer.groups) > 1:
                raise PlanError(
                    f"layers[{index}] must have one head group to be written as a pair, "
                    f"got {len(layer.groups)}"
                )
        return [(layer.groups[0].key.bits, layer.groups[0].value.bits) for layer in self.layers]

    @property
    def effective_bits(self) -> float:
        """Stored bits per value of packable layers at long context, metadata included."""
        layers = [(p, g) for p, g in zip(self.layers, self.model.layers, strict=True)]
        packable = [(plan, layer) for plan, layer in layers if layer.is_packable]
        if not packable:
            return float(EXACT_BITS)
        stored = sum(memory.stored_bits_per_token(plan, layer) for plan, layer in packable)
        return float(stored / sum(layer.values_per_token for _, layer in packable))

    def effective_bits_at(self, context: int, batch: int = 1) -> float:
        """Allocated bits per value of packable layers: residual, sinks and pages included.

        Args:
            context: Cached tokens per row.
            batch: Rows.
        """
        _check_size(context, batch)
        indices = self.model.packable_layers
        if not indices:
            return float(EXACT_BITS)
        stored = sum(self._layer_bytes(index, context, batch, EXACT_BITS) for index in indices)
        values = sum(self.model.layers[index].values_per_token for index in indices)
        return 8 * stored / (values * context * batch)

    def bytes(
        self,
        context: int,
        batch: int = 1,
        *,
        state_bits: int = 16,
        max_tokens: int | None = None,
    ) -> int:
        """Bytes ``new_cache(model).nbytes`` reports once every row holds ``context`` tokens.

        Args:
            context: Cached tokens per row.
            batch: Rows.
            state_bits: Width of the model's dtype: 16, or 32 for a float32 model.
            max_tokens: As given to ``new_cache``.
        """
        _check_size(context, batch)
        every = zip(self.layers, self.model.layers, strict=True)
        return sum(
            memory.layer_bytes(plan, layer, context, batch, state_bits, max_tokens)
            for plan, layer in every
        )

    def bytes_16bit(self, context: int, batch: int = 1) -> int:
        """Bytes the stock cache of a 16-bit model holds for the same tokens."""
        _check_size(context, batch)
        return sum(memory.exact_bytes(layer, context, batch) for layer in self.model.layers)

    def _layer_bytes(self, index: int, context: int, batch: int, state_bits: int) -> int:
        plan, layer = self.layers[index], self.model.layers[index]
        return memory.layer_bytes(plan, layer, context, batch, state_bits)

    # ----- for people

    def describe(self) -> str:
        """One line such as ``K8V4 0-3; K4V2 4-11; 4.12 effective bits``."""
        bits = f"{self.effective_bits:.2f} effective bits"
        return "; ".join([*summary.layer_parts(self.layers, self.model), bits])

    def __str__(self) -> str:
        return self.describe()


def _geometry(config: Any) -> ModelGeometry:
    return config if isinstance(config, ModelGeometry) else ModelGeometry.from_config(config)


def _model_id(config: Any) -> str | None:
    """The model's name; of a local folder only the last part, so that no paths are published."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    return Path(name).resolve().name if Path(name).exists() else str(name)


def _check_size(context: int, batch: int) -> None:
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
