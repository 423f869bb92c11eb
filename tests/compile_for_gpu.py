"""Compile the kernels for GPUs, for one that need not be here, and say as JSON what came out.

A process of its own, as Triton's interpreter, which the tests compute with, and its compiler exclude one another.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from engine.gpu import attention, choice, pointwise, product, single
from quant import SCHEMES, Scheme
from quant.int4 import Int4

TENSORS = {
    **dict.fromkeys(("scales", "x_scales", "cosine", "sine", "parts", "sums", "logits"), "*fp32"),
    **dict.fromkeys(("words", "arrived"), "*i32"),
    **dict.fromkeys(("places", "slots", "positions", "tokens_R", "told"), "*i64"),
    "weights": "*i8",
}
NUMBERS = ("tokens", "rows", "columns", "half", "count", "groups", "slot_size", "beyond", "otherwise")
UNKNOWN = ("tokens", "epsilon", "scale", "beyond", "otherwise")


def compiled(capability: int, kernel: Any, constants: dict[str, Any], **tensors: str) -> CompiledKernel:
    """A kernel in bfloat16; sizes of a model are known to be multiples of 16, the number of tokens is not."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    if "AHEAD" in kernel.arg_names:
        options["launch_pdl"] = capability >= 90
        constants["AHEAD"] = constants.get("AHEAD", "all") if capability >= 90 else "none"
    signature = {name: "i32" if name in NUMBERS else TENSORS.get(name, "*bf16") for name in kernel.arg_names}
    signature |= dict.fromkeys({"epsilon", "scale"} & signature.keys(), "fp32") | tensors
    signature |= dict.fromkeys(constants, "constexpr")
    known = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in UNKNOWN
    }
    source = ASTSource(kernel, signature, constants, known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def order(made: CompiledKernel) -> list[str]:
    """When it lets the next kernel begin, and waits for the one before."""
    return re.findall(r"griddepcontrol\.(\w+)", made.asm["ptx"])


def products(capability: int, scheme: Scheme) -> Iterator[dict[str, Any]]:
    """What few and some tokens take."""
    group = scheme.group if isinstance(scheme, Int4) else None
    for tokens in (16, 64):
        constants = product.share_of_work(tokens, group) | {"EXACT": "tf32", "ADD": True, "AHEAD": "one"}
        if group is None:
            made = compiled(capability, product.whole_numbers, constants | {"FP8": scheme.name == "fp8"})
        else:
            constants["BITS"] = "bfloat16"
            made = compiled(capability, product.halves_of_bytes, constants, weights="*u8", scales="*fp16")
        yield {
            "what": f"{scheme.name}, groups of {group}, {tokens} tokens",
            "shared": made.metadata.shared,
            "tensor cores": "mma" in made.asm["ptx"],
            "loads ahead": "cp.async" in made.asm["ptx"],
            "order": order(made),
        }


def others(capability: int) -> Iterator[dict[str, Any]]:
    """Everything else, in the sizes of 7B and, for attention, of 8B too."""
    words = {"BITS": True, "ADD": True, "WORDS": 512}
    for kernel, constants, tensors in (
        (single.floats, {"ADD": True, "ROWS": 4, "COLUMNS": 1024}, {"weights": "*bf16"}),
        (single.small_floats, words | {"ROWS": 4}, {}),
        (single.rounded, {"GROUPS": 32}, {}),
        (single.whole_bytes, words | {"ROWS": 4}, {"x": "*i32"}),
        (single.whole_halves, words | {"ROWS": 16, "GROUPS": 16, "WORDS": 8}, {"x": "*i32", "scales": "*fp16"}),
        (single.whole_halves, words | {"ROWS": 8, "GROUPS": 8, "WORDS": 32}, {"x": "*i32", "scales": "*fp16"}),
        (product.unpack_bytes, {"FP8": False, "COLUMNS": 2048}, {}),
        (product.unpack_bytes, {"FP8": True, "COLUMNS": 2048}, {}),
        (product.unpack_halves, {"GROUP": 32, "COLUMNS": 2048}, {"weights": "*u8", "scales": "*fp16"}),
        (pointwise.rotate_and_place, {"HEADS": 32, "KV_HEADS": 8, "WIDTH": 128, "PAIRS": 64, "num_warps": 1}, {}),
        (pointwise.root_mean_square, {"COLUMNS": 4096}, {"weight": "*bf16"}),
        (pointwise.multiply_by_silu, {"COLUMNS": 1024}, {}),
        (choice.largest, {"COLUMNS": 8192, "num_warps": 16}, {"tokens": "*i64"}),
        (attention.attend, attention.share_of_work(32, 1, 128, 16), {}),
        (attention.attend, attention.share_of_work(8, 4, 128, 1), {}),
    ):
        made = compiled(capability, kernel, constants, **tensors)
        yield {"what": f"{kernel.__name__} {constants}", "shared": made.metadata.shared, "order": order(made)}


if __name__ == "__main__":
    capability = int(sys.argv[1])
    found = {
        "products": [each for scheme in SCHEMES.values() for each in products(capability, scheme)],
        "others": list(others(capability)),
    }
    print(json.dumps(found))
