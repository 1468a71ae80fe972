"""How engines store a layer: their names for it, and what it costs, in our words."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from kvbits.codecs import AnyCodec, Codec
from kvbits.codecs.wrappers import Wrapper
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, LayerPlan, Side
from kvbits.memory import head_dim
from kvbits.plan.modes import EXACT_BITS


class SideFormat(NamedTuple):
    """How one side of a layer is stored.

    Attributes:
        bits: Width of a code.
        family: What codes mean: a codec's kind, or for 4-bit floats its format.
        parameter_bits: Bits of scales and the like, for every group.
        group_size: Channels that share them; None is all channels of a token and head.
        is_rotated: Whether a Hadamard rotation comes first, which takes a power of two channels.
        storage_bits: Bits a code takes, if not its width.
    """

    bits: int
    family: str
    parameter_bits: int = 0
    group_size: int | None = None
    is_rotated: bool = False
    storage_bits: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether states stay as they are."""
        return self.bits == EXACT_BITS

    def suits(self, channels: int) -> bool:
        """Whether heads of so many channels can be stored."""
        is_power = channels & (channels - 1) == 0
        return channels % (self.group_size or 1) == 0 and (is_power or not self.is_rotated)

    def stored_bits(self, channels: int) -> Fraction:
        """Bits per value, parameters included."""
        parameters = Fraction(self.parameter_bits, self.group_size or channels)
        return (self.storage_bits or self.bits) + parameters


class Format(NamedTuple):
    """How one layer is stored: what the engine calls it, and both sides."""

    name: str
    key: SideFormat
    value: SideFormat

    def side(self, side: Side) -> SideFormat:
        """One side."""
        return self.key if side == "key" else self.value

    @property
    def is_exact(self) -> bool:
        """Whether both sides stay as they are."""
        return self.key.is_exact and self.value.is_exact

    def suits(self, layer: LayerGeometry) -> bool:
        """Whether the heads of a layer can be stored."""
        return all(self.side(side).suits(head_dim(layer, side)) for side in SIDES)

    def stored_bits(self, layer: LayerGeometry) -> Fraction:
        """Bits one token adds to a layer over all heads, parameters included."""
        per_head = sum(
            head_dim(layer, side) * self.side(side).stored_bits(head_dim(layer, side))
            for side in SIDES
        )
        return layer.num_key_value_heads * Fraction(per_head)


EXACT_SIDE = SideFormat(EXACT_BITS, "identity")
FP8_SIDE = SideFormat(8, "float8")
NVFP4_SIDE = SideFormat(4, "nvfp4", parameter_bits=8, group_size=16)


def both(name: str, side: SideFormat) -> Format:
    """The format that stores both sides alike."""
    return Format(name, side, side)


def widest(plan: LayerPlan, side: Side) -> AnyCodec:
    """The codec with most bits among a layer's head groups."""
    codecs = [group.key if side == "key" else group.value for group in plan.groups]
    return max(codecs, key=lambda codec: codec.bits)


def family(codec: Codec) -> str:
    """What the codes of a codec mean, whatever is wrapped around it."""
    while isinstance(codec, Wrapper):
        codec = codec.inner
    return str(getattr(codec, "format", codec.kind))  # type: ignore[attr-defined]
