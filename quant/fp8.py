"""fp8, weights only: numbers of four exponent and three mantissa bits, and one scale per row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quant.scheme import Quantized, Scheme


class Fp8(Scheme):
    """float8_e4m3fn; a row's largest weight becomes the largest number."""

    name: ClassVar[str] = "fp8"
    bits: ClassVar[float] = 8.0
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def fits(self, columns: int) -> bool:
        return True

    def quantize(self, weight: Tensor) -> Quantized:
        weight = weight.float()
        scales = weight.abs().amax(1) / torch.finfo(self.dtype).max
        # A row that is all but zero becomes zero: of what is smaller there is no inverse.
        inverse = torch.where(scales >= torch.finfo(torch.float32).tiny, 1.0 / scales, 0.0)
        return Quantized(self, (weight * inverse[:, None]).to(self.dtype), scales)

    def dequantize(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers.float() * scales[:, None]
