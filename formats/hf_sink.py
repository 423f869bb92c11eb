"""Writing what transformers loads: safetensors tensor by tensor, their index, the settings and a fast tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from formats.hf import DTYPE_NAMES, INDEX, ROTATED, SINGLE, HFSource, halves, hf_name
from formats.output import HashedFile, write_file
from formats.sink import Option, Sink, byte_size, cast
from formats.source import Source, read_json
from formats.vocabulary import GENERATION
from llama2 import ModelArgs

# What a header and an index say of one tensor, with room to spare.
HEADER_OVERHEAD = 512


class HFSink(Sink):
    """A folder that transformers loads as it is: safetensors, their index, the settings and a fast tokenizer."""

    name: ClassVar[str] = "hf"
    title: ClassVar[str] = "Hugging Face"
    options: ClassVar[tuple[Option, ...]] = (
        Option("max_file_size", "largest file of weights, such as 500MB (default: 5GB)", byte_size, "SIZE"),
    )

    def __init__(self, source: Source, dtype: torch.dtype | None = None, max_file_size: int | None = None) -> None:
        super().__init__(source, dtype)
        self.settings = {"max_file_size": max_file_size or 5 * 10**9}

    @cached_property
    def _small_files(self) -> dict[str, bytes]:
        """Everything but the weights."""
        source, generation = self.source, self.vocabulary.generation_config()
        if isinstance(source, HFSource) and (path := source.files[0].with_name(GENERATION)).is_file():
            generation = read_json(path)
        config = _config(self.args, self.context_length(), self.stored_as) | {
            key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation
        }
        texts = {"config.json": config, GENERATION: generation}
        return self.vocabulary.huggingface() | {
            name: (json.dumps(content, indent=2) + "\n").encode() for name, content in texts.items()
        }

    def size_bound(self) -> int:
        header = len(self.args.tensor_shapes()) * HEADER_OVERHEAD
        return self.tensor_bytes() + 2 * header + sum(map(len, self._small_files.values()))

    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        for name, content in self._small_files.items():
            write_file(folder / name, content)
        groups = list(self._files())
        weight_map, entries = {}, {}
        for number, names in enumerate(groups, 1):
            single = len(groups) == 1
            file_name = SINGLE if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            with HashedFile(folder / file_name) as file:
                self._write_tensors(file, names, advance)
            entries[file_name] = file.entry()
            weight_map |= {hf_name(name): file_name for name in names}
        if len(groups) > 1:
            index = {"metadata": {"total_size": self.tensor_bytes()}, "weight_map": weight_map}
            write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        return entries

    def _files(self) -> Iterator[list[str]]:
        """The tensors in order, cut where a file would grow over the limit."""
        shapes, names, size = self.args.tensor_shapes(), [], 0
        for name in self.source.names:
            tensor_size = torch.Size(shapes[name]).numel() * self.dtype.itemsize
            if names and size + tensor_size > self.settings["max_file_size"]:
                yield names
                names, size = [], 0
            names.append(name)
            size += tensor_size
        yield names

    def _write_tensors(self, file: HashedFile, names: list[str], advance: Callable[[int], object]) -> None:
        """The format: the header's length, the header, and the tensors one after the other."""
        shapes, header, end = self.args.tensor_shapes(), {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            start, end = end, end + torch.Size(shapes[name]).numel() * self.dtype.itemsize
            header[hf_name(name)] = {
                "dtype": DTYPE_NAMES[self.dtype],
                "shape": shapes[name],
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = cast(name, self.source.read(name), self.dtype)
            if name.endswith(ROTATED):
                tensor = halves(tensor, self.args.head_dim)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            advance(tensor.nbytes)
            del tensor  # before the next one is read


def _config(args: ModelArgs, context_length: int, dtype: str) -> dict[str, Any]:
    """A config.json that all versions of transformers understand, in the older form of RoPE's settings."""
    scaling = args.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "initializer_range": 0.02,
        "intermediate_size": args.ffn_hidden_dim,
        "max_position_embeddings": context_length,
        "mlp_bias": False,
        "num_attention_heads": args.n_heads,
        "num_hidden_layers": args.n_layers,
        "num_key_value_heads": args.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": args.norm_eps,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }
