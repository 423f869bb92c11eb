"""Tiny checkpoints for tests: one random model, laid out as Meta or as Hugging Face would publish it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizer_fixture import train_tokenizer
from torch import Tensor

from llama2 import ModelArgs

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}


def random_tensors(args: ModelArgs, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A whole model's weights by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.1).to(dtype)
        for name, shape in args.tensor_shapes().items()
    }


def write_tokenizer(path: Path, size: int = 96) -> Path:
    """A small but real sentencepiece model with exactly `size` tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    corpus = [f"{a}{b} {b}{a}{a}" for a in letters for b in letters]
    return train_tokenizer(path, corpus=corpus, vocab_size=size, byte_fallback=False, hard_vocab_limit=True)


def write_ranks(path: Path, words: tuple[bytes, ...] = (b"he", b"hel", b"lo", b"hello")) -> Path:
    """A tiktoken file like Llama 3's: all bytes, and some words of them."""
    ranked = [bytes([byte]) for byte in range(256)] + list(words)
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(ranked)))
    return path


def meta_shards(tensors: dict[str, Tensor], count: int, embedding_dimension: int = 1) -> list[dict[str, Tensor]]:
    """The weights cut as Meta's model parallelism cuts them."""
    columns = ("wo.weight", "w2.weight")
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            parts = [tensor] * count
        elif name == "tok_embeddings.weight":
            parts = list(tensor.chunk(count, embedding_dimension))
        else:
            parts = list(tensor.chunk(count, 1 if name.endswith(columns) else 0))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for shard in shards:
        shard["rope.freqs"] = torch.arange(4.0)
    return shards


def write_meta(
    folder: Path, tensors: dict[str, Tensor], params: dict[str, Any], tokenizer: Path, count: int = 1, **layout: Any
) -> Path:
    """A folder like Meta's."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(meta_shards(tensors, count, **layout)):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def hf_tensors(tensors: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The weights under transformers' names; row by row, so independent of how the converter reorders them."""
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    result = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            theirs = f"model.layers.{layer}.{names[stem]}.weight"
        else:
            theirs = f"{names[stem]}.weight"
        if stem in ("attention.wq", "attention.wk"):
            half, moved = args.head_dim // 2, torch.empty_like(tensor)
            for row in range(len(tensor)):
                head, place = divmod(row, args.head_dim)
                moved[head * args.head_dim + place // 2 + (half if place % 2 else 0)] = tensor[row]
            tensor = moved
        result[theirs] = tensor.contiguous()
    return result


def hf_config(args: ModelArgs, **changes: Any) -> dict[str, Any]:
    """A config.json for the model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "intermediate_size": args.ffn_hidden_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": args.tie_embeddings,
        "max_position_embeddings": 512,
    }
    return config | changes


def write_hf(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    tokenizer: Path,
    count: int = 1,
    suffix: str = "safetensors",
) -> Path:
    """A folder like Hugging Face's, with transformers' names already given; `suffix` bin is its older form."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if count == 1:
        save(tensors, folder / f"{stem}.{suffix}")
    else:
        weight_map = {}
        for number in range(count):
            name = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
            part = {key: tensors[key] for key in list(tensors)[number::count]}
            save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


# A pickle of DCP's metadata that sets the state of an object on a class itself.
CHANGES_A_CLASS = (
    b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    b"N}X\x06\x00\x00\x00__eq__ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\ns\x86b."
)
