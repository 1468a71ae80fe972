"""What a codec does to states, as kernels that encode take it. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvbits.codecs import Affine, Codebook, Codec, Identity, NormScaled, Outliers, PreRope, Rotated

MAX_LEVEL_BITS = 4  # levels are compared one after the other
MAX_SLOTS = 8


@dataclass(frozen=True)
class Encoding:
    """Steps before codes, from the outermost codec on; a plain affine codec has none.

    Not a tuple: Triton would take that apart where it is a constant of a kernel.

    Attributes:
        rotary_pairs: Pairs of channels that are turned back by their position.
        is_rotated: Whether signs and a Hadamard matrix come next.
        slots: Outliers of every token.
        is_by_channel: Whether outliers are those of their channels, not of their token.
        has_levels: Whether codes name levels of a table.
        is_norm: Whether a token has a norm in place of scales and offsets.
        is_corrected: Whether that norm makes up for the length of the levels.
    """

    rotary_pairs: int = 0
    is_rotated: bool = False
    slots: int = 0
    is_by_channel: bool = False
    has_levels: bool = False
    is_norm: bool = False
    is_corrected: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether there is no such step."""
        return self == PLAIN


PLAIN = Encoding()


def encoding(codec: Codec) -> Encoding | None:
    """How kernels encode what they can read of a codec, or None if they do not."""
    how = PLAIN
    if isinstance(codec, PreRope):
        how = replace(how, rotary_pairs=len(codec.frequencies))
        codec = codec.inner
    elif isinstance(codec, Rotated):
        how = replace(how, is_rotated=True)
        codec = codec.inner
    if isinstance(codec, Outliers):
        is_by_channel = codec.by == "channel"
        if codec.slots > MAX_SLOTS or (is_by_channel and codec.block_tokens == 1):
            return None
        how = replace(how, slots=codec.slots, is_by_channel=is_by_channel)
        codec = codec.inner
    if isinstance(codec, Codebook) and codec.bits <= MAX_LEVEL_BITS:
        return replace(how, has_levels=True)
    if isinstance(codec, NormScaled) and codec.bits <= MAX_LEVEL_BITS and not how.slots:
        return replace(how, has_levels=True, is_norm=True, is_corrected=codec.is_corrected)
    if isinstance(codec, Identity) or (isinstance(codec, Affine) and codec.is_plain):
        return how
    return None


def supported_encoding(codec: Codec) -> Encoding:
    """The encoding of a codec that kernels do encode."""
    how = encoding(codec)
    assert how is not None
    return how
