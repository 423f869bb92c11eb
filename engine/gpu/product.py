"""Activations times quantized weights on a GPU, in Triton: the numbers are read as they are kept.

Importing this needs Triton, which comes with PyTorch for CUDA; `engine.gpu.linear` does so where it is wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def whole_numbers(
    x, weights, scales, y, tokens, rows, columns,
    FP8: tl.constexpr, EXACT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One number in a byte, one scale per row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_exists, token_exists = row < rows, token < tokens
    x_rows, weight_rows = token.to(tl.int64)[:, None] * columns, row.to(tl.int64)[:, None] * columns
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < columns
        some_x = tl.load(x + x_rows + column, token_exists[:, None] & inside, 0.0)
        numbers = tl.load(weights + weight_rows + column, row_exists[:, None] & inside, 0)
        if FP8:
            numbers = numbers.to(tl.float8e4nv, bitcast=True)
        total = tl.dot(some_x, tl.trans(numbers.to(some_x.dtype)), total, input_precision=EXACT)
    total *= tl.load(scales + row, row_exists, 0.0)[None, :]
    places = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), token_exists[:, None] & row_exists[None, :])


@triton.jit
def halves_of_bytes(
    x, weights, scales, y, tokens, rows, columns, half,
    GROUP: tl.constexpr, STEP: tl.constexpr,
    EXACT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Two numbers in a byte: one of a row's first half, and its counterpart of the second.

    `half` is a multiple of GROUP, so that each half has scales of its own. Whole numbers are multiplied first, which
    is exact, and the sums of STEP of them by the scale of their group.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_exists, token_exists = row < rows, token < tokens
    x_rows, weight_rows = token.to(tl.int64)[:, None] * columns, row.to(tl.int64)[:, None] * half
    groups = half // GROUP
    scale_rows = scales + row.to(tl.int64) * (2 * groups)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, half, COLUMNS):
        for part in tl.static_range(0, COLUMNS, STEP):
            column = start + part + tl.arange(0, STEP)[None, :]
            inside = column < half
            pairs = tl.load(weights + weight_rows + column, row_exists[:, None] & inside, 0)
            group = (start + part) // GROUP
            has_scale = row_exists & (group < groups)

            low_x = tl.load(x + x_rows + column, token_exists[:, None] & inside & (column < columns), 0.0)
            low = ((pairs & 15).to(tl.int8) - 8).to(low_x.dtype)
            low_scale = tl.load(scale_rows + group, has_scale, 0.0).to(tl.float32)
            total += tl.dot(low_x, tl.trans(low), input_precision=EXACT) * low_scale[None, :]

            column += half
            high_x = tl.load(x + x_rows + column, token_exists[:, None] & inside & (column < columns), 0.0)
            high = ((pairs >> 4).to(tl.int8) - 8).to(high_x.dtype)
            high_scale = tl.load(scale_rows + groups + group, has_scale, 0.0).to(tl.float32)
            total += tl.dot(high_x, tl.trans(high), input_precision=EXACT) * high_scale[None, :]
    places = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), token_exists[:, None] & row_exists[None, :])


def share_of_work(tokens: int, group: int | None) -> dict[str, int]:
    """How much of the product one program computes, and with what: chosen so that it fits into every GPU since Ampere.

    With few tokens the weights have to be read, so many small programs have many loads under way; with many of them
    it is a matter of multiplying.
    """
    if tokens <= 16:
        share = {"TOKENS": 16, "ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 5}
    elif tokens <= 64:
        share = {"TOKENS": 64, "ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    else:
        share = {"TOKENS": 128, "ROWS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}
    if group is not None:
        share |= {"GROUP": group, "STEP": min(group, share["COLUMNS"])}
    return share


def product(x_ND: Tensor, weights: Tensor, scales: Tensor, group: int | None) -> Tensor:
    """`x_ND` times a weight's transpose. Its numbers are bytes, two in each if they have a scale for every `group`."""
    x_ND = x_ND.contiguous()
    tokens, columns = x_ND.shape
    rows = len(weights)
    y = torch.empty(tokens, rows, dtype=x_ND.dtype, device=x_ND.device)
    share = share_of_work(tokens, group)
    share["EXACT"] = "ieee" if x_ND.dtype == torch.float32 else "tf32"  # the latter says nothing about 16 bits
    grid = (triton.cdiv(rows, share["ROWS"]), triton.cdiv(tokens, share["TOKENS"]))
    if group is None:
        share["FP8"] = weights.dtype == torch.float8_e4m3fn
        whole_numbers[grid](x_ND, weights.view(torch.int8), scales, y, tokens, rows, columns, **share)
    else:
        halves_of_bytes[grid](x_ND, weights, scales, y, tokens, rows, columns, weights.shape[1], **share)
    return y
