"""The cache of a GPU whose attention takes sequences of any length side by side, so that each costs what it has.

One call of PyTorch's `varlen_attn` serves all tokens of a step, single ones and chunks of prompts. It reads the slots
where they lie: a slot is a run of positions in one long row of keys, and how many of them count is a number on the
device, so that a captured step need not be padded to a bucket of context.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engine.gpu import NotOnThisGpu
from engine.kv_cache import KVCache
from engine.scheduler import Segment

_CAUSAL = (-1, 0)  # as a window: everything before a token, nothing behind it


class RaggedCache(KVCache):
    """Keys and values of a slot position by position, all heads of one side by side."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, max_seq_len: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> None:
        shape = (layers, slots * max_seq_len, kv_heads, head_dim)
        self._keys_LPKH = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LPKH = torch.zeros(shape, dtype=dtype, device=device)
        # Attention sees one long row of P positions, everything else the same memory in KVCache's order.
        self.keys_LBKTH, self.values_LBKTH = (
            cache.unflatten(1, (slots, max_seq_len)).transpose(2, 3) for cache in (self._keys_LPKH, self._values_LPKH)
        )
        self._device, self.length = device, max_seq_len
        self.arrived = torch.zeros(slots * kv_heads, dtype=torch.int32, device=device)
        """For kernels that share a sequence's positions: how many of them have done theirs; 0 between steps."""

    def begin(self, segments: Ordered[Segment], positions_N: Tensor) -> None:
        counts = [len(segment.tokens) for segment in segments]
        lengths = [segment.start + count for segment, count in zip(segments, counts, strict=True)]
        slots = [segment.slot for segment in segments]
        self._most, self._longest, self.singles = max(counts), max(lengths), max(counts) == 1
        if self.singles:
            self._begin_singles(torch.tensor(slots, device=self._device), positions_N, self.length)
            return
        numbers = torch.tensor((slots, counts, lengths), device=self._device)
        begins_N = (numbers[0] * self.length).repeat_interleave(numbers[1], output_size=sum(counts))
        self.places_N = begins_N + positions_N
        self._describe(numbers[0], F.pad(numbers[1].cumsum(0), (1, 0)), numbers[2])

    def begin_padded(self, slots_N: Tensor, positions_N: Tensor, view: slice | Tensor, length: int) -> None:
        self._most, self._longest, self.singles = 1, self.length, True
        self._begin_singles(slots_N, positions_N, self.length - 1)

    def _begin_singles(self, slots_N: Tensor, positions_N: Tensor, beyond: int) -> None:
        """A row at the position `beyond` is padding, and sees nothing but itself."""
        self.slots_N, self.positions_N, self.beyond, self._lengths = slots_N, positions_N, beyond, None

    def _describe_singles(self) -> None:
        self.places_N = self.slots_N * self.length + self.positions_N
        lengths_N = torch.where(self.positions_N < self.beyond, self.positions_N + 1, 1)
        self._describe(self.slots_N, torch.arange(len(self.slots_N) + 1, device=self._device), lengths_N)

    def _describe(self, slots: Tensor, ends: Tensor, lengths: Tensor) -> None:
        """Where each sequence's tokens are in the step, where its slot begins, and how much of that counts."""
        self._tokens_end = ends.int()
        self._slots_begin = F.pad(slots * self.length, (0, 1)).int()
        self._lengths = lengths.int()

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, H); a step's tokens go to `places_N` of them."""
        return self._keys_LPKH[layer], self._values_LPKH[layer]

    def attend(self, layer: int, q_NQH: Tensor, k_NKH: Tensor, v_NKH: Tensor) -> Tensor:
        if self._lengths is None:
            self._describe_singles()
        keys_PKH, values_PKH = self.of_layer(layer)
        keys_PKH[self.places_N], values_PKH[self.places_N] = k_NKH, v_NKH
        return self.attend_over_kept(layer, q_NQH)

    def attend_over_kept(self, layer: int, q_NQH: Tensor) -> Tensor:
        """Let every token see its sequence up to itself, whose keys and values are there already; (N, Q, H)."""
        keys_PKH, values_PKH = self.of_layer(layer)
        return varlen_attn(
            q_NQH,
            keys_PKH,
            values_PKH,
            self._tokens_end,
            self._slots_begin,
            self._most,
            self._longest,
            window_size=_CAUSAL,
            enable_gqa=True,
            seqused_k=self._lengths,
        )


def check_ragged_attention(device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """Attend over something small, and raise `NotOnThisGpu` if it comes out wrong."""
    if dtype == torch.float32:
        raise NotOnThisGpu("it takes no float32")
    random = torch.Generator().manual_seed(0)
    caches = [kind(1, 3, kv_heads, 80, head_dim, dtype, device) for kind in (KVCache, RaggedCache)]
    steps = (
        (Segment(2, 0, (1,) * 70, 1),),
        (Segment(1, 0, (1,) * 3, 1),),
        (Segment(1, 3, (1,), 1), Segment(2, 70, (1,) * 4, 1), Segment(0, 0, (1,) * 20, 1)),
        (Segment(0, 20, (1,), 1), Segment(2, 74, (1,), 1)),
    )
    for segments in steps:
        positions = [segment.start + place for segment in segments for place in range(len(segment.tokens))]
        positions_N = torch.tensor(positions, device=device)
        shapes = [(len(positions), count, head_dim) for count in (heads, kv_heads, kv_heads)]
        new = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
        expected, found = (_attend(cache, segments, positions_N, new) for cache in caches)
        if not (found - expected).abs().max() <= 0.02 * expected.abs().max():
            raise NotOnThisGpu("it came out wrong in a test")


def _attend(cache: KVCache, segments: Ordered[Segment], positions_N: Tensor, new: list[Tensor]) -> Tensor:
    cache.begin(segments, positions_N)
    return cache.attend(0, *new).float()
