"""TurboQuant: a norm per token, and the best levels for the rest of it."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvbits.codecs import AnyCodec, NormScaled, Rotated
from kvbits.codecs.levels import lloyd_max, on_grid
from kvbits.methods.per_token import TokenByToken


class TurboQuant(TokenByToken):
    """Every token is rotated with random signs, and its direction takes Lloyd-Max levels."""

    name: ClassVar = "turboquant"
    source: ClassVar = "arXiv 2504.19874"
    differs: ClassVar = (
        "a Hadamard matrix with random signs in place of a random rotation",
        "the stored norm makes the decoded token as long as the exact one",
        "levels moved to a grid of bytes, which at 4 bits adds 0.3 % to the squared error",
        "the variant of least squared error; no sketch of the residual",
    )

    key_bits: Literal[2, 3, 4] = 4
    value_bits: Literal[2, 3, 4] = 4
    sign_seed: int = 0

    def codec(self, bits: int) -> AnyCodec:
        return Rotated(inner=NormScaled(levels=on_grid(lloyd_max(bits))), sign_seed=self.sign_seed)
