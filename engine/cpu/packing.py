"""Weights in the order in which the kernels read them: panels of sixteen rows, column by column (see packed.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant import Quantized, Scheme
from quant.int8 import Int8

PANEL, BLOCK = 16, 32
ROWS = 128  # packed at a time, so that they stay in the cache and little is held twice
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
COUNT = 16383  # at most: what 128 columns of int4 come to then fits 32 bits


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernels want it."""

    kind: int
    rows: int
    columns: int
    data: Tensor
    scales: Tensor | None = None  # of a row of whole numbers
    counts: Tensor | None = None  # by which a group of int4 counts
    group: int = BLOCK


def pack(
    weight: Tensor,
    scheme: Scheme | None = None,
    beside: Tensor | None = None,
    room: Callable[..., Tensor] = torch.empty,
) -> Packed:
    """A weight (rows, columns), quantized if a scheme is given that fits its columns, in memory that `room` gives.

    `beside` is another one of the same shape, whose panels take turns with this one's.
    """
    if scheme is not None and not scheme.fits(weight.shape[1]):
        scheme = None
    both = (weight,) if beside is None else (weight, beside)
    panels = -(-len(weight) // PANEL) * len(both)
    rows = len(weight) if beside is None else panels * PANEL
    packed, done = None, 0
    for first in range(0, max(len(weight), 1), ROWS):  # a rank may have no rows at all
        piece = _pack(_taking_turns([each[first : first + ROWS] for each in both]), scheme)
        if packed is None:
            places = (
                None if part is None else room((panels, *part.shape[1:]), dtype=part.dtype)
                for part in (piece.data, piece.scales, piece.counts)
            )
            packed = Packed(piece.kind, rows, weight.shape[1], *places, piece.group)
        end = done + len(piece.data)
        for whole, part in ((packed.data, piece.data), (packed.scales, piece.scales), (packed.counts, piece.counts)):
            if part is not None:
                whole[done:end] = part
        done = end
    return packed


def _taking_turns(weights: list[Tensor]) -> Tensor:
    """Panels of several weights in turns, so that what is multiplied lies side by side."""
    if len(weights) == 1:
        return weights[0]
    return torch.stack([_panels(weight) for weight in weights], 1).flatten(0, 2)


def _pack(weight: Tensor, scheme: Scheme | None) -> Packed:
    if scheme is None:
        return _pack_floats(weight)
    quantized = scheme.quantize(weight)
    return _pack_int8(quantized) if isinstance(scheme, Int8) else _pack_int4(quantized, scheme.group)


def _panels(weight: Tensor, whole: int = 1, value: int = 0) -> Tensor:
    """The rows in panels, the last one and the columns filled up to a multiple of `whole`: (panels, PANEL, columns)."""
    missing = (0, -weight.shape[1] % whole, 0, -len(weight) % PANEL)
    return (F.pad(weight, missing, value=value) if any(missing) else weight).unflatten(0, (-1, PANEL))


def _words_together(panels_PRK: Tensor) -> Tensor:
    """Every four bytes of a row beside those of the panel's other rows: (panels, words, PANEL, columns of a word)."""
    words = panels_PRK.contiguous().view(torch.int32)  # four times as fast to move as single bytes
    return words.transpose(1, 2).contiguous().unsqueeze(3).view(panels_PRK.dtype)


def _pack_floats(weight: Tensor) -> Packed:
    if weight.dtype == torch.bfloat16:  # two neighbouring columns side by side
        data = _words_together(_panels(weight, 32))
    else:
        data = _panels(weight).transpose(1, 2).contiguous()
    return Packed(KINDS[weight.dtype], *weight.shape, data)


def _pack_int8(weight: Quantized) -> Packed:
    rows, columns = weight.numbers.shape
    unsigned = weight.numbers.view(torch.uint8) ^ 128
    return Packed(INT8, rows, columns, _words_together(_panels(unsigned, 64, 128)), _of_rows(weight.scales))


def _pack_int4(weight: Quantized, group: int) -> Packed:
    rows, columns = weight.numbers.shape
    # Of eight neighbouring columns the first four are the low halves of four bytes, the others the high ones.
    eights = _panels(weight.numbers, value=8).unflatten(2, (-1, 2, 4))
    data = _words_together((eights[..., 0, :] | eights[..., 1, :] << 4).flatten(2))
    # Groups' scales as whole numbers, as large as can be, by one of the row: so exact as their 16 bits, or almost.
    groups = weight.scales.float()
    scales = groups.abs().amax(1) / COUNT
    counts = (groups / scales[:, None]).round().nan_to_num(0).to(torch.int16)  # of rows of zeros, 0 / 0
    counts = _panels(counts).transpose(1, 2).contiguous()
    return Packed(INT4, rows, columns, data, _of_rows(scales), counts, group)


def _of_rows(scales: Tensor) -> Tensor:
    """A number for each row: (panels, PANEL)."""
    return F.pad(scales.float(), (0, -len(scales) % PANEL)).unflatten(0, (-1, PANEL))
