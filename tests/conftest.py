"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# Triton's kernels are interpreted where there is no GPU. It must be told before anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Else it keeps every test's file in TMPDIR, by its path, and reads that again when another test's has the same.
os.environ["TIKTOKEN_CACHE_DIR"] = ""

import attention  # noqa: E402

from engine import ragged_cache  # noqa: E402

# Two test processes run at once, and tiny tensors gain nothing from more threads.
torch.set_num_threads(1)

# A shell starts what it runs in the background with interrupts ignored, nohup ignores hanging up, and so would every
# program under test. These tests still outlive the terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(autouse=True)
def attention_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has `varlen_attn` for GPUs only; elsewhere it is computed by its documentation."""
    on_gpu = ragged_cache.varlen_attn

    def anywhere(query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        return (on_gpu if query.is_cuda else attention.varlen_attn)(query, *arguments, **options)

    monkeypatch.setattr(ragged_cache, "varlen_attn", anywhere)
