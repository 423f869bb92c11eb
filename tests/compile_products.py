"""Compile the kernels of `engine.gpu.product` for a GPU that need not be here, and say as JSON what came out.

A process of its own, as Triton's interpreter, which the tests compute with, and its compiler exclude one another.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.gpu import product
from quant import SCHEMES, Scheme
from quant.int4 import Int4


def compiled(capability: int, scheme: Scheme, tokens: int) -> dict[str, Any]:
    """The kernel that so many tokens take, in bfloat16; numbers that are multiples of 16 are known to be."""
    group = scheme.group if isinstance(scheme, Int4) else None
    constants = product.share_of_work(tokens, group) | {"EXACT": "tf32"}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    kernel, weights, scales = product.halves_of_bytes, "*u8", "*fp16"
    if group is None:
        kernel, weights, scales = product.whole_numbers, "*i8", "*fp32"
        constants["FP8"] = scheme.name == "fp8"
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {"x": "*bf16", "weights": weights, "scales": scales, "y": "*bf16"}
    known = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name != "tokens"
    }
    source = ASTSource(kernel, signature, constants, known)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "scheme": scheme.name if group is None else f"int4, groups of {group}",
        "tokens": tokens,
        "shared": made.metadata.shared,
        "tensor cores": "mma" in made.asm["ptx"],
        "loads ahead": "cp.async" in made.asm["ptx"],
    }


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps([compiled(capability, scheme, tokens) for scheme in SCHEMES.values() for tokens in (1, 64, 512)]))
