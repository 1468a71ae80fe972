"""Replay: what a policy written by hand does to a model's next-token choices, and what it costs.

This package loads light: a policy runs in a process of its own, which has no torch.
"""

from __future__ import annotations

from kvbits.replay.policy import AdaptiveQuantPolicy

__all__ = ["AdaptiveQuantPolicy"]
