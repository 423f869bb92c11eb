"""Tiny GGUF files, written by the package of llama.cpp's authors as their converter would, or byte by byte."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import hf_tensors
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from formats.gguf import GGUFSource
from formats.source import FormatError
from llama2 import ModelArgs, RopeScaling

# All rows are whole blocks of every kind.
ARGS = ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=40, ffn_hidden_dim=512, max_seq_len=512)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to transformers' Q and K."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama_cpp_tensors(tensors: dict[str, Tensor], args: ModelArgs) -> dict[str, np.ndarray]:
    """The model under GGUF's names, on the way that llama.cpp goes: from transformers' layout."""
    names, result = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers), {}
    for name, tensor in hf_tensors(tensors, args).items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permuted(array, args.n_heads if "q_proj" in name else args.n_kv_heads)
        result[names.get_name(name, try_suffixes=(".weight",))] = array
    return result


def stored(array: np.ndarray, kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """The array's blocks; of a kind that the package cannot make, blocks of any other numbers."""
    try:
        return quantize(array, kind)
    except NotImplementedError:
        blocks, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (len(array), array.shape[1] // blocks * size)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_gguf(
    path: Path,
    arrays: dict[str, np.ndarray],
    args: ModelArgs = ARGS,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    kinds: dict[str, GGMLQuantizationType] | None = None,
    fields: dict[str, tuple[Any, ...] | None] | None = None,
    alignment: int | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Write the file, `kinds` being those of single tensors; `fields` add, replace or (None) remove metadata.

    Returns what its tensors are by the package.
    """
    writer, expected = gguf.GGUFWriter(path, "llama", **settings), {}
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(args.n_layers)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.ffn_hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    for key, value in (fields or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, *value)
    for name, array in arrays.items():
        own = GGMLQuantizationType.F32 if array.ndim == 1 else (kinds or {}).get(name, kind)
        data = stored(array, own)
        writer.add_tensor(name, data, raw_dtype=own)
        with np.errstate(all="ignore"):
            expected[name] = torch.from_numpy(dequantize(data, own).reshape(array.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def llama_cpps_factors(args: ModelArgs, scaling: RopeScaling) -> Tensor:
    """What stretched RoPE divides frequencies by: one by one, by wavelength, as llama.cpp's converter has it."""
    factors = []
    for pair in range(args.head_dim // 2):
        wavelength = 2 * math.pi * args.rope_theta ** (2 * pair / args.head_dim)
        if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def refusal(path: Path) -> str:
    """Why the file or folder is refused, in one line that names it."""
    with pytest.raises(FormatError) as caught:
        GGUFSource(path).close()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 300
    return message


def text(value: str | bytes) -> bytes:
    """A string of a header."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    """A field of a header."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """What a header says of a tensor; the shape is as the file has it."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts: bytes, tensors: int = 0, fields: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    """A header of these parts, which says that it has so many tensors and fields."""
    return magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
