"""Settings, random states, plain numpy quantizers and a short workload."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvbits.replay.baselines import BUILT_IN
from kvbits.replay.hooks import OPTIONAL_HOOKS
from kvbits.replay.settings import TensorSettings
from kvbits.replay.slices import Example, Slice

PROMPTS = (
    "The ferry crossed the lagoon in forty minutes, and in calm weather it was never late; " * 2,
    "A heron stood below the gates so still that somebody once hung a coat on it. " * 2,
)


def short_slice(name: str = "needle_slice", num_steps: int = 5) -> Slice:
    """Two prompts of about 160 bytes, which is tokens of the tiny model."""
    examples = tuple(
        Example(f"own-{index}", "passkey", "Apache-2.0", prompt, "?", ("none",))
        for index, prompt in enumerate(PROMPTS)
    )
    return Slice(name, "0" * 64, num_steps, examples)


def load_tiny(path: str) -> tuple[Any, Any]:
    """Model and tokenizer; of a module, so that worker processes can load them too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = [999]  # random weights may choose any token
    return model, AutoTokenizer.from_pretrained(path)


META = {"workload": "needle_slice", "head_dim": 64}


def settings_of(policy, kind="key", layer=0):
    """The settings a policy asks for, without a process."""
    found = {
        hook: getattr(policy, hook)(layer, kind, META)
        for hook in OPTIONAL_HOOKS
        if hook != "bit_range"
    }
    return TensorSettings(
        layer,
        kind,
        choose_axis=policy.choose_axis(layer, kind),
        residual_length=policy.residual_length(layer, META),
        bit_range=(2, 4),
        **found,
    )


def settings(kind="key", **changes):
    return settings_of(BUILT_IN["uniform_quant_4bit"](), kind)._replace(**changes)


def random_states(heads=2, tokens=50, dim=16, seed=0):
    return torch.randn(heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def minmax(x, bits, clip=1.0):
    """Section 5.1 of the specification on one group, in numpy float32."""
    low, high = np.float32(clip) * x.min(), np.float32(clip) * x.max()
    step = np.float32(max(high - low, 1e-5)) / np.float32(2**bits - 1)
    codes = np.clip(np.round((x - low) / step), 0, 2**bits - 1)
    return codes * step + low


def close(found, expected):
    # Half a float32 step of the values apart at most: sums may be fused or not.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
