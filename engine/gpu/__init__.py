"""What a GPU does otherwise than PyTorch alone; each part is tried at the start, on something small."""

from __future__ import annotations

import torch


class NotOnThisGpu(Exception):
    """This machine cannot do a part of it, or comes to other numbers; the message says why."""


def processors(device: torch.device) -> int:
    """How many a GPU has; some where its kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
