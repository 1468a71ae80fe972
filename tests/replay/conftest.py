"""A tiny random model, a short workload and policy files for the replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from replay_helpers import load_tiny, short_slice

from kvbits.replay.harness import Workload


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_tiny(str(tiny_model_dir))


@pytest.fixture
def workload(tiny: tuple[Any, Any]) -> Callable[..., Workload]:
    def make(policy: Any, **changes: Any) -> Workload:
        plain = Workload(*tiny, "tiny", short_slice(), str(policy), 4)
        return plain._replace(**changes)

    return make


@pytest.fixture
def policy_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a policy whose hooks return the given Python expressions."""

    def write(**hooks: str) -> Path:
        lines = [
            "from kvbits.replay import AdaptiveQuantPolicy",
            "class Mine(AdaptiveQuantPolicy):",
        ]
        lines += [
            f"    def {name}(self, *a):\n        return {text}" for name, text in hooks.items()
        ]
        path = tmp_path / f"policy_{len(list(tmp_path.iterdir()))}.py"
        path.write_text("\n".join([*lines, "    pass\n"]))
        return path

    return write
