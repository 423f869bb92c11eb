"""Quantization of weights: one file for each scheme, all of them listed here."""

from __future__ import annotations

from quant.fp8 import Fp8
from quant.int4 import Int4
from quant.int8 import Int8
from quant.scheme import Quantized, Scheme

__all__ = ["SCHEMES", "Quantized", "Scheme"]

SCHEMES: dict[str, Scheme] = {"int8": Int8(), "int4": Int4(32), "int4-128": Int4(128), "fp8": Fp8()}
