"""What lies between a layer's products on a GPU, in Triton: one kernel each, so that a step has few launches.

Importing this needs Triton, which comes with PyTorch for CUDA; `engine.gpu.block` does so where it is wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.ahead import overlapping, wait

_GATES = 1024  # of one program


@triton.jit
def rotate_and_place(
    qkv, cosine, sine, places, q, keys, values,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query turned, a key turned and put into the cache, or a value put there."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    inside = pair < WIDTH // 2
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH + 2 * pair
    even, odd = tl.load(source, inside, 0.0), tl.load(source + 1, inside, 0.0)
    place = tl.load(places + token).to(tl.int64) * KV_HEADS
    if head < HEADS + KV_HEADS:
        turn = token * (WIDTH // 2) + pair
        c, s = tl.load(cosine + turn, inside, 0.0), tl.load(sine + turn, inside, 0.0)
        x, y = even.to(tl.float32), odd.to(tl.float32)
        even, odd = (x * c - y * s).to(even.dtype), (x * s + y * c).to(odd.dtype)
    if head < HEADS:
        target = q + (token * HEADS + head) * WIDTH + 2 * pair
        tl.store(target, even, inside)
        tl.store(target + 1, odd, inside)
    elif head < HEADS + KV_HEADS:
        target = keys + (place + head - HEADS) * WIDTH + 2 * pair
        tl.store(target, even, inside)
        tl.store(target + 1, odd, inside)
    else:
        target = values + (place + head - HEADS - KV_HEADS) * WIDTH + 2 * pair
        tl.store(target, even, inside)
        tl.store(target + 1, odd, inside)


def place_rotated(
    qkv_ND: Tensor, cosine: Tensor, sine: Tensor, places_N: Tensor, keys_PKH: Tensor, values_PKH: Tensor
) -> Tensor:
    """Queries (N, Q, H), turned by the angles (N, 1, H/2); keys, turned too, and values go to their places."""
    tokens, wide = qkv_ND.shape
    _, kv_heads, width = keys_PKH.shape
    heads = wide // width - 2 * kv_heads
    q_NQH = torch.empty(tokens, heads, width, dtype=qkv_ND.dtype, device=qkv_ND.device)
    grid = (tokens, heads + 2 * kv_heads)
    pairs = triton.next_power_of_2(width // 2)
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "WIDTH": width, "PAIRS": pairs, "num_warps": 1}
    rotate_and_place[grid](qkv_ND, cosine, sine, places_N, q_NQH, keys_PKH, values_PKH, **sizes)
    return q_NQH


@triton.jit
def root_mean_square(x, weight, y, columns, epsilon, COLUMNS: tl.constexpr, AHEAD: tl.constexpr):
    """One token, normalised."""
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    row = tl.program_id(0).to(tl.int64) * columns + column
    gain = tl.load(weight + column, inside, 0.0).to(tl.float32)
    wait(AHEAD)
    numbers = tl.load(x + row, inside, 0.0).to(tl.float32)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers) / columns + epsilon) * gain
    tl.store(y + row, numbers.to(y.dtype.element_ty), inside)


def normalise(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """What `RMSNorm` does."""
    y_ND = torch.empty_like(x_ND)
    tokens, columns = x_ND.shape
    wide = triton.next_power_of_2(columns)
    sizes = {"COLUMNS": wide, "num_warps": 4 if wide <= 2048 else 8}
    root_mean_square[(tokens,)](x_ND, weight_D, y_ND, columns, epsilon, **sizes, **overlapping(x_ND))
    return y_ND


@triton.jit
def multiply_by_silu(gate_up, y, columns, COLUMNS: tl.constexpr, AHEAD: tl.constexpr):
    """Some columns of one token."""
    wait(AHEAD)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    source = gate_up + token * 2 * columns + column
    gate, up = tl.load(source, inside, 0.0).to(tl.float32), tl.load(source + columns, inside, 0.0).to(tl.float32)
    tl.store(y + token * columns + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), inside)


def swiglu(gate_up_NF: Tensor) -> Tensor:
    """The second half of each row, times the silu of the first."""
    tokens, wide = gate_up_NF.shape
    y = torch.empty(tokens, wide // 2, dtype=gate_up_NF.dtype, device=gate_up_NF.device)
    grid = (tokens, triton.cdiv(wide // 2, _GATES))
    multiply_by_silu[grid](gate_up_NF, y, wide // 2, COLUMNS=_GATES, **overlapping(gate_up_NF))
    return y
