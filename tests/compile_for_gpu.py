"""Compile the kernels for GPUs, for one that need not be here, and say as JSON what came out.

A process of its own, as Triton's interpreter, which the tests compute with, and its compiler exclude one another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from engine.gpu import pointwise, product
from quant import SCHEMES, Scheme
from quant.int4 import Int4

TENSORS = {"weights": "*i8", "scales": "*fp32", "cosine": "*fp32", "sine": "*fp32", "places": "*i64"}
NUMBERS = ("tokens", "rows", "columns", "half", "epsilon")


def compiled(capability: int, kernel: Any, constants: dict[str, Any], **tensors: str) -> CompiledKernel:
    """A kernel in bfloat16; sizes of a model are known to be multiples of 16, the number of tokens is not."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = {name: "i32" if name in NUMBERS else TENSORS.get(name, "*bf16") for name in kernel.arg_names}
    signature |= tensors | dict.fromkeys(constants, "constexpr")
    if "epsilon" in signature:
        signature["epsilon"] = "fp32"
    known = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("tokens", "epsilon")
    }
    source = ASTSource(kernel, signature, constants, known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def products(capability: int, scheme: Scheme) -> Iterator[dict[str, Any]]:
    """What few, some and many tokens take."""
    group = scheme.group if isinstance(scheme, Int4) else None
    for tokens in (1, 64, 512):
        constants = product.share_of_work(tokens, group) | {"EXACT": "tf32"}
        if group is None:
            made = compiled(capability, product.whole_numbers, constants | {"FP8": scheme.name == "fp8"})
        else:
            made = compiled(capability, product.halves_of_bytes, constants, weights="*u8", scales="*fp16")
        yield {
            "what": f"{scheme.name}, groups of {group}, {tokens} tokens",
            "shared": made.metadata.shared,
            "tensor cores": "mma" in made.asm["ptx"],
            "loads ahead": "cp.async" in made.asm["ptx"],
        }


def between_products(capability: int) -> Iterator[dict[str, Any]]:
    """What lies between products, in the sizes of 7B."""
    heads = {"HEADS": 32, "KV_HEADS": 8, "WIDTH": 128, "PAIRS": 64, "num_warps": 1}
    for kernel, constants in (
        (pointwise.rotate_and_place, heads),
        (pointwise.add_and_normalise, {"COLUMNS": 4096}),
        (pointwise.multiply_by_silu, {"COLUMNS": 1024}),
    ):
        made = compiled(capability, kernel, constants)
        yield {"what": kernel.__name__, "shared": made.metadata.shared}


if __name__ == "__main__":
    capability = int(sys.argv[1])
    found = {
        "products": [each for scheme in SCHEMES.values() for each in products(capability, scheme)],
        "between": list(between_products(capability)),
    }
    print(json.dumps(found))
