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
    """Let the next kernel begin, and go on when the one before has ended; the one behind the next may begin, too, if
    "all" are ahead and not "one".
    """
    if AHEAD == "all":
        gdc_launch_dependents()
    if AHEAD != "none":
        gdc_wait()
    if AHEAD == "one":
        gdc_launch_dependents()


def overlapping(x_ND: Tensor) -> dict[str, Any]:
    """How a kernel that takes these tokens is launched.

    Programs that wait take room on the processors. Those of a single token are small, and there are many for each
    processor one after the other. Of more tokens there are few and large ones, which came to lie on few processors
    when several kernels were ahead: 16 tokens took 105 us a layer of 7B in int8 with one ahead, 188 with all.
    """
    if not _can_overlap(x_ND.device):
        return {"AHEAD": "none"}
    return {"AHEAD": "all" if len(x_ND) == 1 else "one", "launch_pdl": True}


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
