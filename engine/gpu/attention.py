"""Attention of single tokens on a GPU, in Triton: every key and value is read once, by many programs side by side.

PyTorch's attention for ragged sequences computes 64 queries at once where a decode step has one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu import processors
from engine.gpu.ahead import overlapping, wait
from engine.ragged_cache import RaggedCache

_LOG2_E = 1.4426950408889634
LEAST = tl.constexpr(-1e30)  # as a score: nothing
_PROGRAMS_PER_PROCESSOR, _MOST_SHARES = 4, 32


@triton.jit
def attend(
    qkv, cosine, sine, slots, positions, keys, values, y, parts, sums, arrived, scale, slot_size, beyond,
    KV_HEADS: tl.constexpr, HEADS_PER_KEY: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, NUMBERS: tl.constexpr, SHARES: tl.constexpr, POSITIONS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One share of a sequence's positions, for the heads that have a key in common. The last share adds them all up.

    Queries and the new key are turned here, and the new key and value put into the cache.
    """
    token, key_head, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    wait(AHEAD)
    position_of_token = tl.load(positions + token).to(tl.int32)
    begin_of_slot = tl.load(slots + token) * slot_size
    last = tl.where(position_of_token < beyond, position_of_token, 0)
    size = tl.cdiv(tl.cdiv(last + 1, SHARES), POSITIONS) * POSITIONS
    begin = share * size
    end = tl.minimum(begin + size, last)

    STRIDE: tl.constexpr = KV_HEADS * WIDTH
    first = (begin_of_slot * KV_HEADS + key_head) * WIDTH
    number = tl.arange(0, NUMBERS)
    inside = number < WIDTH
    if QUERIES == 1:  # on their way while the query is turned
        first_k = kept_at(keys + first, begin + tl.arange(0, POSITIONS), end, number, inside, STRIDE)
        first_v = kept_at(values + first, begin + tl.arange(0, POSITIONS), end, number, inside, STRIDE)
    query = tl.arange(0, QUERIES)[:, None]
    there = (query < HEADS_PER_KEY) & inside[None, :]
    heads = qkv + token * (HEADS_PER_KEY + 2) * KV_HEADS * WIDTH
    turn = token * (WIDTH // 2) + number // 2
    c = tl.load(cosine + turn, inside, 0.0)
    s = tl.load(sine + turn, inside, 0.0) * tl.where(number % 2 == 0, -1.0, 1.0)
    queries = heads + (key_head * HEADS_PER_KEY + query) * WIDTH
    q = tl.load(queries + number[None, :], there, 0.0).to(tl.float32) * c[None, :]
    q += tl.load(queries + (number ^ 1)[None, :], there, 0.0).to(tl.float32) * s[None, :]
    q = q.to(y.dtype.element_ty)

    if QUERIES == 1:
        best, weight, total = one_query(
            q, first_k, first_v, keys + first, values + first, begin, end, scale, number, inside, STRIDE, POSITIONS
        )
    else:
        best, weight, total = queries_together(
            q, keys + first, values + first, begin, end, scale, number, inside, STRIDE, POSITIONS
        )
    if (begin <= last) & (last < begin + size):
        new = heads + (KV_HEADS * HEADS_PER_KEY + key_head) * WIDTH
        k = tl.load(new + number, inside, 0.0).to(tl.float32) * c
        k += tl.load(new + (number ^ 1), inside, 0.0).to(tl.float32) * s
        k = k.to(y.dtype.element_ty)
        v = tl.load(new + KV_HEADS * WIDTH + number, inside, 0.0)
        place = first + position_of_token.to(tl.int64) * STRIDE + number
        tl.store(keys + place, k, inside)
        tl.store(values + place, v, inside)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        better = tl.maximum(best, score)
        less, p = tl.exp2(best - better), tl.exp2(score - better)
        best, weight = better, weight * less + p
        total = total * less[:, None] + p[:, None] * v.to(tl.float32)[None, :]

    target = y + (token * KV_HEADS + key_head) * (HEADS_PER_KEY * WIDTH) + query * WIDTH + number[None, :]
    if SHARES == 1:
        tl.store(target, (total / weight[:, None]).to(y.dtype.element_ty), there)
    else:
        which = token * KV_HEADS + key_head
        part = (which * SHARES + share) * QUERIES + tl.arange(0, QUERIES)
        tl.store(parts + part[:, None] * NUMBERS + number[None, :], total, there)
        tl.store(sums + 2 * part, best)
        tl.store(sums + 2 * part + 1, weight)
        tl.debug_barrier()
        if tl.atomic_add(arrived + which, 1, sem="acq_rel") == SHARES - 1:
            all_parts = (which * SHARES + tl.arange(0, SHARES))[:, None] * QUERIES + tl.arange(0, QUERIES)[None, :]
            bests = tl.load(sums + 2 * all_parts, cache_modifier=".cg")
            best = tl.max(bests, 0)
            weights = tl.load(sums + 2 * all_parts + 1, cache_modifier=".cg")
            weight = tl.sum(weights * tl.exp2(bests - best[None, :]), 0)
            total = tl.zeros((QUERIES, NUMBERS), tl.float32)
            for each in tl.static_range(SHARES):
                part = (which * SHARES + each) * QUERIES + tl.arange(0, QUERIES)
                less = tl.exp2(tl.load(sums + 2 * part, cache_modifier=".cg") - best)
                some = tl.load(parts + part[:, None] * NUMBERS + number[None, :], there, 0.0, cache_modifier=".cg")
                total += some * less[:, None]
            tl.store(target, (total / weight[:, None]).to(y.dtype.element_ty), there)
            tl.store(arrived + which, 0)


@triton.jit
def one_query(
    q, k, v, keys, values, begin, end, scale, number, inside, STRIDE: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """The greatest score, the sum of the weights, and of the weighted values; each lane of positions has its own first.

    `k` and `v` are the first positions', and from then on loaded while the ones before are computed with.
    """
    NUMBERS: tl.constexpr = q.shape[1]
    best, weight = tl.full((POSITIONS,), LEAST, tl.float32), tl.zeros((POSITIONS,), tl.float32)
    total = tl.zeros((POSITIONS, NUMBERS), tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        next_k = kept_at(keys, position + POSITIONS, end, number, inside, STRIDE)
        next_v = kept_at(values, position + POSITIONS, end, number, inside, STRIDE)
        score = tl.where(position < end, tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale, LEAST)
        better = tl.maximum(best, score)
        less, p = tl.exp2(best - better), tl.exp2(score - better)
        best, weight = better, weight * less + p
        total = total * less[:, None] + p[:, None] * v.to(tl.float32)
        k, v = next_k, next_v
    greatest = tl.max(best, 0)
    less = tl.exp2(best - greatest)
    total = tl.sum(total * less[:, None], 0)[None, :]
    return tl.zeros((1,), tl.float32) + greatest, tl.zeros((1,), tl.float32) + tl.sum(weight * less, 0), total


@triton.jit
def kept_at(cache, position, end, number, inside, STRIDE: tl.constexpr):
    """Keys or values of some positions."""
    place = position.to(tl.int64)[:, None] * STRIDE + number[None, :]
    return tl.load(cache + place, (position < end)[:, None] & inside[None, :], 0.0)


@triton.jit
def queries_together(q, keys, values, begin, end, scale, number, inside, STRIDE: tl.constexpr, POSITIONS: tl.constexpr):
    """The same of several queries, by products of matrices."""
    QUERIES: tl.constexpr = q.shape[0]
    NUMBERS: tl.constexpr = q.shape[1]
    best, weight = tl.full((QUERIES,), LEAST, tl.float32), tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, NUMBERS), tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        k = kept_at(keys, position, end, number, inside, STRIDE)
        v = kept_at(values, position, end, number, inside, STRIDE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((position < end)[None, :], scores, LEAST)
        better = tl.maximum(best, tl.max(scores, 1))
        less, p = tl.exp2(best - better), tl.exp2(scores - better[:, None])
        best, weight = better, weight * less + tl.sum(p, 1)
        total = total * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return best, weight, total


def attend_turned(qkv_ND: Tensor, cosine: Tensor, sine: Tensor, cache: RaggedCache, layer: int) -> Tensor:
    """Turn queries and keys by angles (N, 1, H/2), keep keys and values, let tokens see their sequences; (N, Q*H)."""
    tokens, wide = qkv_ND.shape
    keys_PKH, values_PKH = cache.of_layer(layer)
    _, kv_heads, width = keys_PKH.shape
    heads_per_key = wide // width // kv_heads - 2
    y = torch.empty(tokens, heads_per_key * kv_heads * width, dtype=qkv_ND.dtype, device=qkv_ND.device)
    sequences = tokens * kv_heads
    share = share_of_work(kv_heads, heads_per_key, width, _shares(sequences, qkv_ND.device))
    size = (sequences * share["SHARES"], share["QUERIES"])
    parts = torch.empty(*size, share["NUMBERS"], device=qkv_ND.device)
    sums = torch.empty(*size, 2, device=qkv_ND.device)
    attend[(tokens, kv_heads, share["SHARES"])](
        qkv_ND, cosine, sine, cache.slots_N, cache.positions_N, keys_PKH, values_PKH, y,
        parts, sums, cache.arrived, _LOG2_E * width**-0.5, cache.length, cache.beyond,
        **share, **overlapping(qkv_ND),
    )  # fmt: skip
    return y


def share_of_work(kv_heads: int, heads_per_key: int, width: int, shares: int) -> dict[str, int]:
    """What one program attends over, and with what: for one head a key measured on an H200, for more not yet."""
    share = {"KV_HEADS": kv_heads, "HEADS_PER_KEY": heads_per_key, "WIDTH": width, "SHARES": shares}
    share["NUMBERS"] = max(16, triton.next_power_of_2(width))  # products of matrices take no fewer
    if heads_per_key == 1:
        return share | {"QUERIES": 1, "POSITIONS": 16, "num_warps": 2}
    return share | {"QUERIES": max(16, triton.next_power_of_2(heads_per_key)), "POSITIONS": 32, "num_warps": 4}


def _shares(sequences: int, device: torch.device) -> int:
    """Into how many shares each sequence's positions go, so that all of a GPU has work."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors(device) // sequences
    return min(_MOST_SHARES, 1 << max(0, wanted.bit_length() - 1))
