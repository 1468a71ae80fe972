"""Shared by all tests: no network, one torch thread, and a tiny random model on disk."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # kernels are tested all the same, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Two test processes on two cores must not each start a pool of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the internet fails instead of passing on some machines only."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in {"127.0.0.1", "::1", "localhost"}
        if not local:
            raise RuntimeError(f"tests must not use the network, got a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def quanto_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto unpacks by C++ that it compiles at the first use, for a minute, if it can."""
    try:
        from optimum.quanto.tensor.packed import PackedTensor
    except ImportError:
        return

    def unpack(self: Any) -> torch.Tensor:
        bits = self._bits
        parts = [self._data >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.cat(parts)[: self.shape[0]]

    monkeypatch.setattr(PackedTensor, "unpack", unpack)


def byte_tokenizer() -> Any:
    """Build a byte-level tokenizer without merges: 256 bytes and ``<|endoftext|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 3 layers with its tokenizer, saved as a local checkpoint."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("tiny-qwen2")
    Qwen2ForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
