"""States as kernels take them, with what they hold in float64: for tests of the kernels.

Without a GPU, Triton interprets the kernels (``tests/conftest.py`` asks it to).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbits.attention.states import KernelStates, StoreGroup
from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton import support
from kvbits.codecs import Affine, Codec, Identity, Rotated, VarianceNormalised
from kvbits.codecs.pages import PageStore
from kvbits.testing import attend_naively

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def codec(bits, key_group=0, group_size=None, is_rotated=False, scaled=None, tile_tokens=0):
    if bits == 16:
        return Identity()
    made = Affine(bits=bits, group_size=group_size)
    if key_group:
        made = Affine(bits=bits, granularity="per_channel", group_size=key_group)
    if tile_tokens:
        made = VarianceNormalised(inner=made, scaled=scaled, tile_tokens=tile_tokens)
    return Rotated(inner=made, sign_seed=3) if is_rotated else made


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape, a storage and an attention; ``packed`` and ``exact`` are tokens of every row.

    ``key_tile`` and ``value_tile``, if any, are tokens whose spread is evened out.
    """

    key_bits: int = 4
    value_bits: int = 4
    key_group: int = 0
    value_groups: int = 1
    head_dim: int = 128
    value_dim: int | None = None
    num_heads: int = 2
    group_queries: int = 4
    packed: tuple[int, ...] = (130, 70)
    exact: tuple[int, ...] = (20, 7)
    num_sinks: int = 0
    num_queries: int = 1
    is_rotated: bool = False
    key_codec: Codec | None = None
    value_codec: Codec | None = None
    key_tile: int = 0
    value_tile: int = 0
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    window: int | None = None
    has_sink_logits: bool = False
    has_outliers: bool = False
    form: str | None = None

    @property
    def lengths(self):
        return [
            self.num_sinks + packed + exact
            for packed, exact in zip(self.packed, self.exact, strict=True)
        ]

    @property
    def num_tokens(self):
        return max(self.lengths)

    @property
    def options(self):
        options = {"softcap": self.softcap, "window": self.window}
        if self.has_sink_logits:
            heads = self.num_heads * self.group_queries
            options["sink_logits"] = torch.linspace(-2, 3, heads, device=DEVICE)
        return options

    @property
    def scale(self):
        return self.head_dim**-0.5

    @property
    def dims(self):
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def codecs(self):
        """Of keys and of values."""
        size = self.dims[1] // self.value_groups if self.value_groups > 1 else None
        return (
            self.key_codec
            or codec(self.key_bits, self.key_group, None, self.is_rotated, "token", self.key_tile),
            self.value_codec
            or codec(self.value_bits, 0, size, self.is_rotated, "channel", self.value_tile),
        )

    def schedule(self, **changes):
        """What the heuristic chooses, in the form the case asks for."""
        key, value = map(support.side_shape, self.codecs, self.dims)
        shape = schedules.Shape(
            key=key,
            value=value,
            group_queries=self.group_queries,
            num_queries=self.num_queries,
            rows=len(self.packed) * self.num_heads,
            num_tokens=max(self.packed),
            exact_tokens=self.num_sinks + max(self.exact) + 2,
        )
        plan = schedules.choose(shape)
        if self.form is not None:
            least = 8 if self.form == "fp16" else 4
            plan = plan._replace(form=self.form, columns=max(plan.columns, least))
        return plan._replace(**changes)


def make(case, poison=False):
    """``(query, states, dense)``: dense keys and values of every row, ``[1, H, T, D]`` float64.

    ``poison`` fills every byte that no token owns: of pages, of the table's rows, of the ring.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype).to(DEVICE)

    rows, heads = len(case.packed), case.num_heads
    dims, codecs = case.dims, case.codecs
    stores = [
        PageStore(
            each,
            side=side,
            num_heads=heads,
            head_dim=dim,
            num_rows=rows,
            dtype=case.dtype,
            device=DEVICE,
            page_tokens=max(64, *(each.block_tokens for each in codecs)),
            first_position=case.num_sinks,
        )
        for each, side, dim in zip(codecs, ("key", "value"), dims, strict=True)
    ]
    for store in stores:
        store.reserve(max(case.packed) + 1, order=torch.Generator().manual_seed(1))
        if poison:
            store.pool.fill_(0x7F)  # NaN as fp16, and a channel that exists
    for row, count in enumerate(case.packed):
        for store, dim in zip(stores, dims, strict=True):
            states = draw(1, heads, count, dim) + draw(dim)
            if case.has_outliers and store is stores[0] and count:
                states[..., 5] *= 8
                states[..., 17] += 12
                states[:, :, 0] *= 3
            store.append(states, [row])
    sinks = [draw(rows, heads, case.num_sinks, dim) for dim in dims]
    width = max(case.exact) + 2
    tails = [draw(rows, heads, width, dim) for dim in dims]
    query = draw(rows, case.num_queries, heads * case.group_queries, case.head_dim)
    if case.has_outliers:
        query[..., 9] *= 20
    is_ring = case.num_queries == 1
    dense, used = _dense(case, stores, sinks, tails, width, is_ring)
    if poison:
        for tail in tails:
            tail.copy_(torch.where(used[:, None, :, None], tail, torch.nan))
    padding = [case.num_tokens - length for length in case.lengths]
    clock, padding, floor = (
        torch.tensor(list(x), dtype=torch.int32, device=DEVICE)
        for x in ([case.num_tokens], padding, case.packed)
    )
    states = KernelStates(
        groups=(StoreGroup(*stores, None),),
        sinks=tuple(sinks),
        tails=tuple(tails),
        is_ring=is_ring,
        clock=clock,
        padding=padding,
        floor=floor,
        is_held=True,
        residual_length=0,
        quantum=1,
        packed=list(case.packed),
    )
    return query.transpose(1, 2), states, dense


def _dense(case, stores, sinks, tails, width, is_ring):
    """What every row holds, and which places of the tail are in use."""
    used = torch.zeros(len(case.packed), width, dtype=torch.bool, device=DEVICE)
    dense = []
    for row, (packed, length) in enumerate(zip(case.packed, case.lengths, strict=True)):
        places = [
            position % width if is_ring else width - length + position
            for position in range(case.num_sinks + packed, length)
        ]
        used[row, places] = True
        dense.append(
            [
                torch.cat(
                    (
                        sinks[side][row].double(),
                        stores[side].read(0, packed)[row].double(),
                        tails[side][row][:, places].double(),
                    ),
                    1,
                )[None]
                for side in (0, 1)
            ]
        )
    return dense, used


def expected(case, query, dense):
    """``[B, Q, H_q, D_v]`` in float64."""
    outputs = []
    for row, (keys, values) in enumerate(dense):
        num_tokens = keys.shape[2]
        own = torch.arange(num_tokens - case.num_queries, num_tokens)[:, None]
        position = torch.arange(num_tokens)
        mask = position <= own
        if case.window is not None:
            mask &= position > own - case.window
        options = case.options
        logits = options.get("sink_logits")
        outputs.append(
            attend_naively(
                query[row : row + 1].cpu(),
                keys.cpu(),
                values.cpu(),
                mask[None, None],
                case.scale,
                softcap=case.softcap,
                sink_logits=None if logits is None else logits.cpu(),
            )
        )
    return torch.cat(outputs).transpose(1, 2)
