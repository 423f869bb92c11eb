"""Activations times quantized weights on a GPU, in Triton: the numbers are read as they are kept.

Importing this needs Triton, which comes with PyTorch for CUDA; `engine.gpu.linear` does so where it is wanted.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu import processors
from engine.gpu.ahead import overlapping, wait
from engine.gpu.single import times_numbers

# With more tokens than this a weight is unpacked first, and PyTorch multiplies.
MANY = 64
_UNPACKED = 2048  # bytes of one program
# With fewer of them for each processor two programs share the columns of a block of rows.
_LEAST_PROGRAMS = 2


@triton.jit
def whole_numbers(
    x, weights, scales, residual, y, parts, arrived, tokens, rows, columns,
    FP8: tl.constexpr, ADD: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One number in a byte, one scale per row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    starts = weights + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * columns
    x_starts, token_exists = x + token.to(tl.int64)[None, :] * columns, (token < tokens)[None, :]
    begin, end = share_of(columns, COLUMNS)
    wait(AHEAD)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        numbers = tl.load(starts + column[None, :], inside[None, :], 0)
        some_x = tl.load(x_starts + column[:, None], inside[:, None] & token_exists, 0.0)
        if FP8:
            numbers = numbers.to(tl.float8e4nv, bitcast=True).to(tl.float32)  # from there to 16 bits is quick
        total = tl.dot(numbers.to(some_x.dtype), some_x, total, input_precision=EXACT)
    total *= tl.load(scales + row, row < rows, 0.0)[:, None]
    put(total, residual, y, parts, arrived, row, token, tokens, rows, ADD)


@triton.jit
def halves_of_bytes(
    x, weights, scales, residual, y, parts, arrived, tokens, rows, columns, half,
    ADD: tl.constexpr, AHEAD: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Two numbers in a byte: one of a row's first half, and its counterpart of the second.

    `half` is a multiple of GROUP, so that each half has scales of its own.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    some_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    groups = half // GROUP
    starts, scale_starts = weights + some_row * half, scales + some_row * (2 * groups)
    x_starts, token_exists = x + token.to(tl.int64)[None, :] * columns, (token < tokens)[None, :]
    begin, end = share_of(half, COLUMNS)
    wait(AHEAD)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(begin, end, COLUMNS):
        column, group = start + tl.arange(0, COLUMNS), start // GROUP + tl.arange(0, COLUMNS // GROUP)[None, :]
        pairs = tl.load(starts + column[None, :], (column < half)[None, :], 0)
        low_x = tl.load(x_starts + column[:, None], (column < half)[:, None] & token_exists, 0.0)
        high_inside = (column < half) & (half + column < columns)
        high_x = tl.load(x_starts + half + column[:, None], high_inside[:, None] & token_exists, 0.0)
        low_scale = tl.load(scale_starts + group, group < groups, 0.0).to(low_x.dtype)
        high_scale = tl.load(scale_starts + groups + group, group < groups, 0.0).to(low_x.dtype)
        low, high = as_floats(pairs, low_x.dtype, BITS)
        total = tl.dot(low * spread(low_scale, GROUP), low_x, total, input_precision=EXACT)
        total = tl.dot(high * spread(high_scale, GROUP), high_x, total, input_precision=EXACT)
    put(total, residual, y, parts, arrived, row, token, tokens, rows, ADD)


@triton.jit
def share_of(columns, COLUMNS: tl.constexpr):
    """Which of the columns are this program's, whole blocks of them."""
    size = tl.cdiv(tl.cdiv(columns, COLUMNS), tl.num_programs(2)) * COLUMNS
    begin = tl.program_id(2) * size
    return begin, tl.minimum(begin + size, columns)


@triton.jit
def spread(scales, GROUP: tl.constexpr):
    """For each column the scale of its group."""
    ROWS: tl.constexpr = scales.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, GROUP)), (ROWS, GROUPS * GROUP))


# Four bytes' lower numbers and then their upper ones, each as a pair of 16 bits: a byte under an exponent, times one,
# less what the exponent adds.
_HALVES_APART = """{{
    .reg .b32 some, one, less;
    mov.b32 one, {one};
    mov.b32 less, {less};
    and.b32 some, $4, 0x0F0F0F0F;
    prmt.b32 $0, some, {exponent}, 0x4140;
    prmt.b32 $1, some, {exponent}, 0x4342;
    fma.rn.{kind} $0, $0, one, less;
    fma.rn.{kind} $1, $1, one, less;
    shr.u32 some, $4, 4;
    and.b32 some, some, 0x0F0F0F0F;
    prmt.b32 $2, some, {exponent}, 0x4140;
    prmt.b32 $3, some, {exponent}, 0x4342;
    fma.rn.{kind} $2, $2, one, less;
    fma.rn.{kind} $3, $3, one, less;
}}"""
_IN_BFLOAT16 = tl.constexpr(
    _HALVES_APART.format(kind="bf16x2", exponent="0x43434343", one="0x3F803F80", less="0xC308C308")
)
_IN_FLOAT16 = tl.constexpr(
    _HALVES_APART.format(kind="f16x2", exponent="0x64646464", one="0x3C003C00", less="0xE408E408")
)


@triton.jit
def as_floats(pairs, dtype: tl.constexpr, BITS: tl.constexpr):
    """Both numbers of a byte, -8 to 7: by their bits, as instructions that convert are slow.

    Under an exponent that makes its place count as a whole number, one is itself and 128 (in float16 1024).
    """
    if BITS == "bfloat16":
        return tl.inline_asm_elementwise(
            _IN_BFLOAT16, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif BITS == "float16":
        return tl.inline_asm_elementwise(
            _IN_FLOAT16, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return ((pairs & 15).to(tl.int8) - 8).to(dtype), ((pairs >> 4).to(tl.int8) - 8).to(dtype)


@triton.jit
def put(total, residual, y, parts, arrived, row, token, tokens, rows, ADD: tl.constexpr):
    """Sums of rows and tokens to their places; if several programs share the columns, by the last of them."""
    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    exists = (row < rows)[:, None] & (token < tokens)[None, :]
    shares, others = tl.num_programs(2), 0
    if shares > 1:
        size = tokens.to(tl.int64) * rows
        tl.store(parts + tl.program_id(2) * size + place, total, exists)
        tl.debug_barrier()
        which = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        others = shares - 1 - tl.atomic_add(which, 1, sem="acq_rel")
        if others == 0:
            total = tl.zeros(total.shape, tl.float32)
            for share in range(shares):
                total += tl.load(parts + share * size + place, exists, 0.0, cache_modifier=".cg")
            tl.store(which, 0)
    if others == 0:
        if ADD:
            total += tl.load(residual + place, exists, 0.0).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), exists)


@triton.jit
def unpack_bytes(weights, scales, y, columns, FP8: tl.constexpr, COLUMNS: tl.constexpr):
    """Some weights of a row as what they stand for: one number in a byte."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place, inside = row * columns + column, column < columns
    numbers = tl.load(weights + place, inside, 0)
    if FP8:
        numbers = numbers.to(tl.float8e4nv, bitcast=True)
    numbers = numbers.to(tl.float32) * tl.load(scales + row)
    tl.store(y + place, numbers.to(y.dtype.element_ty), inside)


@triton.jit
def unpack_halves(weights, scales, y, columns, half, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of two numbers in a byte."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, scale = column < half, scales + (row * 2 * half + column) // GROUP
    pairs = tl.load(weights + row * half + column, inside, 0)
    low = small(pairs & 15) * tl.load(scale, inside, 0.0).to(tl.float32)
    high = small(pairs >> 4) * tl.load(scale + half // GROUP, inside, 0.0).to(tl.float32)
    place = y + row * columns + column
    tl.store(place, low.to(y.dtype.element_ty), inside)
    tl.store(place + half, high.to(y.dtype.element_ty), inside & (half + column < columns))


@triton.jit
def small(numbers):
    """0 to 15 for -8 to 7, in float32: by their bits, as instructions that convert are slow."""
    return (numbers.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


def product(x_ND: Tensor, weights: Tensor, scales: Tensor, group: int | None, residual: Tensor | None = None) -> Tensor:
    """`x_ND` times a weight's transpose, and what is added to it.

    The weight's numbers are bytes, two in each if they have a scale for every `group`.
    """
    x_ND = x_ND.contiguous()
    tokens, columns = x_ND.shape
    if tokens == 1 and weights.shape[1] % 4 == 0:
        return times_numbers(x_ND, weights, scales, group, residual)
    if tokens > MANY:
        weight = unpack(weights, scales, group, columns, x_ND.dtype)
        return F.linear(x_ND, weight) if residual is None else torch.addmm(residual, x_ND, weight.t())
    rows = len(weights)
    y = torch.empty(tokens, rows, dtype=x_ND.dtype, device=x_ND.device)
    share = share_of_work(tokens, group) | overlapping(x_ND) | {"ADD": residual is not None}
    share["EXACT"] = "ieee" if x_ND.dtype == torch.float32 else "tf32"  # the latter says nothing about 16 bits
    blocks = triton.cdiv(rows, share["ROWS"]), triton.cdiv(tokens, share["TOKENS"])
    shares = 2 if math.prod(blocks) < _LEAST_PROGRAMS * processors(x_ND.device) else 1
    grid, parts = (*blocks, shares), torch.empty(shares, tokens, rows, device=x_ND.device)
    arrived = _arrived(x_ND.device)
    if group is None:
        share["FP8"] = weights.dtype == torch.float8_e4m3fn
        numbers = weights.view(torch.int8)
        whole_numbers[grid](x_ND, numbers, scales, residual, y, parts, arrived, tokens, rows, columns, **share)
    else:
        share["BITS"] = str(x_ND.dtype).removeprefix("torch.") if x_ND.is_cuda else ""
        halves_of_bytes[grid](
            x_ND, weights, scales, residual, y, parts, arrived, tokens, rows, columns, weights.shape[1], **share
        )
    return y


@cache
def _arrived(device: torch.device) -> Tensor:
    """How many of the programs that share some rows' columns have summed theirs: 0 for all between two kernels."""
    return torch.zeros(_LEAST_PROGRAMS * processors(device), dtype=torch.int32, device=device)


def share_of_work(tokens: int, group: int | None) -> dict[str, int]:
    """How much of the product one program computes, and with what: measured on an H200, and fits into every GPU since
    Ampere.
    """
    if tokens <= 16:
        share = {"TOKENS": 16, "ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 5}
    else:
        share = {"TOKENS": 64, "ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    return share if group is None else share | {"GROUP": group}


def unpack(weights: Tensor, scales: Tensor, group: int | None, columns: int, dtype: torch.dtype) -> Tensor:
    """What a weight's numbers stand for."""
    rows, size = weights.shape
    y = torch.empty(rows, columns, dtype=dtype, device=weights.device)
    grid, share = (rows, triton.cdiv(size, _UNPACKED)), {"COLUMNS": _UNPACKED, "num_warps": 4}
    if group is None:
        fp8 = weights.dtype == torch.float8_e4m3fn
        unpack_bytes[grid](weights.view(torch.int8), scales, y, columns, FP8=fp8, **share)
    else:
        unpack_halves[grid](weights, scales, y, columns, size, GROUP=group, **share)
    return y
