"""Ties a rank's life to its parent's: a torchrun that is killed must not leave ranks behind."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
ORPHANED = 72  # the process's exit status when its parent was gone before it could ask


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    parent = os.getppid()
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # whose own process is never number 1
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or (by_torchrun and parent == 1):  # it ended in between, or before
        os._exit(ORPHANED)
