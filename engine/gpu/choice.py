"""The likeliest tokens on a GPU, in Triton: one pass over the logits, which says too whether they are numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 8192  # at once


@triton.jit
def largest(logits, tokens, told, columns, otherwise, COLUMNS: tl.constexpr):
    """One row: its first largest column, and that once more or `otherwise` if some column is not finite."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    best, where = tl.full((COLUMNS,), float("-inf"), tl.float32), column
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(0, columns, COLUMNS):
        numbers = tl.load(logits + row * columns + column, column < columns, 0.0)
        total += numbers
        better = (numbers > best) & (column < columns)
        best, where = tl.where(better, numbers, best), tl.where(better, column, where)
        column += COLUMNS
    token = tl.min(tl.where(best == tl.max(best, 0), where, columns), 0)
    token = tl.where(token < columns, token, 0).to(tl.int64)
    tl.store(tokens + row, token)
    total_of_all = tl.sum(total, 0)
    tl.store(told + row, tl.where(total_of_all - total_of_all == 0.0, token, otherwise))


def likeliest(logits_RV: Tensor, otherwise: int) -> tuple[Tensor, Tensor]:
    """Each row's likeliest token (R), and the same with `otherwise` for rows that hold something else than numbers."""
    tokens_R, told_R = torch.empty(2, len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    largest[(len(logits_RV),)](
        logits_RV, tokens_R, told_R, logits_RV.shape[1], otherwise, COLUMNS=_COLUMNS, num_warps=16
    )
    return tokens_R, told_R
