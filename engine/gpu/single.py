"""One token times a weight on a GPU, in Triton: as fast as the weight can be read.

With whole numbers the token's are rounded to 8 bits, with a scale for every 32 of them, since there is an instruction
for four products of bytes, and to convert a weight's numbers one by one takes longer than reading them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.ahead import overlapping, wait

_ROUNDED = 1024  # columns of one program, in groups of:
_TOGETHER = tl.constexpr(32)
# Added to a whole number's bits this makes them those of a floating-point number, and so much more.
_BITS, _MORE = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)


@triton.jit
def floats(
    x, weights, residual, y, rows, columns,
    ADD: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights of 16 bits or more."""
    starts = weights + some_rows(rows, ROWS) * columns
    column = tl.arange(0, COLUMNS)[None, :]
    following = tl.load(starts + column, column < columns, 0.0)
    wait(AHEAD)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, columns, COLUMNS):
        numbers = following
        some_x = tl.load(x + column, column < columns, 0.0).to(tl.float32)
        column += COLUMNS
        following = tl.load(starts + column, column < columns, 0.0)
        total += numbers.to(tl.float32) * some_x
    put(tl.sum(total, 1), residual, y, rows, ROWS, ADD)


@triton.jit
def small_floats(
    x, words, scales, residual, y, rows, count,
    ADD: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """float8_e4m3 and one scale per row, by words of four bytes, `count` in a row."""
    row = some_rows(rows, ROWS)
    starts = words + row * count
    word = tl.arange(0, WORDS)[None, :]
    following = tl.load(starts + word, word < count, 0)
    scale = tl.load(scales + row)
    wait(AHEAD)
    total = tl.zeros((ROWS, WORDS), tl.float32)
    for _ in range(0, count, WORDS):
        four, inside, some_x = following, word < count, x + 4 * word
        word += WORDS
        following = tl.load(starts + word, word < count, 0)
        a, b = tl.load(some_x, inside, 0.0).to(tl.float32), tl.load(some_x + 1, inside, 0.0).to(tl.float32)
        c, d = tl.load(some_x + 2, inside, 0.0).to(tl.float32), tl.load(some_x + 3, inside, 0.0).to(tl.float32)
        if BITS:
            total = tl.inline_asm_elementwise(
                """{
                .reg .b16 low, high, p, q, r, s;
                .reg .b32 first, second;
                .reg .f32 number;
                mov.b32 {low, high}, $2;
                cvt.rn.f16x2.e4m3x2 first, low;
                cvt.rn.f16x2.e4m3x2 second, high;
                mov.b32 {p, q}, first;
                mov.b32 {r, s}, second;
                cvt.f32.f16 number, p;
                fma.rn.f32 $0, number, $3, $1;
                cvt.f32.f16 number, q;
                fma.rn.f32 $0, number, $4, $0;
                cvt.f32.f16 number, r;
                fma.rn.f32 $0, number, $5, $0;
                cvt.f32.f16 number, s;
                fma.rn.f32 $0, number, $6, $0;
                }""",
                "=&f,f,r,f,f,f,f", [total, four, a, b, c, d], dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            total += small_float(four, 0) * a + small_float(four, 8) * b
            total += small_float(four, 16) * c + small_float(four, 24) * d
    put(tl.sum(total * scale, 1), residual, y, rows, ROWS, ADD)


@triton.jit
def small_float(words, BIT: tl.constexpr):
    """A byte of each word."""
    return (words >> BIT).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def rounded(x, words, scales, columns, count, GROUPS: tl.constexpr, AHEAD: tl.constexpr):
    """Some groups of the token in 8 bits, four in a word, and for each word its scale; zeros behind the last column."""
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None]
    word = group * (_TOGETHER // 4) + tl.arange(0, _TOGETHER // 4)[None, :]
    byte = tl.arange(0, 4)[None, None, :]
    column = 4 * word[:, :, None] + byte
    wait(AHEAD)
    numbers = tl.load(x + column, column < columns, 0.0).to(tl.float32)
    scale = tl.max(tl.max(tl.abs(numbers), 2), 1)[:, None] / 127.0
    scale += tl.sum(tl.sum(numbers * 0.0, 2), 1)[:, None]  # what is no number stays none: a maximum passes over it
    bits = (numbers / tl.where(scale > 0.0, scale, 1.0)[:, :, None] + _MORE).to(tl.int32, bitcast=True)
    tl.store(words + word, tl.xor_sum((bits & 255) << 8 * byte, 2), word < count)
    tl.store(scales + word, scale + tl.zeros(word.shape, tl.float32), word < count)


@triton.jit
def whole_bytes(
    x, x_scales, words, scales, residual, y, rows, count,
    ADD: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Whole numbers of 8 bits and one scale per row, by words of four, `count` in a row."""
    row = some_rows(rows, ROWS)
    starts = words + row * count
    word = tl.arange(0, WORDS)[None, :]
    following = tl.load(starts + word, word < count, 0)
    scale = tl.load(scales + row)
    wait(AHEAD)
    total = tl.zeros((ROWS, WORDS), tl.float32)
    for _ in range(0, count, WORDS):
        four = following
        some_x, x_scale = tl.load(x + word, word < count, 0), tl.load(x_scales + word, word < count, 0.0)
        word += WORDS
        following = tl.load(starts + word, word < count, 0)
        total += (four_products(four, some_x, BITS) - _MORE) * x_scale
    put(tl.sum(total * scale, 1), residual, y, rows, ROWS, ADD)


@triton.jit
def whole_halves(
    x, x_scales, words, scales, residual, y, rows, count, groups,
    ADD: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Whole numbers of 4 bits: a byte has one of a row's first half, and above it its counterpart of the second.

    Half a row is `count` words of four bytes, or `groups` of WORDS, each with two scales.
    """
    row = some_rows(rows, ROWS)
    starts, scale_starts = words + row * count, scales + row * (2 * groups)
    group, word = tl.arange(0, GROUPS)[None, :], tl.arange(0, GROUPS * WORDS)[None, :]
    following = tl.load(starts + word, word < count, 0)
    next_low = tl.load(scale_starts + group, group < groups, 0.0)
    next_high = tl.load(scale_starts + groups + group, group < groups, 0.0)
    wait(AHEAD)
    total = tl.zeros((ROWS, GROUPS, WORDS), tl.float32)
    for _ in range(0, groups, GROUPS):
        eight, low_scale, high_scale = following, next_low.to(tl.float32), next_high.to(tl.float32)
        inside = word < count
        low_x, low_x_scale = tl.load(x + word, inside, 0), tl.load(x_scales + word, inside, 0.0)
        high_x, high_x_scale = tl.load(x + count + word, inside, 0), tl.load(x_scales + count + word, inside, 0.0)
        group += GROUPS
        word += GROUPS * WORDS
        following = tl.load(starts + word, word < count, 0)
        next_low = tl.load(scale_starts + group, group < groups, 0.0)
        next_high = tl.load(scale_starts + groups + group, group < groups, 0.0)
        # A number from 0 to 15 stands for 8 less, so for each word 8 times its activations' sum is taken off.
        eights = tl.full((1, 1), 0x08080808, tl.int32)
        low = four_products(eight & 0x0F0F0F0F, low_x, BITS) - four_products(eights, low_x, BITS)
        high = four_products(eight >> 4 & 0x0F0F0F0F, high_x, BITS) - four_products(eights, high_x, BITS)
        total += tl.reshape(low * low_x_scale, (ROWS, GROUPS, WORDS)) * low_scale[:, :, None]
        total += tl.reshape(high * high_x_scale, (ROWS, GROUPS, WORDS)) * high_scale[:, :, None]
    put(tl.sum(tl.sum(total, 2), 1), residual, y, rows, ROWS, ADD)


@triton.jit
def four_products(a, b, BITS: tl.constexpr):
    """The sum of the products of the four bytes of each word, and _MORE."""
    if BITS:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0x4B400000;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        sums = (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
        sums += (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24) + _BITS
    return sums.to(tl.float32, bitcast=True)


@triton.jit
def some_rows(rows, ROWS: tl.constexpr):
    """The rows of this program, below one another; the last one again where there are no more."""
    return tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], rows - 1).to(tl.int64)


@triton.jit
def put(sums, residual, y, rows, ROWS: tl.constexpr, ADD: tl.constexpr):
    """The sums of this program's rows to their places."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if ADD:
        sums += tl.load(residual + row, row < rows, 0.0).to(tl.float32)
    tl.store(y + row, sums.to(y.dtype.element_ty), row < rows)


def times_floats(x_1D: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """A token times a weight's transpose, and what is added to it."""
    rows, columns = weight.shape
    y, grid, options = _target(x_1D, rows, residual, {"ROWS": 4, "COLUMNS": 1024})
    floats[grid](x_1D, weight, residual, y, rows, columns, **options)
    return y


def times_numbers(x_1D: Tensor, weights: Tensor, scales: Tensor, group: int | None, residual: Tensor | None) -> Tensor:
    """The same of numbers of 8 bits, or of 4 if they have a scale for every `group`."""
    rows, size = weights.shape
    count, words = size // 4, weights.view(torch.int32)
    bits: dict[str, Any] = {"BITS": x_1D.is_cuda}
    if group is not None:
        groups = size // group
        # Many rows of few columns, but where such stretches do not fill the rows longer ones of fewer.
        share = {"ROWS": 16, "GROUPS": 512 // group} if size % 512 == 0 else {"ROWS": 8, "GROUPS": 1024 // group}
        y, grid, options = _target(x_1D, rows, residual, share | bits | {"WORDS": group // 4})
        whole_halves[grid](*_rounded(x_1D, 2 * count), words, scales, residual, y, rows, count, groups, **options)
        return y
    y, grid, options = _target(x_1D, rows, residual, {"ROWS": 4, "WORDS": 512} | bits)
    if weights.dtype == torch.float8_e4m3fn:
        small_floats[grid](x_1D, words, scales, residual, y, rows, count, **options)
    else:
        whole_bytes[grid](*_rounded(x_1D, count), words, scales, residual, y, rows, count, **options)
    return y


def _target(
    x_1D: Tensor, rows: int, residual: Tensor | None, share: dict[str, Any]
) -> tuple[Tensor, tuple[int], dict[str, Any]]:
    """Where products go, by how many programs, and launched how."""
    y = torch.empty(1, rows, dtype=x_1D.dtype, device=x_1D.device)
    options = share | overlapping(x_1D) | {"ADD": residual is not None, "num_warps": 4}
    return y, (triton.cdiv(rows, share["ROWS"]),), options


def _rounded(x_1D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A token in 8 bits, `count` words of four; and each word's scale."""
    words = torch.empty(count, dtype=torch.int32, device=x_1D.device)
    scales = torch.empty(count, dtype=torch.float32, device=x_1D.device)
    options = {"GROUPS": _ROUNDED // _TOGETHER.value, "num_warps": 4} | overlapping(x_1D)
    rounded[(triton.cdiv(4 * count, _ROUNDED),)](x_1D, words, scales, x_1D.shape[1], count, **options)
    return words, scales
