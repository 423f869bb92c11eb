"""A Llama in GGUF's terms: its settings as metadata, its tensors' names, its stretched RoPE as a tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.hf import LONGEST_DEFAULT_CONTEXT, renamed
from formats.source import FormatError, first_line, model_args
from llama2 import ModelArgs, RopeScaling, rope_frequencies

ARCHITECTURE = "llama"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
# What every pair of a head's numbers divides its frequency by.
ROPE_FACTORS = "rope_freqs.weight"

# Canonical name -> theirs; {} is the layer's number.
GGUF_NAMES = {
    "tok_embeddings.weight": EMBEDDING,
    "layers.{}.attention.wq.weight": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.weight": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.weight": "blk.{}.attn_v.weight",
    "layers.{}.attention.wo.weight": "blk.{}.attn_output.weight",
    "layers.{}.feed_forward.w1.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.feed_forward.w2.weight": "blk.{}.ffn_down.weight",
    "layers.{}.feed_forward.w3.weight": "blk.{}.ffn_up.weight",
    "layers.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": OUTPUT,
}

# The setting of `ModelArgs` -> its key after "llama."; those in REQUIRED have no default.
SETTINGS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_hidden_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
REQUIRED = ("dim", "n_layers", "n_heads", "ffn_hidden_dim", "norm_eps")
OTHER_KEYS = ("context_length", "attention.value_length", "rope.dimension_count")
# What is there too, and the values that change nothing.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
HARMLESS = ("expert_used_count", "rope.scaling.original_context_length", "rope.scaling.finetuned")

# How Llama 3.1 to 3.3 stretch; the tensor's factors depend on its ratios to the original context alone.
_LOW, _HIGH = 1.0, 4.0
# The factors are float32, computed in float32.
_TOLERANCE = 1e-5


def gguf_name(name: str) -> str:
    """What GGUF calls the canonical name."""
    return renamed(name, GGUF_NAMES)


def args_from_fields(path: Path, fields: Mapping[str, Any], rows: int, tied: bool) -> ModelArgs:
    """The model that the metadata describe, but for stretched RoPE; its embedding has so many rows."""
    _refuse_other_models(path, fields)
    settings: dict[str, Any] = {}
    for name, key in SETTINGS.items():
        value = _number(path, fields, key)
        if value is None and name in REQUIRED:
            raise FormatError(f"{path}: {ARCHITECTURE}.{key} is missing")
        if value is not None:
            settings[name] = _shortest(value) if isinstance(value, float) else value
    longest = context_length(path, fields)
    if longest is not None:
        settings["max_seq_len"] = min(longest, LONGEST_DEFAULT_CONTEXT)
    args = model_args(path, **{"vocab_size": rows, "tie_embeddings": tied} | settings)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = _value(path, fields, key)
        if value not in (None, args.head_dim):
            raise FormatError(
                f"{path}: {ARCHITECTURE}.{key} is {value!r:.80}; only the head's width ({args.head_dim}) is supported"
            )
    return args


def context_length(path: Path, fields: Mapping[str, Any]) -> int | None:
    """How many positions the model was made for, if the metadata say it."""
    length = _number(path, fields, "context_length")
    if isinstance(length, float):
        raise FormatError(f"{path}: {ARCHITECTURE}.context_length is {length}; a whole number is needed")
    return length


def fields_from_args(args: ModelArgs, context_length: int) -> dict[str, Any]:
    """The metadata of the model; its stretched RoPE is a tensor."""
    values = {key: getattr(args, name) for name, key in SETTINGS.items()}
    values |= {"context_length": context_length, "attention.value_length": args.head_dim}
    values |= {"rope.dimension_count": args.head_dim, "rope.freq_base": float(args.rope_theta)}
    values["attention.layer_norm_rms_epsilon"] = float(args.norm_eps)
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def rope_factors(args: ModelArgs) -> Tensor:
    """What stretched RoPE divides each frequency by."""
    return rope_frequencies(dataclasses.replace(args, rope_scaling=None)) / rope_frequencies(args)


def rope_scaling(path: Path, factors: Tensor, args: ModelArgs) -> RopeScaling | None:
    """The stretching that has these factors, if there is one; Llama's own original context is preferred."""
    if bool((factors == 1).all()):
        return None
    try:
        for original in (RopeScaling().original_max_seq_len, _original_context(factors, args)):
            scaling = RopeScaling(_shortest(float(factors.max())), _LOW, _HIGH, original)
            expected = rope_factors(dataclasses.replace(args, rope_scaling=scaling))
            if torch.allclose(factors, expected, rtol=_TOLERANCE, atol=0.0):
                return scaling
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{path}: {ROPE_FACTORS}: {first_line(error)}") from None
    raise FormatError(f"{path}: {ROPE_FACTORS} does not stretch RoPE as Llama 3.1 does; no other way is supported")


def _original_context(factors: Tensor, args: ModelArgs) -> int:
    """The context for which Llama 3.1's rule gives these factors, if any: one between the ends tells it."""
    wavelengths = 2 * math.pi / rope_frequencies(args).double()
    factors = factors.double()
    kept = (1 / factors - 1 / factors.max()) / (1 - 1 / factors.max())
    between = (kept > _TOLERANCE) & (kept < 1 - _TOLERANCE)
    if between.any():
        return round(float((wavelengths * (_LOW + kept * (_HIGH - _LOW)))[between][0]))
    unchanged = wavelengths[factors == 1]
    return math.ceil(float(_HIGH * unchanged.max() if len(unchanged) else _LOW * wavelengths.min()))


def _refuse_other_models(path: Path, fields: Mapping[str, Any]) -> None:
    """Stop at what would convert without complaint and then answer nonsense."""
    kind, architecture = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind != "model":
        raise FormatError(f"{path}: general.type is {kind!r:.80}; only 'model' can be converted")
    if architecture != ARCHITECTURE:
        raise FormatError(
            f"{path}: general.architecture is {architecture!r:.80}; only {ARCHITECTURE!r} can be converted"
        )
    known = {*SETTINGS.values(), *OTHER_KEYS, *ALLOWED, *HARMLESS}
    for name in fields:
        key = name.removeprefix(f"{ARCHITECTURE}.")
        if key != name and key not in known:
            raise FormatError(f"{path}: unknown key {name!r}; it may change the model, so it is not ignored")
    for key, allowed in ALLOWED.items():
        value = _value(path, fields, key)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise FormatError(f"{path}: {ARCHITECTURE}.{key} is {value!r:.80}; only {wanted} is supported")


def _number(path: Path, fields: Mapping[str, Any], key: str) -> Any:
    value = _value(path, fields, key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise FormatError(f"{path}: {ARCHITECTURE}.{key} is {value!r:.80}; a number is needed")
    return value


def _value(path: Path, fields: Mapping[str, Any], key: str) -> Any:
    """A setting; one that has a value for every layer must have the same for all."""
    value = fields.get(f"{ARCHITECTURE}.{key}")
    if not isinstance(value, list):
        return value
    if not value or any(each != value[0] for each in value):
        raise FormatError(f"{path}: {ARCHITECTURE}.{key} differs from layer to layer, which is not supported")
    return value[0]


def _shortest(value: float) -> float:
    """The number of fewest digits that is the same float32, as which it is stored: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
