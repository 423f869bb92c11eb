"""Decode steps in shapes that repeat, so that a step on a GPU is one launch and not hundreds.

A step that is nothing but single tokens is padded to a bucket of rows and attends over a bucket of context, out of
buffers that never move. Each pair of buckets is captured once and replayed after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.loader import Limits
from engine.scheduler import Segment
from llama2 import Transformer

log = logging.getLogger(__name__)

# Less context is not worth a graph of its own.
LEAST_CONTEXT = 256
_WARM_UPS = 2

# From what is to be computed, already with a step's numbers in its buffers, to what computes it again and again.
# Running it while capturing does no harm: it puts the same keys and values into the same places.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaCapture:
    """Captures on one GPU. All graphs share one pool of memory, since only one of them runs at a time."""

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], None]) -> Callable[[], None]:
        """Run it until libraries have chosen and allocated what they want, then capture it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile is no part of the graph and must not spoil it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            forward()
        return graph.replay


class DecodeGraphs:
    """The static buffers of decode steps, and what was captured for each bucket."""

    def __init__(self, model: Transformer, cache: KVCache, limits: Limits, device: str, capture: Capture) -> None:
        """The cache needs a position more than sequences have, where padded rows may write."""
        self._model, self._cache, self._capture = model, cache, capture
        self._slots, self._longest, self._ragged = limits.max_batch_size, limits.max_seq_len, limits.ragged
        self._numbers = torch.zeros(4 * self._slots, dtype=torch.int64, device=device)
        self._logits_RV = torch.zeros(self._slots, model.args.vocab_size, device=device)
        self._replays: dict[tuple[int, int, bool], Callable[[], None]] = {}
        self.failed = False

    def run(self, segments: Ordered[Segment], tokens_N: Tensor | None = None) -> Tensor | None:
        """Logits (R, V), which the next step overwrites; None where the step has to be computed the ordinary way.

        `tokens_N`, on the device, stand for the segments' own.
        """
        if self.failed or not all(len(segment.tokens) == segment.logits == 1 for segment in segments):
            return None
        if self._ragged:  # reads the slots where they lie, and no more of them than there is
            rows, in_place, context = bucket(len(segments), 1, self._slots), False, self._longest
        else:
            rows, in_place = self._rows(segments)
            context = bucket(max(segment.start for segment in segments) + 1, LEAST_CONTEXT, self._longest)
        self._fill(segments, rows, in_place, tokens_N)
        key = (rows, context, in_place)
        if key not in self._replays:
            try:
                self._replays[key] = self._capture(lambda: self._forward(*key))
            except RuntimeError as error:  # out of memory is one, too
                log.warning("no CUDA graphs from here on, so decode is slower: capturing one failed: %s", error)
                self.failed = True
                self._replays.clear()
                return None
        self._replays[key]()
        return self._logits_RV[: len(segments)]

    def _rows(self, segments: Ordered[Segment]) -> tuple[int, bool]:
        """How many rows to compute, and whether row and slot are the same, so that the cache is read where it lies.

        Otherwise the slots in use are first brought together, which moves their keys and values three times instead of
        once: dearer than reading twice as many slots, cheaper than four times.
        """
        few = bucket(len(segments), 1, self._slots)
        many = bucket(max(segment.slot for segment in segments) + 1, 1, self._slots)
        return (many, True) if many <= 2 * few else (few, False)

    def _views(self, rows: int) -> Tensor:
        """Tokens, positions, slots and the rows whose logits are wanted, side by side for one copy to the device."""
        return self._numbers[: 4 * rows].view(4, rows)

    def _fill(self, segments: Ordered[Segment], rows: int, in_place: bool, tokens_N: Tensor | None) -> None:
        """Put a step's numbers into the buffers; the padded rows write to the position that nobody reads."""
        tokens, positions, slots, wanted = [0] * rows, [self._longest] * rows, list(range(rows)), [0] * rows
        for index, segment in enumerate(segments):
            row = segment.slot if in_place else index
            tokens[row], positions[row], slots[row] = segment.tokens[0], segment.start, segment.slot
            wanted[index] = row
        view = self._views(rows)
        view.copy_(torch.tensor((tokens, positions, slots, wanted)), non_blocking=True)
        if tokens_N is not None:
            view[0, view[3, : len(segments)]] = tokens_N

    def _forward(self, rows: int, context: int, in_place: bool) -> None:
        """The buffers through the model. Everything here may be captured, so nothing here may look at a value."""
        tokens_N, positions_N, slots_N, wanted_R = self._views(rows)
        self._cache.begin_padded(slots_N, positions_N, slice(0, rows) if in_place else slots_N, context)
        # Without a slot in every row the wanted ones are all, in order.
        self._logits_RV[:rows] = self._model(tokens_N, positions_N, self._cache, wanted_R if in_place else None)


def bucket(size: int, least: int, most: int) -> int:
    """The next power of two, within the limits."""
    return min(most, max(least, 1 << (size - 1).bit_length()))
