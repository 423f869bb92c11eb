"""Launches that overlap: on Hopper and later a kernel may begin before the one in front of it has ended.

It then reads what no kernel writes, its weights, and waits before it touches anything else. That way memory is read
without a pause while one kernel ends and the next begins. Whoever is launched so must wait, or what comes after it
would not know that all before it has ended either.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(AHEAD: tl.constexpr):
    """Let the next kernel begin, and go on when the one before has ended."""
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()


def overlapping(x: Tensor) -> dict[str, Any]:
    """How a kernel that takes this is launched."""
    return _overlapping(x.device)


@cache
def _overlapping(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"AHEAD": True, "launch_pdl": True}
    return {"AHEAD": False}
