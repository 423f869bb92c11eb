"""int4, weights only: one scale per group of neighbouring columns, as GGUF's Q4_0 has it for groups of 32."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quant.scheme import Quantized, Scheme


class Int4(Scheme):
    """Whole numbers from 0 to 15 that stand for -8 to 7; a group's largest weight, of either sign, is -8.

    The scales are kept in float16, so a group takes 4 bits a weight and 16 more.
    """

    name: ClassVar[str] = "int4"

    def __init__(self, group: int) -> None:
        self.group = group
        self.bits = 4 + 16 / group

    def fits(self, columns: int) -> bool:
        return columns % self.group == 0

    def quantize(self, weight: Tensor) -> Quantized:
        grouped = weight.float().unflatten(1, (-1, self.group))
        largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
        scales = largest / -8.0
        inverse = torch.where(scales != 0, 1.0 / scales, 0.0)
        # Truncated as Q4_0 is, so that a file of ours and one of llama.cpp's hold the same numbers.
        numbers = (grouped * inverse + 8.5).clamp_(0, 15).to(torch.uint8)
        return Quantized(self, numbers.flatten(1), scales.squeeze(2).half())

    def dequantize(self, numbers: Tensor, scales: Tensor) -> Tensor:
        grouped = numbers.unflatten(1, (-1, self.group)).float() - 8.0
        return (grouped * scales[:, :, None].float()).flatten(1)
