"""QAQ: as many bits as a target error asks for, more for what attention looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvbits.calibration.attention import Observed, observed_attention
from kvbits.calibration.placement import input_device
from kvbits.codecs import Affine, AnyCodec, Codebook, Outliers, Tiered
from kvbits.codecs.levels import normal_quantiles, on_grid
from kvbits.codecs.outliers import slots_for
from kvbits.codecs.tiered import PLANE_BITS
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan, Side
from kvbits.memory import head_dim
from kvbits.methods.base import Method, Progress
from kvbits.plan import CachePlan

Formula = Literal["paper", "code"]
Tier = Literal[2, 3, 4, 8]
QUERY_QUANTILE = 0.9
LEAST_ATTENTION = 1e-30  # of a token nobody looks at, which then may err without bound


class Needs(NamedTuple):
    """Bits each token of each head needs in one layer, ``[H_kv, tokens]``, per side."""

    key: Tensor
    value: Tensor


class Qaq(Method):
    """Widths for which keys and values err by no more than attention can bear.

    ``level`` is what shares a width: every ``layer``, every ``head``, or every ``token``. A layer
    or head takes the tier that is enough for ``satisfied_share`` of its tokens. Of tokens, as
    many in every tile of ``tile_tokens`` get each tier as need it on the calibration text: those
    of the largest range.

    ``key_error`` is the deviation of an attention score, ``value_error`` that of an attention
    output, that is allowed. ``formula`` is the ``paper``'s, or that of its released ``code``,
    which takes a bit less. ``levels``: ``uniform`` steps, or the quantiles of a ``normal``.
    """

    name: ClassVar = "qaq"
    source: ClassVar = "arXiv 2403.04643"
    calibration: ClassVar = "text, forwards"
    widths: ClassVar = "2, 3, 4, 8 by layer, head or token"
    differs: ClassVar = (
        "widths are fixed by calibration, not found again at every step; no copy stays in the CPU",
        "a value's attention is that of its token on the calibration text, not of later queries",
        "as many tokens of every tile get each width, those of the largest range",
        "levels span the range of a token from its least value, not its mean and deviation",
        "as many outliers for every token and head, an even number, in 24 bits each",
    )

    level: Literal["layer", "head", "token"] = "token"
    formula: Formula = "paper"
    levels: Literal["uniform", "normal"] = "uniform"
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1, strict=False)] = (2, 3, 4, 8)
    key_error: float = Field(default=1.0, gt=0)
    value_error: float = Field(default=0.1, gt=0)
    squared_query_norm: float | None = Field(default=None, gt=0)
    attention_window: int = Field(default=5, ge=1)
    satisfied_share: float = Field(default=0.9, gt=0, le=1)
    outlier_share: float = Field(default=0.01, ge=0, lt=0.5)
    tile_tokens: int = Field(default=64, ge=2, le=256)
    residual_length: int = Field(default=4, ge=0)
    sink_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_tiers(self) -> Qaq:
        if list(self.tiers) != sorted(set(self.tiers)):
            raise ValueError(f"tiers must ascend, got {self.tiers}")
        steps = {high - low for low, high in pairwise(self.tiers)}
        if self.level == "token" and not steps <= set(PLANE_BITS):
            raise ValueError(
                f"tiers must be 1, 2 or 4 bits apart when level='token', got {self.tiers}"
            )
        return self

    @property
    def needs_data(self) -> bool:
        return len(self.tiers) > 1

    def layer_plan(self, layer: LayerGeometry, config: Any) -> LayerPlan:
        widest = self._codec(self.tiers[-1])  # until it is known what is enough
        return self._plan_of((HeadGroup(key=widest, value=widest),), layer)

    def calibrate(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> CachePlan:
        start = self.plan(model.config)
        if not self.needs_data:
            return start
        found = self.needs(model, documents, progress)
        unseen = [i for i, each in enumerate(start.layers) if not each.is_exact and i not in found]
        if unseen:
            raise UnsupportedModelError(
                f"model must compute attention through transformers' interface, got none of layer "
                f"{unseen[0]}"
            )
        layers = [
            layer if layer.is_exact else self._fitted(found[index], start.model.layers[index])
            for index, layer in enumerate(start.layers)
        ]
        return CachePlan.from_layers(model.config, layers, start.provenance)

    def needs(
        self, model: Any, documents: Sequence[Tensor], progress: Progress | None = None
    ) -> dict[int, Needs]:
        """The bits that the formula asks for, by layer: what the paper would give every token.

        Not rounded to tiers. A code of these bits a token is not what is stored.

        Raises:
            CalibrationError: If no document is longer than what stays exact, or states are not
                finite.
        """
        least = self.sink_tokens + self.residual_length + 1
        usable = [document for document in documents if len(document) > least]
        if not usable:
            raise CalibrationError(
                f"documents must hold one of more than {least} tokens, sinks and residual, "
                "got none; give longer text"
            )
        found: dict[int, list[Needs]] = {}

        def observe(seen: Observed) -> None:
            found.setdefault(seen.layer_idx, []).append(self._needs(seen))

        for document in usable:
            with observed_attention(model, observe, num_queries=len(document)), torch.no_grad():
                model(document.to(input_device(model))[None], use_cache=False)
            if progress:
                progress()
        return {
            index: Needs(*(torch.cat(side, -1) for side in zip(*each, strict=True)))
            for index, each in found.items()
        }

    def _needs(self, seen: Observed) -> Needs:
        """Bits of the tokens of one document that would be packed."""
        seen.check()
        count = seen.key_states.shape[1]
        packed = slice(self.sink_tokens, count - self.residual_length)
        norm = self.squared_query_norm or _squared_norms(seen)
        window = slice(-self.attention_window, None)
        attention = seen._replace(query=seen.query[:, window], mask=seen.mask[window])
        weights = attention.weights(seen.key_states)  # [H_q, n, T]
        largest = weights.unflatten(0, (len(seen.key_states), -1)).amax((1, 2))  # [H_kv, T]
        deviations = (
            key_deviation(count, self.key_error, norm),
            value_deviation(count, self.value_error, largest[:, packed]),
        )
        key, value = (
            bits_needed(self._ranges(states[:, packed]), deviation, self.formula).cpu()
            for states, deviation in zip(
                (seen.key_states, seen.value_states), deviations, strict=True
            )
        )
        return Needs(key, value)

    def _ranges(self, states: Tensor) -> Tensor:
        """Range of every token ``[H_kv, T]`` once its outliers are apart."""
        rest = states[None].float()
        if self.outlier_share:
            rest, _, _ = self._apart(self._codec(8), rest.shape[-1]).parted(rest)
        low, high = rest[0].aminmax(dim=-1)
        return high - low

    def _fitted(self, needs: Needs, layer: LayerGeometry) -> LayerPlan:
        if self.level == "token":
            key, value = (self._by_token(bits) for bits in needs)
            return self._plan_of((HeadGroup(key=key, value=value),), layer)
        if self.level == "layer":
            needs = Needs(*(bits.flatten()[None] for bits in needs))
        pairs = list(zip(*(self._enough(bits) for bits in needs), strict=True))
        heads_of = {
            pair: tuple(head for head, own in enumerate(pairs) if own == pair)
            for pair in sorted(set(pairs))
        }
        groups = tuple(
            HeadGroup(
                heads=heads if len(heads_of) > 1 else None,
                key=self._codec(key_bits),
                value=self._codec(value_bits),
            )
            for (key_bits, value_bits), heads in heads_of.items()
        )
        return self._plan_of(groups, layer)

    def _enough(self, bits: Tensor) -> list[Tier]:
        """Per head, the tier that is enough for the share of its tokens."""
        wanted = bits.double().quantile(self.satisfied_share, dim=-1, interpolation="higher")
        return [
            next((tier for tier in self.tiers if tier >= need), self.tiers[-1])
            for need in wanted.tolist()
        ]

    def _by_token(self, bits: Tensor) -> AnyCodec:
        """A tile with as many tokens of each tier as need it."""
        return self._tiered([float((bits > tier).double().mean()) for tier in self.tiers[:-1]])

    def _tiered(self, shares: Sequence[float]) -> AnyCodec:
        """Tiles in which the given shares of the tokens need more than each tier but the last."""
        counts = [round(share * self.tile_tokens) for share in shares]
        first = sum(count == self.tile_tokens for count in counts)  # no token is that narrow
        last = first + sum(0 < count < self.tile_tokens for count in counts)
        codecs = [self._codec(tier) for tier in self.tiers[first : last + 1]]
        if len(codecs) == 1:
            return codecs[0]
        return Tiered.model_validate(
            {
                "codecs": tuple(codecs),
                "num_wide": tuple(counts[first:last]),
                "tile_tokens": self.tile_tokens,
            }
        )

    def _codec(self, bits: int) -> Affine | Codebook:
        if self.levels == "uniform":
            return Affine(bits=bits)
        return Codebook(levels=on_grid(normal_quantiles(bits)))

    def _apart(self, codec: AnyCodec, width: int) -> Outliers:
        return Outliers(inner=codec, slots=slots_for(self.outlier_share, width))

    def _plan_of(self, groups: Sequence[HeadGroup], layer: LayerGeometry) -> LayerPlan:
        """The plan of a layer, outliers apart."""
        if self.outlier_share:
            widths: dict[Side, int] = {side: head_dim(layer, side) for side in SIDES}
            groups = [
                HeadGroup(
                    heads=group.heads,
                    key=self._apart(group.key, widths["key"]),
                    value=self._apart(group.value, widths["value"]),
                )
                for group in groups
            ]
        return LayerPlan(
            groups=tuple(groups),
            sink_tokens=self.sink_tokens,
            residual_length=self.residual_length,
        )


def key_deviation(num_tokens: int, error: float, squared_query_norm: Tensor | float) -> Tensor:
    """Standard deviation that keys may err by: ``sqrt(ln(T^3 / (T-1) * error^2 + 1) / |q|^2)``.

    Errors of logits are normal, so those of their exponentials are log-normal.

    Args:
        num_tokens: T, at least 2.
        error: Allowed standard deviation of an attention score.
        squared_query_norm: ``[H_kv]`` or one for all; its unit is that of a squared query.

    Returns:
        ``[H_kv, 1]``, or ``[1]``.
    """
    variance = math.log(num_tokens**3 / (num_tokens - 1) * error**2 + 1)
    return (variance / torch.as_tensor(squared_query_norm).double()).sqrt()[..., None]


def value_deviation(num_tokens: int, error: float, attention: Tensor) -> Tensor:
    """Standard deviation that values may err by: ``error / (sqrt(T) * attention)``.

    Every token contributes the same share of the error of an attention output.

    Args:
        num_tokens: T.
        error: Allowed standard deviation of an attention output.
        attention: Largest weight of every token over recent queries, ``[H_kv, T]``.
    """
    return error / (math.sqrt(num_tokens) * attention.double().clamp_min(LEAST_ATTENTION))


def bits_needed(ranges: Tensor, deviation: Tensor, formula: Formula) -> Tensor:
    """Bits with which steps over a range err by at most a deviation; 0 where one step does.

    The error of a step is uniform, so of deviation ``step / sqrt(12)``. ``paper``:
    ``ceil(log2(range / (2 sqrt(3) deviation)))``. ``code``: ``ceil(log2(range / (2 w) + 1))`` with
    ``w = sqrt(12) * deviation``.

    Source: QAQ (arXiv 2403.04643) section 3; the code is its released one.
    """
    step = math.sqrt(12) * deviation.to(ranges.device)
    ratio = ranges.double() / step if formula == "paper" else ranges.double() / (2 * step) + 1
    return ratio.log2().ceil().clamp(min=0)


def _squared_norms(seen: Observed) -> Tensor:
    """90th percentile of the squared norms of the queries of each key/value head, ``[H_kv]``."""
    norms = seen.query.double().square().sum(-1)  # [H_q, T]
    grouped = norms.unflatten(0, (len(seen.key_states), -1)).flatten(1)
    return grouped.quantile(QUERY_QUANTILE, dim=-1)
