"""What every launch has in common: the device it is for, and what that device can do."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvbits.attention.triton import schedule as schedules


def launch_options() -> dict[str, object]:
    """Let a kernel start while the one before it ends, where the hardware can (sm_90 on)."""
    if is_interpreted() or torch.cuda.get_device_capability() < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def device_of(tensor: Tensor) -> schedules.Device:
    """The device of a tensor as ``schedule.choose`` sees it."""
    if tensor.device.type != "cuda":
        return schedules.DEFAULT_DEVICE
    properties = torch.cuda.get_device_properties(tensor.device)
    return schedules.Device(
        properties.multi_processor_count, properties.shared_memory_per_multiprocessor
    )


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter instead of on a device."""
    return bool(triton.knobs.runtime.interpret)
