"""GGUF's kinds of numbers: dequantized by the format's own reference, quantized bit by bit as it does."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from formats.gguf_header import StoredTensor, stored_size
from formats.sink import cast
from formats.source import FormatError

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
READABLE = (
    *PLAIN,
    *(GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    *(GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4")),
    *(GGMLQuantizationType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
    *(GGMLQuantizationType[name] for name in ("IQ4_NL", "IQ4_XS")),
)

# What of them can be written: all that the reference quantizes (no K-quant), but for kinds that only models trained for
# them can have.
WRITABLE = {
    kind.name.lower(): kind
    for kind in (*PLAIN, *(GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")))
}
BLOCK = 32

# So many numbers are worked on at once: enough to make good use of the vector units, and the cache holds them. Of more
# the threads would give the memory back to the system and ask for it again all the time.
_NUMBERS = 1 << 16
# The largest float32 below a half: added before the fraction is dropped, it rounds as C's roundf() does. A half would
# make 1 of the number just below it.
_HALF = torch.tensor(0.49999997)


def read_stored(file: BinaryIO, stored: StoredTensor, name: str) -> Tensor:
    """The tensor's values: in float32 where they are quantized, else as they are stored."""
    if stored.type in PLAIN:
        tensor = torch.empty(stored.shape, dtype=PLAIN[stored.type])
        _fill(file, stored, name, tensor.view(torch.uint8).numpy().reshape(-1), 0)
        return tensor
    values = torch.empty(stored.shape, dtype=torch.float32)
    rows = values.numpy().reshape(-1, stored.shape[-1])
    row_size = stored_size(stored.type, stored.shape[-1:])

    def fill(start: int, end: int) -> None:
        data = np.empty((end - start, row_size), np.uint8)
        _fill(file, stored, name, data.reshape(-1), start * row_size)
        # A scale that is no number makes numbers that are none, here as in any other format.
        with np.errstate(all="ignore"):
            rows[start:end] = dequantize(data, stored.type)

    for _ in _in_threads(fill, _row_blocks(*rows.shape)):
        pass
    return values


def stored_blocks(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> Iterator[np.ndarray]:
    """The tensor's bytes as the kind stores them, some rows at a time; the rows must be whole blocks."""
    rows = tensor.reshape(-1, tensor.shape[-1])

    def make(start: int, end: int) -> np.ndarray:
        if kind in PLAIN:
            return cast(name, rows[start:end], PLAIN[kind]).contiguous().view(torch.uint8).numpy()
        if kind in _QUANTIZE:
            made = _QUANTIZE[kind](rows[start:end].reshape(-1, BLOCK).float()).numpy()
        else:
            with np.errstate(all="ignore"):  # what cannot be held is told below
                made = quantize(rows[start:end].float().numpy(), kind)
        return _checked(made, kind, name)

    return _in_threads(make, _row_blocks(*rows.shape))


def _quantize_q8_0(x: Tensor) -> Tensor:
    """Each row a scale and 32 signed bytes: the largest number becomes 127."""
    made = torch.empty(len(x), 2 + BLOCK, dtype=torch.uint8)
    scale = x.abs().amax(1, keepdim=True).div_(127)
    q = x * _inverse(scale)
    q.add_(torch.copysign(_HALF, q))
    made[:, :2] = scale.half().view(torch.uint8)
    made[:, 2:].view(torch.int8).copy_(q)
    return made


def _quantize_q4_0(x: Tensor) -> Tensor:
    """Each row a scale and 32 times four bits, two halves interleaved: the number farthest from zero becomes 0."""
    made = torch.empty(len(x), 2 + BLOCK // 2, dtype=torch.uint8)
    scale = _farthest_from_zero(x).div_(-8)
    q = (x * _inverse(scale)).add_(8.5).to(torch.uint8).clamp_(max=15)
    made[:, :2] = scale.half().view(torch.uint8)
    torch.bitwise_or(q[:, : BLOCK // 2], q[:, BLOCK // 2 :] << 4, out=made[:, 2:])
    return made


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _farthest_from_zero(x: Tensor) -> Tensor:
    """Of each row the number with the largest magnitude, the first one if there are two, with its sign."""
    largest, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    found = torch.where(largest > -smallest, largest, smallest)
    # Finding the place of the largest takes longer than all the rest, so it is done only where it matters.
    tied = x[(largest == -smallest).squeeze(1)]
    found[largest == -smallest] = tied.gather(1, tied.abs().argmax(1, keepdim=True)).squeeze(1)
    return found


_QUANTIZE = {GGMLQuantizationType.Q8_0: _quantize_q8_0, GGMLQuantizationType.Q4_0: _quantize_q4_0}


def _checked(made: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The blocks, whose scale (and offset, where the kind has one) must be a number that float16 can hold."""
    scales = made.reshape(-1, GGML_QUANT_SIZES[kind][1])[:, : 4 if kind.name.endswith("_1") else 2]
    if not np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all():
        raise FormatError(f"{name} has numbers that {kind.name} cannot hold; choose bf16 or f32")
    return made


def _fill(file: BinaryIO, stored: StoredTensor, name: str, data: np.ndarray, start: int) -> None:
    """Read the tensor's bytes from `start` on into all of `data`, from any thread."""
    done = 0
    while done < len(data):
        count = os.preadv(file.fileno(), [data[done:]], stored.offset + start + done)
        if count == 0:
            raise FormatError(f"{stored.path}: was cut short while {name} was read")
        done += count


def _row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _NUMBERS // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _in_threads(work: Callable[[int, int], Any], blocks: list[tuple[int, int]]) -> Iterator[Any]:
    """The results in order; at most one for each thread, and one more, is made before it is taken.

    Each block has one thread to itself: torch's own threads wait for one another after every operation, which on a
    machine that has other work takes longer than the operations.
    """
    count, of_torch = os.cpu_count() or 1, torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            begun: deque[Future[Any]] = deque()
            for block in blocks:
                begun.append(threads.submit(work, *block))
                if len(begun) > count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
    finally:
        torch.set_num_threads(of_torch)  # what threads that come later begin with
