"""int8, weights only: one scale per row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quant.scheme import Quantized, Scheme


class Int8(Scheme):
    """Whole numbers from -127 to 127; a row's largest weight has the largest number."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[float] = 8.0

    def fits(self, columns: int) -> bool:
        return columns % 2 == 0

    def quantize(self, weight: Tensor) -> Quantized:
        weight = weight.float()
        scales = weight.abs().amax(1) / 127.0
        inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
        return Quantized(self, (weight * inverse[:, None]).round_().to(torch.int8), scales)

    def dequantize(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers * scales[:, None]
