"""One layer's packed cache: ``[ sinks, exact | packed | residual, exact ]``, append-only.

Knows no transformers. Every position is counted per batch row from its first real token, so left
padding is never encoded and a row of a batch stores the very bytes it would store alone. How much
of a row is packed is a pure function of its length (``LayerPlan.packed_lengths``), which makes a
chunked append equal one append.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbits.attention.api import KERNEL_IMPLS, Impl, resolve_impl
from kvbits.attention.states import LayerStates, SideStates, StepStates, store_groups
from kvbits.attention.triton.support import is_writable
from kvbits.cache.side import SideStorage, below
from kvbits.cache.stepping import Clocks, Stepper
from kvbits.codecs.affine import round_down
from kvbits.codecs.pages import PageStore
from kvbits.errors import CalibrationError
from kvbits.layer_plan import SIDES, IntArray, LayerPlan, Side


class PackedLayer:
    """Sinks, packed pages and residual of one layer.

    Args:
        plan: How the layer is stored.
        layer_idx: Index in the model, for messages.
        quantize_prefill: Whether a query of a multi-token update sees decoded states for what
            would be packed by its step, as one-token decoding does, instead of the exact states of
            the chunk it arrived in.
        impl: See ``CachePlan.new_cache``.
        max_tokens: Reserve pages for this many tokens a row when the first arrive.
        clocks: Counters of tokens, shared by the layers of a cache.
    """

    def __init__(
        self,
        plan: LayerPlan,
        *,
        layer_idx: int = 0,
        quantize_prefill: bool = False,
        impl: Impl = "auto",
        max_tokens: int | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        self.plan = plan
        self.layer_idx = layer_idx
        self.quantize_prefill = quantize_prefill
        self.requested_impl: Impl = impl
        self._encodes_by_kernels = False
        self.impl: Impl = impl  # "reference" once states have shown that no kernel takes them
        self.max_tokens = max_tokens
        self.clocks = clocks or Clocks()
        self.num_tokens = 0  # per row, left padding included
        self.num_reencoded_tokens = 0
        self.peak_nbytes = 0
        self.is_recording = False
        self._padding: list[int] = []
        self._sides: dict[Side, SideStorage] = {}
        self._nonfinite: Tensor | None = None
        self._stepper: Stepper | None = None

    def renewed(self) -> PackedLayer:
        """An empty layer with the same settings."""
        return PackedLayer(
            self.plan,
            layer_idx=self.layer_idx,
            quantize_prefill=self.quantize_prefill,
            impl=self.requested_impl,
            max_tokens=self.max_tokens,
            clocks=self.clocks,
        )

    # ----- what it holds

    @property
    def is_initialized(self) -> bool:
        """Whether states have arrived."""
        return bool(self._sides)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for states and page tables."""
        self.check_finite()
        return sum(side.nbytes for side in self._sides.values())

    @property
    def padding(self) -> Sequence[int]:
        """Left padding of every row."""
        return tuple(self._padding)

    def packed_lengths(self, side: Side) -> IntArray:
        """Packed tokens of every row on one side."""
        self._count_steps()
        return self._sides[side].packed

    def stores(self, side: Side) -> list[PageStore]:
        """The page stores of one side, one per head group."""
        self._count_steps()
        return [store for store, _ in self._sides[side].stores]

    def states(self) -> LayerStates:
        """The states as one more query would see them."""
        self._count_steps()
        return self._view(self._tails(), self._bounds_now(1))

    def set_padding(self, padding: Sequence[int]) -> None:
        """Declare the left padding of every row, in tokens; before the padded tokens arrive.

        Raises:
            ValueError: If padding changes under tokens that are stored. A row that has had nothing
                but padding may still get more.
        """
        if self.is_initialized and not self._may_become(padding):
            raise ValueError(
                f"padding must not change once tokens are stored, got {list(padding)} after "
                f"{self._padding}; start a new cache"
            )
        self._end_steps()
        self._padding = list(padding)

    def _may_become(self, padding: Sequence[int]) -> bool:
        return len(padding) == len(self._padding) and all(
            new == old or min(new, old) >= self.num_tokens
            for new, old in zip(padding, self._padding, strict=True)
        )

    # ----- appending

    def update(self, key_states: Tensor, value_states: Tensor) -> LayerStates | StepStates:
        """Append ``[B, H_kv, Q, D]`` and return what attention of these Q queries sees.

        Raises:
            ValueError: If shapes do not match the plan or the stored states.
            CalibrationError: If states are not finite; nothing is stored then.
        """
        new: dict[Side, Tensor] = {"key": key_states, "value": value_states}
        if not self.is_initialized:
            self._initialize(new)
        num_queries = key_states.shape[-2]
        self._check_shapes(new)
        if num_queries == 1 and self._may_step():
            return self._step(key_states, value_states)
        self._end_steps()
        self._check_new(new)
        tails = {
            side: torch.cat((tail, new[side].detach()), -2) for side, tail in self._tails().items()
        }
        self.num_tokens += num_queries
        self._fill_sinks(tails, num_queries)
        if num_queries == 1:  # it sees all that is packed decoded, by its own step too
            return self._view(self._flush(tails), self._bounds_now(1))
        see = self._bounds_by_query if self.quantize_prefill else self._bounds_now
        view = self._view(tails, see(num_queries))
        self._flush(tails)
        return view

    def _initialize(self, new: dict[Side, Tensor]) -> None:
        batch, num_heads = new["key"].shape[:2]
        named = self.plan.num_grouped_heads
        if named is not None and named != num_heads:
            raise ValueError(
                f"key_states must have the {named} heads that layer {self.layer_idx} of the plan "
                f"names, got {num_heads}; rebuild the plan for this model"
            )
        if not self._padding:
            self._padding = [0] * batch
        self.impl = resolve_impl(
            self.requested_impl,
            self.plan,
            key_head_dim=new["key"].shape[-1],
            value_head_dim=new["value"].shape[-1],
            dtype=new["key"].dtype,
            device=new["key"].device,
        )
        self._encodes_by_kernels = self.impl in KERNEL_IMPLS and is_writable(self.plan)
        self._sides = {
            side: SideStorage.empty(self.plan, side, new[side], max_tokens=self.max_tokens)
            for side in SIDES
        }

    def _check_shapes(self, new: dict[Side, Tensor]) -> None:
        for side, states in new.items():
            _, num_heads, _, head_dim = self._sides[side].sinks.shape
            expected = (len(self._padding), num_heads, states.shape[2], head_dim)
            if tuple(states.shape) != expected:
                raise ValueError(
                    f"{side}_states must have shape {expected} (layer {self.layer_idx}), "
                    f"got {tuple(states.shape)}"
                )

    def _check_new(self, new: dict[Side, Tensor]) -> None:
        """Refuse non-finite states: at once, or on a GPU during decoding when next asked."""
        is_bad = torch.stack([self._any_nonfinite(side, states) for side, states in new.items()])
        if is_bad.device.type == "cpu" or new["key"].shape[-2] > 1:
            self._raise_if(is_bad)
        else:  # reading the flag now would make every decode step wait for the device
            self._nonfinite = is_bad if self._nonfinite is None else self._nonfinite | is_bad

    def _any_nonfinite(self, side: Side, states: Tensor) -> Tensor:
        limit = min(self._largest_magnitude(side), torch.finfo(states.dtype).max)
        if states.dtype.itemsize == 2:  # a comparison would round it to nearest, maybe upwards
            limit = round_down(torch.tensor(limit, dtype=torch.float32), states.dtype).item()
        bad = ~(states.detach().abs() <= limit)  # NaN compares false
        if any(self._padding):
            first = torch.tensor(self._padding, device=states.device)[:, None]
            position = self.num_tokens + torch.arange(states.shape[-2], device=states.device)
            bad = bad & (position >= first)[:, None, :, None]
        return bad.any()

    def _largest_magnitude(self, side: Side) -> float:
        head_dim = self._sides[side].sinks.shape[-1]
        codecs = [group.codec(side) for group in self.plan.groups]
        return min(codec.largest_magnitude(head_dim) for codec in codecs)

    def check_finite(self) -> None:
        """Raise if a decode step since the last check brought states that are not finite."""
        flag, self._nonfinite = self._nonfinite, None
        if self._stepper is not None:
            steps = self._stepper.flags.bool()
            flag = steps if flag is None else flag | steps
            self._stepper.flags.zero_()
        if flag is not None:
            self._raise_if(flag)

    def _raise_if(self, is_bad: Tensor) -> None:
        for side, side_is_bad in zip(SIDES, is_bad.tolist(), strict=True):
            if side_is_bad:
                raise CalibrationError(
                    f"{side}_states must be finite and at most {self._largest_magnitude(side):g} "
                    f"in magnitude, got NaN, inf or more in layer {self.layer_idx}; use a "
                    "codec of wider range, or run the model in a wider dtype"
                )

    # ----- steps on the device

    @property
    def is_stepping(self) -> bool:
        """Whether the last token was appended by a kernel alone."""
        return self._stepper is not None

    @property
    def device(self) -> torch.device | None:
        """Where the states lie, once there are any."""
        return self._sides["key"].sinks.device if self._sides else None

    def _may_step(self) -> bool:
        """Whether one more token may be appended by a kernel alone."""
        if not self._encodes_by_kernels or self.is_recording or self.num_tokens == 0:
            return False
        if self._stepper is None and self._is_settled():
            self._stepper = self._new_stepper()
        return self._stepper is not None

    def _is_settled(self) -> bool:
        """Whether both sides hold the same tokens, in alike rings, with all packed that is due."""
        key, value = (self._sides[side] for side in SIDES)
        due = self.plan.packed_lengths(self._row_lengths()).key
        is_alike = key.ring.capacity == value.ring.capacity  # recording may have grown one
        is_even = bool((key.packed == value.packed).all())
        return is_alike and is_even and bool((key.packed >= due).all())

    def _new_stepper(self) -> Stepper:
        key, value = (self._sides[side] for side in SIDES)
        clock = self.clocks.on(key.sinks.device)
        clock.set(self.num_tokens)
        return Stepper(
            self.plan,
            store_groups(key.stores, value.stores),
            sinks=(key.sinks, value.sinks),
            rings=(key.ring.buffer, value.ring.buffer),
            padding=self._padding,
            clock=clock,
        )

    def _step(self, key_states: Tensor, value_states: Tensor) -> StepStates:
        assert self._stepper is not None
        self._count_steps()
        self.num_tokens += 1
        kernel = self._stepper.append(key_states.detach(), value_states.detach(), self.num_tokens)
        return StepStates(
            kernel=kernel, num_tokens=self.num_tokens, impl=self.impl, resolve=self.states
        )

    def count_replayed_step(self) -> None:
        """Count a step that a captured graph replays: the device has done what a step does."""
        assert self._stepper is not None
        self.num_tokens += 1
        self._stepper.count_replayed(self.num_tokens)

    def expect_tokens(self, num_tokens: int) -> None:
        """Launch the next steps so that they suit rows of up to ``num_tokens``."""
        if self._stepper is not None:
            self._stepper.expect_tokens(num_tokens)

    def _count_steps(self) -> None:
        """Tell the stores what steps have packed."""
        if self._stepper is None:
            return
        packed = self._stepper.packed(self.num_tokens).tolist()
        for storage in self._sides.values():
            for store, _ in storage.stores:
                store.lengths = list(packed)

    def _end_steps(self) -> None:
        """Go back to keeping the layer from the host."""
        self._count_steps()
        if self._stepper is not None:
            flags = self._stepper.flags.bool()
            self._nonfinite = flags if self._nonfinite is None else self._nonfinite | flags
        self._stepper = None

    # ----- views

    def _tails(self) -> dict[Side, Tensor]:
        """Exact newest tokens ``[B, H_kv, W, D]`` of each side; W is the longest row's."""
        lengths = self._row_lengths()
        tails = {}
        for side, storage in self._sides.items():
            width = int(self._num_exact(lengths, storage.packed).max(initial=0))
            tails[side] = storage.ring.window(self._padding, self.num_tokens, width)
        return tails

    def _num_exact(self, lengths: IntArray, packed: IntArray) -> IntArray:
        """Tokens of rows that are neither sinks nor packed."""
        return np.maximum(lengths - self.plan.sink_tokens - packed, 0)

    def _row_lengths(self) -> IntArray:
        return np.maximum(self.num_tokens - np.asarray(self._padding, dtype=np.int64), 0)

    def _bounds_now(self, num_queries: int) -> dict[Side, IntArray]:
        """Every query sees decoded what is packed now."""
        return {
            side: np.tile((self._num_sinks(side) + self._sides[side].packed)[:, None], num_queries)
            for side in SIDES
        }

    def _bounds_by_query(self, num_queries: int) -> dict[Side, IntArray]:
        """Each query sees decoded what would be packed after its own step."""
        bounds = self._bounds_now(num_queries)
        if self.is_recording:
            return bounds
        behind = np.arange(num_queries - 1, -1, -1)
        own = np.maximum(self._row_lengths()[:, None] - behind, 0)
        for side, packed in zip(SIDES, self.plan.packed_lengths(own), strict=True):
            until = np.where(packed > 0, self.plan.sink_tokens + packed, 0)
            bounds[side] = np.maximum(bounds[side], until)
        return bounds

    def _num_sinks(self, side: Side) -> int:
        return self._sides[side].sinks.shape[-2]

    def _view(self, tails: dict[Side, Tensor], bounds: dict[Side, IntArray]) -> LayerStates:
        sides = {
            side: SideStates(
                stores=self._sides[side].stores,
                sinks=self._sides[side].sinks,
                tail=tails[side],
                decoded_until=bounds[side],
            )
            for side in SIDES
        }
        return LayerStates(
            key=sides["key"],
            value=sides["value"],
            num_tokens=self.num_tokens,
            padding=self._padding,
            impl=self.impl,
        )

    # ----- moving tokens: tail to sinks, tail to pages

    def _fill_sinks(self, tails: dict[Side, Tensor], num_new: int) -> None:
        """Copy the first real tokens of every row out of the tail until S of them are kept."""
        before = np.maximum(self._row_lengths() - num_new, 0)
        if before.min(initial=self.plan.sink_tokens) >= self.plan.sink_tokens:
            return
        for side in SIDES:
            self._sides[side].fill_sinks(tails[side], before, self._padding, self.num_tokens)

    def _flush(self, tails: dict[Side, Tensor]) -> dict[Side, Tensor]:
        """Pack what has left the residual window; keep and return the rest, the new tails."""
        lengths = self._row_lengths()
        passing = sum(tail.nbytes for tail in tails.values())
        held = sum(side.nbytes for side in self._sides.values())
        self.peak_nbytes = max(self.peak_nbytes, held + passing)
        kept = {}
        for index, side in enumerate(SIDES):
            storage, tail = self._sides[side], tails[side]
            packed = storage.packed
            due = packed
            if not self.is_recording:
                due = np.maximum(packed, self.plan.packed_lengths(lengths)[index])
            start = np.asarray(self._padding) + self.plan.sink_tokens + packed  # of all tokens
            columns = tail.shape[-2] - self.num_tokens + start
            by_kernels = self._encodes_by_kernels
            storage.pack(tail, columns, due - packed, by_kernels=by_kernels)
            width = int(self._num_exact(lengths, due).max(initial=0))
            kept[side] = tail[:, :, tail.shape[-2] - width :]
            storage.ring.store(kept[side], self._padding, self.num_tokens)
        return kept

    # ----- taking tokens away, moving rows

    def crop(self, num_removed: int) -> None:
        """Remove the newest ``num_removed`` tokens of every row.

        A per-channel block that is cut returns, decoded, to the residual
        (``num_reencoded_tokens`` counts its tokens). Held-back flushes happen now.
        """
        self.check_finite()
        self._end_steps()
        if not self.is_initialized:
            return
        if num_removed:
            self._remove(min(num_removed, self.num_tokens))
        if self.is_recording:
            self.is_recording = False
            self._flush(self._tails())
            self.is_recording = True

    def _remove(self, num_removed: int) -> None:
        former = self.states()
        self.num_tokens -= num_removed
        lengths = self._row_lengths()
        for side in SIDES:
            storage = self._sides[side]
            packed = storage.packed
            block = self.plan.block_tokens(side)
            reachable = np.maximum(lengths - self.plan.sink_tokens, 0)
            left = np.where(reachable < packed, reachable - reachable % block, packed)
            self.num_reencoded_tokens += int((np.minimum(packed, reachable) - left).sum())
            width = int(self._num_exact(lengths, left).max(initial=0))
            tail = former.dense(side, self.num_tokens - width, self.num_tokens)
            storage.ring.store(tail.to(storage.sinks.dtype), self._padding, self.num_tokens)
            storage.truncate(left)

    def map_rows(self, index: Sequence[int]) -> None:
        """Make row i a copy of what row ``index[i]`` was (reorder, repeat, select)."""
        self.check_finite()
        self._end_steps()
        if not self.is_initialized:
            return
        self._padding = [self._padding[i] for i in index]
        for storage in self._sides.values():
            storage.map_rows(index)

    def to(self, device: torch.device) -> None:
        """Move all states to ``device``."""
        self._end_steps()
        for storage in self._sides.values():
            storage.to(device)

    # ----- saving

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain facts from which ``restore`` rebuilds the layer."""
        self.check_finite()
        self._end_steps()
        if not self.is_initialized:
            return {}, {"num_tokens": 0, "padding": self._padding, "packed": {}}
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {
            "num_tokens": self.num_tokens,
            "padding": self._padding,
            "num_reencoded_tokens": self.num_reencoded_tokens,
            "packed": {side: self._sides[side].packed.tolist() for side in self._sides},
        }
        tails = self._tails()
        for side, storage in self._sides.items():
            states = storage.export() | {"tail": tails[side]}
            tensors |= {f"{side}.{name}": states[name] for name in states}
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Fill an empty layer from what ``export`` returned."""
        if not facts["packed"]:
            return
        self._padding = list(facts["padding"])
        new: dict[Side, Tensor] = {side: tensors[f"{side}.tail"] for side in SIDES}
        self._initialize(new)
        self.num_tokens = int(facts["num_tokens"])
        self.num_reencoded_tokens = int(facts["num_reencoded_tokens"])
        for side, storage in self._sides.items():
            storage.restore(below(tensors, side), facts["packed"][side])
            storage.ring.store(new[side], self._padding, self.num_tokens)
