"""Attention over packed pages, layer by layer, against the best attention over a 16-bit cache.

Times are of one layer's decode attention, all launches included, with a block table, the exact
residual and the schedule a user gets. Layers are rotated so that each finds its pages in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kvbits.attention.states import KernelStates, StoreGroup
from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton.decode import attend, shape_of
from kvbits.attention.triton.launch import device_of
from kvbits.attention.triton.schedule import Schedule
from kvbits.bench.timing import graph_time_us, num_copies
from kvbits.codecs import Affine, AnyCodec, Identity, packing
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.methods import build_method

SPLIT_FACTORS = (0.5, 0.75, 1, 1.25, 1.5, 2)


class Cell(NamedTuple):
    """One shape and storage to time.

    Attributes:
        batch: Rows.
        context: Tokens of a row.
        key_bits: 2, 3, 4, 8 or 16.
        value_bits: Like ``key_bits``.
        key_group: Tokens of a per-channel key group; 0: per token.
        value_groups: Scales of a value.
        num_heads: Key/value heads.
        group_queries: Query heads per key/value head.
        head_dim: Channels.
        residual_length: Exact newest tokens.
        is_shuffled: Whether pages lie in random order.
        num_queries: Queries of a row.
        shortest: Tokens of the shortest row of a ragged batch, as a share of the longest.
        window: Sliding window, 0 for none.
        method: What is around the codes: one of METHODS, or nothing.
    """

    batch: int
    context: int
    key_bits: int
    value_bits: int
    key_group: int = 0
    value_groups: int = 1
    num_heads: int = 8
    group_queries: int = 4
    head_dim: int = 128
    residual_length: int = 64
    is_shuffled: bool = True
    num_queries: int = 1
    shortest: float = 1.0
    window: int = 0
    method: str = ""

    @property
    def plan(self) -> LayerPlan:
        """The layer plan the cell is about."""
        key = _codec(self.key_bits, self.key_group, None)
        value = _codec(self.value_bits, 0, _group_size(self))
        if self.method:
            key, value = _method_codecs(self)
        return LayerPlan.uniform(key, value, residual_length=self.residual_length)

    @property
    def name(self) -> str:
        """Widths and groups, for tables."""
        name = f"{self.method} " if self.method else ""
        name += f"K{self.key_bits}V{self.value_bits}"
        name += f" G{self.key_group}" if self.key_group else ""
        return name + (f" V{self.value_groups}" if self.value_groups > 1 else "")


def _group_size(cell: Cell) -> int | None:
    return None if cell.value_groups == 1 else cell.head_dim // cell.value_groups


def _codec(bits: int, key_group: int, group_size: int | None) -> AnyCodec:
    if bits == 16:
        return Identity()
    if key_group:
        return Affine.model_validate(
            {"bits": bits, "granularity": "per_channel", "group_size": key_group}
        )
    return Affine.model_validate({"bits": bits, "group_size": group_size})


KVQUANT = {"levels": "normal_float", "key_ranges": "block"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hadamard": ("hadamard", {}),
    "kvarn": ("kvarn", {}),
    "turboquant": ("turboquant", {}),
    "nuq": ("kvquant", {**KVQUANT, "outlier_share": 0, "is_pre_rope": False}),
    "nuq, pre-rotary": ("kvquant", {**KVQUANT, "outlier_share": 0}),
    "nuq, outliers": ("kvquant", {**KVQUANT, "is_pre_rope": False}),
    "kvquant": ("kvquant", KVQUANT),
}
"""Names of cells, and the method with the settings that they stand for."""

ROPE_BASE = 500_000.0


def _method_codecs(cell: Cell) -> tuple[AnyCodec, AnyCodec]:
    """Codecs of keys and of values, as the method makes them for a model of the cell's shape."""
    from transformers import LlamaConfig

    name, settings = METHODS[cell.method]
    method = build_method(name, key_bits=cell.key_bits, value_bits=cell.value_bits, **settings)
    config = LlamaConfig(
        head_dim=cell.head_dim,
        num_hidden_layers=1,
        num_key_value_heads=cell.num_heads,
        num_attention_heads=cell.num_heads * cell.group_queries,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
    )
    group = method.plan(config).layers[0].groups[0]
    return group.key, group.value


def row_lengths(cell: Cell) -> list[int]:
    """Tokens of every row: evenly spread from the shortest to the longest."""
    shortest = int(cell.context * cell.shortest)
    spread = max(1, cell.batch - 1)
    return [cell.context - (cell.context - shortest) * row // spread for row in range(cell.batch)]


def random_states(cell: Cell, *, device: str = "cuda", seed: int = 0) -> KernelStates:
    """A layer full of random codes, scales and residual, as a decode step finds it."""
    plan, generator = cell.plan, torch.Generator(device).manual_seed(seed)
    lengths = row_lengths(cell)
    exact = cell.num_queries if cell.num_queries > 1 else 0
    packed = plan.packed_lengths(np.array(lengths) - exact).key.tolist()
    stores = [_random_store(cell, side, packed, generator, torch.device(device)) for side in SIDES]

    def states(width: int) -> Tensor:
        shape = (cell.batch, cell.num_heads, width, cell.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    width = (
        plan.exact_capacity
        if not exact
        else max(length - count for length, count in zip(lengths, packed, strict=True))
    )
    padding = [cell.context - length for length in lengths]
    clock, padding_t, floor = (
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in ([cell.context], padding, packed)
    )
    return KernelStates(
        groups=(StoreGroup(stores[0], stores[1], None),),
        sinks=(states(0), states(0)),
        tails=(states(width), states(width)),
        is_ring=not exact,
        clock=clock,
        padding=padding_t,
        floor=floor,
        is_held=bool(exact),
        residual_length=plan.residual_length,
        quantum=plan.quantum,
        packed=packed,
    )


def _random_store(
    cell: Cell,
    side: Side,
    packed: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
) -> PageStore:
    codec = cell.plan.groups[0].codec(side)
    store = PageStore(
        codec,
        side=side,
        num_heads=cell.num_heads,
        head_dim=cell.head_dim,
        num_rows=cell.batch,
        dtype=torch.bfloat16,
        device=device,
        page_tokens=cell.plan.page_tokens,
    )
    store.reserve(
        max(packed), order=torch.Generator().manual_seed(1) if cell.is_shuffled else None
    )
    store.lengths = list(packed)
    planes = store.planes
    if codec.is_exact:
        planes["codes"].normal_(generator=generator)
        return store
    planes["codes"].random_(0, 256, generator=generator)
    if "affine" in planes:
        scales, offsets = planes["affine"].unbind(-1)
        scales.uniform_(0.05, 0.25, generator=generator)
        offsets.uniform_(-1, 0, generator=generator)
    for name, low, high in (("norm", 5, 20), ("outlier_value", -4, 4), ("tile_scale", 0.5, 2)):
        if name in planes:
            planes[name].uniform_(low, high, generator=generator)
    if "outlier_channel" in planes:
        planes["outlier_channel"].random_(0, cell.head_dim, generator=generator)
    return store


def random_query(cell: Cell, *, device: str = "cuda") -> Tensor:
    """``[B, H_q, Q, D]`` in the memory order of a projection's output."""
    heads = cell.num_heads * cell.group_queries
    query = torch.randn(cell.batch, cell.num_queries, heads, cell.head_dim, device=device)
    return query.to(torch.bfloat16).transpose(1, 2)


def states_bytes(states: KernelStates, window: int = 0) -> int:
    """Bytes a step has to read: pages in use or in a window, scales, residual."""
    total = 0
    for group in states.groups:
        for store in (group.key, group.value):
            seen = [min(count, window or count) for count in store.lengths]
            pages = sum(-(-count // store.page_tokens) for count in seen)
            total += pages * store.record_units * packing.OFFSET_UNIT
    exact = int(states.clock) * len(states.packed) - int(states.padding.sum()) - sum(states.packed)
    return total + exact * states.num_heads * 4 * states.tails[0].shape[-1]


def schedule_of(cell: Cell, states: KernelStates) -> Schedule:
    """What the shipped heuristic chooses."""
    group, window = states.groups[0], cell.window or None
    shape = shape_of(group, states, cell.group_queries, cell.num_queries, window)
    return schedules.choose(shape, device_of(states.clock))


class CellBench:
    """The layers of one cell, and how fast schedules run over them."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        first = random_states(cell)
        self.num_bytes = states_bytes(first, cell.window)
        count = num_copies(self.num_bytes)
        self.layers = [first, *(random_states(cell, seed=i) for i in range(1, count))]
        self.query = random_query(cell)
        self.shipped = schedule_of(cell, first)

    def time_us(self, schedule: Schedule | None = None) -> float:
        """Time of one layer under a schedule; the shipped one by default."""
        scale = self.cell.head_dim**-0.5

        def call(states: KernelStates) -> Any:
            return lambda: attend(
                self.query, states, scale, window=self.cell.window or None, schedule=schedule
            )

        return graph_time_us([call(states) for states in self.layers])

    def best(self) -> tuple[float, Schedule]:
        """Least time of schedules around the shipped one: what the heuristic leaves.

        Splits first, then what one program does.
        """
        shipped = self.shipped
        tiles = -(-max(self.layers[0].packed) // shipped.tile)
        wanted = {round(shipped.splits * factor) for factor in SPLIT_FACTORS}
        splits = sorted({max(1, min(tiles, number)) for number in wanted})
        _, found = self._fastest(shipped._replace(splits=number) for number in splits)
        return self._fastest(program_variants(found))

    def _fastest(self, schedules: Iterable[Schedule]) -> tuple[float, Schedule]:
        return min((self._time_us_if_it_fits(schedule), schedule) for schedule in schedules)

    def _time_us_if_it_fits(self, schedule: Schedule) -> float:
        try:
            return self.time_us(schedule)
        except OutOfResources:
            return float("inf")


def program_variants(schedule: Schedule) -> list[Schedule]:
    """The schedule itself, with one more tile ahead, and with twice the warps."""
    return [
        schedule,
        schedule._replace(depth=schedule.depth + 1),
        schedule._replace(num_warps=2 * schedule.num_warps),
    ]


def dense_times_us(batch: int, context: int, cell: Cell) -> dict[str, float]:
    """Times of torch's attention over a contiguous 16-bit cache of the same shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    shape = (batch, cell.num_heads, context, cell.head_dim)
    num_bytes = 4 * batch * cell.num_heads * context * cell.head_dim
    count = num_copies(num_bytes)
    layers = [
        tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(count)
    ]
    query = random_query(cell)
    found = {}
    for name in ("cudnn", "flash"):
        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")

        def call(keys: Tensor, values: Tensor, backend: Any = backend) -> Any:
            def run() -> None:
                with sdpa_kernel(backend):
                    scaled_dot_product_attention(query, keys, values, enable_gqa=True)

            return run

        try:
            found[name] = graph_time_us([call(keys, values) for keys, values in layers])
        except RuntimeError:
            continue  # this backend does not take the shape
    return found
