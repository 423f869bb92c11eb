"""The preallocated keys and values of all sequences, one slot each, and attention over them.

Slots never move. Shapes: N new tokens of a step, L layers, B slots, K key/value heads, G query heads per key/value
head, Q = K * G, T cached positions, S tokens of one chunk, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.scheduler import Copy, Segment


class KVCache:
    """Keys (already rotated) and values by layer, slot, head and position."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        take: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ) -> None:
        """`take` gives memory of that shape, else it is PyTorch's own."""
        shape = (layers, slots, kv_heads, max_seq_len, head_dim)
        take = take or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        self.keys_LBKTH, self.values_LBKTH = (take(shape, dtype).zero_() for _ in range(2))
        self._device = device

    @staticmethod
    def bytes_needed(
        layers: int, slots: int, kv_heads: int, max_seq_len: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """How much memory a cache of this size takes."""
        return 2 * layers * slots * kv_heads * max_seq_len * head_dim * dtype.itemsize

    def scrub(self, places: Ordered[tuple[int, int]]) -> None:
        """Clear slots that hold numbers which are not finite, each from a position on.

        Masked attention multiplies them by zero, which gives NaN.
        """
        for slot, start in places:
            self.keys_LBKTH[:, slot, :, start:].zero_()
            self.values_LBKTH[:, slot, :, start:].zero_()

    def copy(self, copies: Ordered[Copy]) -> None:
        """Give slots the beginnings of others, one after the other."""
        for copy in copies:
            for cache_LBKTH in (self.keys_LBKTH, self.values_LBKTH):
                cache_LBKTH[:, copy.target, :, : copy.tokens] = cache_LBKTH[:, copy.source, :, : copy.tokens]

    def begin(self, segments: Ordered[Segment], positions_N: Tensor) -> None:
        """Say where the next step's tokens go: single tokens first, by slot, then chunks."""
        slots = [segment.slot for segment in segments for _ in segment.tokens]
        self._slots_N = torch.tensor(slots, device=self._device)
        self._positions_N = positions_N
        singles = [segment for segment in segments if len(segment.tokens) == 1]
        self._count = len(singles)
        if singles:
            self._begin_singles(singles)
        self._chunks = []
        row = len(singles)
        for segment in segments[len(singles) :]:
            rows = slice(row, row + len(segment.tokens))
            row = rows.stop
            mask = None
            if segment.start:  # behind cached tokens the causal triangle is not square
                cached = torch.arange(segment.start + len(segment.tokens), device=self._device)
                mask = cached <= positions_N[rows, None]
            self._chunks.append((segment.slot, segment.start + len(segment.tokens), rows, mask))

    def begin_padded(self, slots_N: Tensor, positions_N: Tensor, view: slice | Tensor, length: int) -> None:
        """Say the same of single tokens whose places only the device knows: row by row they attend over the first
        `length` positions of the slots in `view`, up to their own.
        """
        self._slots_N, self._positions_N = slots_N, positions_N
        self._chunks, self._places = [], None
        self._view, self._longest = view, length
        self._mask = torch.arange(length, device=self._device) <= positions_N[:, None, None, None]

    def _begin_singles(self, singles: list[Segment]) -> None:
        """Choose the view of the cache that all single tokens attend over at once."""
        slots = [segment.slot for segment in singles]
        lengths = [segment.start + 1 for segment in singles]
        first, last = slots[0], slots[-1]
        self._longest = max(lengths)
        self._places = None
        if last - first + 1 == len(slots):
            self._view: slice | Tensor = slice(first, last + 1)
        elif last - first < 2 * len(slots):  # a few gaps: compute their rows too and drop them
            self._view = slice(first, last + 1)
            self._places = torch.tensor([slot - first for slot in slots], device=self._device)
            by_slot = dict(zip(slots, lengths, strict=True))
            lengths = [by_slot.get(slot, 1) for slot in range(first, last + 1)]
        else:
            self._view = torch.tensor(slots, device=self._device)
        self._rows = len(lengths)
        self._mask = None
        if min(lengths) < self._longest:
            ends = torch.tensor(lengths, device=self._device)[:, None, None, None]
            self._mask = torch.arange(self._longest, device=self._device) < ends

    def attend(self, layer: int, q_NQH: Tensor, k_NKH: Tensor, v_NKH: Tensor) -> Tensor:
        """Keep the new keys and values, then let every token see its sequence up to itself; (N, Q, H)."""
        keys_BKTH, values_BKTH = self.keys_LBKTH[layer], self.values_LBKTH[layer]
        keys_BKTH[self._slots_N, :, self._positions_N] = k_NKH
        values_BKTH[self._slots_N, :, self._positions_N] = v_NKH
        if not self._chunks:
            return self._attend_singles(q_NQH, keys_BKTH, values_BKTH)
        out_NQH = torch.empty_like(q_NQH)
        if self._count:
            out_NQH[: self._count] = self._attend_singles(q_NQH[: self._count], keys_BKTH, values_BKTH)
        for slot, length, rows, mask in self._chunks:
            out_1QSH = F.scaled_dot_product_attention(
                q_NQH[rows].transpose(0, 1)[None],
                keys_BKTH[slot, None, :, :length],
                values_BKTH[slot, None, :, :length],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            out_NQH[rows] = out_1QSH[0].transpose(0, 1)
        return out_NQH

    def _attend_singles(self, q_NQH: Tensor, keys_BKTH: Tensor, values_BKTH: Tensor) -> Tensor:
        """All decode rows in one call; the query heads that share a key/value head stand as G queries."""
        count, _, width = q_NQH.shape
        q_NKGH = q_NQH.reshape(count, keys_BKTH.shape[1], -1, width)
        if self._places is not None:
            spread = q_NKGH.new_zeros(self._rows, *q_NKGH.shape[1:])
            spread[self._places] = q_NKGH
            q_NKGH = spread
        out_NKGH = F.scaled_dot_product_attention(
            q_NKGH,
            keys_BKTH[self._view, :, : self._longest],
            values_BKTH[self._view, :, : self._longest],
            attn_mask=self._mask,
        )
        if self._places is not None:
            out_NKGH = out_NKGH[self._places]
        return out_NKGH.reshape(q_NQH.shape)
