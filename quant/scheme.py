"""What every quantization scheme does, in plain PyTorch; kernels for its numbers lie where the device is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """A weight (rows, columns) as whole numbers and scales; `scheme` knows how they belong together."""

    scheme: Scheme
    numbers: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self.scheme.dequantize(self.numbers, self.scales)


class Scheme(ABC):
    """How a weight becomes whole numbers and scales."""

    name: ClassVar[str]
    bits: ClassVar[float]
    """Per weight, scales included (for a wide matrix)."""

    @abstractmethod
    def fits(self, columns: int) -> bool:
        """Whether a weight with so many columns can be quantized."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Quantized:
        """The nearest quantized weight."""

    @abstractmethod
    def dequantize(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """Numbers and scales back to float32."""
