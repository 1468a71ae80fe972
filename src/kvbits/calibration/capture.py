"""States of a model on a few documents, what its loss makes of each, and what asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from kvbits.attention.hf import packed_attention, packed_mask
from kvbits.calibration.attention import attending_by, check_finite
from kvbits.calibration.placement import input_device
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.layer_plan import SIDES, Side


class Observation(NamedTuple):
    """One side of one layer over one document, as it enters the cache.

    Attributes:
        states: ``[1, H_kv, T, D]``.
        gradients: Of the summed cross-entropy with respect to the states, like them; None if they
            were not asked for.
        queries: ``[1, H_q, T, D]`` as they meet the keys of the layer, with its keys; None if they
            were not asked for.
    """

    states: Tensor
    gradients: Tensor | None
    queries: Tensor | None = None


Observations = dict[tuple[int, Side], Observation]


def observe(
    model: Any,
    documents: Sequence[Tensor],
    *,
    with_gradients: bool,
    with_queries: bool = False,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Observations]:
    """Run the model over documents one by one, and hand out the states of every layer and side.

    Gradients are taken with respect to states alone, not to weights, and nothing is kept from one
    document to the next.

    Args:
        model: A causal language model of transformers.
        documents: Token ids ``[T]`` each.
        with_gradients: Whether to run the model backwards too.
        with_queries: Whether to hand out queries too.
        loss: What gradients are of, given logits ``[T, V]``; by default the summed cross-entropy
            of the document's own next tokens.

    Raises:
        CalibrationError: If there is no document of two tokens, or what is seen is not finite.
        UnsupportedModelError: If what was asked for does not pass where it can be seen.
    """
    usable = [document for document in documents if len(document) > 1]
    if not usable:
        raise CalibrationError("documents must hold one of at least 2 tokens, got none")
    with _frozen(model):
        for document in usable:
            ids = document.to(input_device(model))[None]
            tap = _Tap(model.config, with_gradients)
            watched: AbstractContextManager[None] = nullcontext()
            if with_queries:
                watched = attending_by(model, tap.attend, packed_mask)
            with torch.set_grad_enabled(with_gradients), watched:
                logits = model(ids, past_key_values=tap, use_cache=True).logits
            if not tap.has_states:
                raise UnsupportedModelError(
                    "model must pass keys and values through its cache, got none of either"
                )
            if with_queries and not tap.queries:
                raise UnsupportedModelError(
                    "model must attend by transformers' attention interface for its queries to be "
                    "seen, got none"
                )
            tap.check()
            if not logits.isfinite().all():
                raise CalibrationError(
                    "logits must be finite, got NaN or infinity; check the model's weights and "
                    "dtype"
                )
            if with_gradients:
                with torch.enable_grad():
                    # The sum: a mean would make gradients of short documents larger.
                    tap.differentiate(
                        torch.nn.functional.cross_entropy(
                            logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum"
                        )
                        if loss is None
                        else loss(logits[0])
                    )
            yield tap.observations()


class _Tap(DynamicCache):  # type: ignore[misc]
    """A cache that keeps what passes through it, with a zero added that gradients arrive at."""

    def __init__(self, config: Any, with_gradients: bool) -> None:
        super().__init__(config=config)
        self._with_gradients = with_gradients
        self._states: dict[tuple[int, Side], Tensor] = {}
        self._zeros: dict[tuple[int, Side], Tensor] = {}
        self._gradients: dict[tuple[int, Side], Tensor] = {}
        self.queries: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        passed = []
        for side, states in zip(SIDES, (key_states, value_states), strict=True):
            self._states[layer_idx, side] = states.detach()
            if self._with_gradients:
                zero = torch.zeros_like(states, requires_grad=True)
                self._zeros[layer_idx, side] = zero
                states = states + zero
            passed.append(states)
        return passed[0], passed[1]

    def attend(self, module: torch.nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep a layer's queries and attend as usual."""
        self.queries[int(module.layer_idx)] = query.detach()  # type: ignore[arg-type]
        return packed_attention(module, query, *args, **kwargs)

    @property
    def has_states(self) -> bool:
        """Whether anything passed."""
        return bool(self._states)

    def check(self) -> None:
        """Raise ``CalibrationError`` if NaN or infinity passed, naming the first layer of it."""
        for (layer_idx, side), states in self._states.items():
            check_finite(f"{side}_states", states, layer_idx)
        for layer_idx, queries in self.queries.items():
            check_finite("queries", queries, layer_idx)

    def differentiate(self, loss: Tensor) -> None:
        """Find the gradient of ``loss`` with respect to all states."""
        found = torch.autograd.grad(loss, list(self._zeros.values()))
        self._gradients = dict(zip(self._zeros, found, strict=True))
        for (layer_idx, side), gradients in self._gradients.items():
            check_finite(f"gradients of {side}_states", gradients, layer_idx)

    def observations(self) -> Observations:
        """What was seen."""
        return {
            (layer_idx, side): Observation(
                states,
                self._gradients.get((layer_idx, side)),
                self.queries.get(layer_idx) if side == "key" else None,
            )
            for (layer_idx, side), states in self._states.items()
        }


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Keep the weights out of the graph, and dropout and checkpointing off."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
