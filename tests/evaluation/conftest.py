"""Tiny random models and token sets for the measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from kvbits.evaluation.token_set import TokenSet

VOCAB = 97


def build_qwen2(num_layers: int = 3, *, seed: int = 0, **settings: Any) -> Any:
    """A random Qwen2 in float64, so that only kvbits' own float32 arithmetic rounds.

    Weights of std 0.05 make attention and the next-token distribution far from uniform, without
    the chaos of larger ones.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.05,
        **settings,
    )
    return Qwen2ForCausalLM(config).eval().double()


@pytest.fixture(scope="session")
def model() -> Any:
    return build_qwen2()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_qwen2


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def token_set() -> TokenSet:
    """Three documents of 150, 40 and 90 tokens; of the last, only the end counts."""
    ids = torch.randint(0, VOCAB, (3, 150), generator=torch.Generator().manual_seed(2))
    counted = torch.zeros(3, 150, dtype=torch.bool)
    counted[0, 1:] = True
    counted[1, 1:40] = True
    counted[2, 80:90] = True
    return TokenSet("random", "text", "heldout", ids, counted)


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> tuple[Any, Any]:
    """The shared byte-level model with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return tiny[1]
