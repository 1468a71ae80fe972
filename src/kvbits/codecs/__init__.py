"""Codecs: how a block of key or value states is stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvbits.codecs.affine import Affine
from kvbits.codecs.base import Codec, Encoded, ParameterSpec
from kvbits.codecs.identity import Identity

AnyCodec = Annotated[Affine | Identity, Field(discriminator="kind")]
"""Every codec a plan file may name, told apart by ``kind``."""

__all__ = ["Affine", "AnyCodec", "Codec", "Encoded", "Identity", "ParameterSpec"]
