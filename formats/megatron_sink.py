"""Writes Megatron-LM's format `torch`: a `release` of any tensor and pipeline parallel size, in either layout."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from formats.megatron_layout import (
    EMBEDDING,
    LAYOUTS,
    LEGACY_TIED_COPY,
    NORM,
    OUTPUT,
    SPLIT_DIMENSIONS,
    TRACKER,
    VOCABULARY_MULTIPLE,
    field_shape,
    join_qkv,
)
from formats.megatron_ranks import RANK_FILE
from formats.output import HashedFile, write_file
from formats.pickled import TensorFileWriter
from formats.sink import Option, Sink, cast
from formats.source import FormatError, Source
from llama2 import RopeScaling

RELEASE = "release"

# An archive's entry, its header, padding and line in the pickle.
_RECORD_OVERHEAD = 1024
# Ranks' files that are written at once: more threads than cores would only hold more of their parts.
_WRITERS = 4

_LAYER_FIELDS = ("attention_norm", "qkv", "proj", "ffn_norm", "fc1", "fc2")
# Megatron's older model knows no other base, and no stretched frequencies.
_LEGACY_ROPE_THETA = 10000.0


def _layout(text: str) -> str:
    if text not in LAYOUTS:
        raise FormatError(f"{text!r} is no layout; allowed: {', '.join(LAYOUTS)}")
    return text


class MegatronSink(Sink):
    """One file per rank, with the arguments that Megatron needs to build the model."""

    name: ClassVar[str] = "megatron"
    title: ClassVar[str] = "Megatron"
    options: ClassVar[tuple[Option, ...]] = (
        Option("tensor_parallel", "how many ranks share each layer (default: 1)"),
        Option("pipeline_parallel", "how many stages share the layers (default: 1)"),
        Option(
            "layout",
            "parameters' names: core for Megatron-core with Transformer Engine (default), local for Megatron-core "
            "without it, legacy for --use-legacy-models",
            _layout,
            None,
            tuple(LAYOUTS),
        ),
    )

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype | None = None,
        tensor_parallel: int | None = None,
        pipeline_parallel: int | None = None,
        layout: str | None = None,
    ) -> None:
        super().__init__(source, dtype)
        self._tp, self._pp = tensor_parallel or 1, pipeline_parallel or 1
        self._layout = _layout(layout or "core")
        self._check_sizes()
        self._check_rope()
        multiple = VOCABULARY_MULTIPLE * self._tp
        self._rows = math.ceil(self.args.vocab_size / multiple) * multiple
        self.settings = {"tensor_parallel": self._tp, "pipeline_parallel": self._pp, "layout": self._layout}

    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        written = {}
        for stage in range(self._pp):
            written |= self._write_stage(folder, stage, advance)
        for name, content in self._tokenizer_files().items():
            write_file(folder / name, content)
        write_file(folder / TRACKER, RELEASE.encode())
        return written

    def tensor_bytes(self) -> int:
        return self.dtype.itemsize * sum(
            self._tp * math.prod(self._share(field)) for stage in range(self._pp) for field, _ in self._keys(stage)
        )

    def size_bound(self) -> int:
        records = self._tp * sum(len(self._keys(stage)) + 8 for stage in range(self._pp))
        tokenizer = sum(len(content) for content in self._tokenizer_files().values())
        return self.tensor_bytes() + records * _RECORD_OVERHEAD + tokenizer

    def _check_sizes(self) -> None:
        """Tensor parallelism must divide heads, groups and the feed-forward width, pipeline parallelism the layers."""
        args = self.args
        rows = field_shape(args, "qkv")[0]
        sizes = [
            size
            for size in range(1, args.n_heads + 1)
            if args.n_heads % size == 0
            and args.ffn_hidden_dim % size == 0
            # Only Megatron-core lets ranks share a group, whose rows it then cuts evenly.
            and (
                args.n_kv_heads % size == 0
                or (self._layout != "legacy" and size % args.n_kv_heads == 0 and rows % size == 0)
            )
        ]
        if self._tp not in sizes:
            raise FormatError(
                f"--tensor_parallel is {self._tp}; {args.n_heads} heads in {args.n_kv_heads} groups and a feed-forward "
                f"width of {args.ffn_hidden_dim} can be split over {', '.join(map(str, sizes))}"
            )
        stages = [size for size in range(1, args.n_layers + 1) if args.n_layers % size == 0]
        if self._pp not in stages:
            raise FormatError(
                f"--pipeline_parallel is {self._pp}; {args.n_layers} layers can be split over "
                f"{', '.join(map(str, stages))}"
            )

    def _check_rope(self) -> None:
        """What Megatron's arguments cannot say would be lost, and the model answer nonsense."""
        scaling, theta = self.args.rope_scaling, self.args.rope_theta
        if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
            raise FormatError(f"Megatron knows no RoPE scaling but Llama 3.1's, with any factor; this one is {scaling}")
        if self._layout == "legacy" and (scaling is not None or theta != _LEGACY_ROPE_THETA):
            raise FormatError(
                f"--layout legacy rotates with base {_LEGACY_ROPE_THETA:g} and no scaling, whatever a checkpoint says; "
                f"this model has {theta:g}{' and scaling' if scaling else ''}: use --layout core"
            )

    def _keys(self, stage: int) -> list[tuple[str, int | None]]:
        """The fields that a pipeline stage holds, and their layers."""
        count = self.args.n_layers // self._pp
        keys: list[tuple[str, int | None]] = [(EMBEDDING, None)] if stage == 0 else []
        keys += [(field, layer) for layer in range(stage * count, (stage + 1) * count) for field in _LAYER_FIELDS]
        if stage == self._pp - 1:
            keys.append((NORM, None))
            if stage > 0 or not self.args.tie_embeddings:
                keys.append((OUTPUT, None))
        return keys

    def _share(self, field: str) -> tuple[int, ...]:
        """The shape of a rank's part."""
        shape, dimension = list(field_shape(self.args, field)), SPLIT_DIMENSIONS[field]
        if field in (EMBEDDING, OUTPUT):
            shape[0] = self._rows
        if dimension is not None:
            shape[dimension] //= self._tp
        return tuple(shape)

    def _name(self, field: str, layer: int | None, stage: int) -> str:
        if field == OUTPUT and self.args.tie_embeddings and self._layout == "legacy":
            return LEGACY_TIED_COPY
        count = self.args.n_layers // self._pp
        return LAYOUTS[self._layout][field].format(None if layer is None else layer - stage * count)

    def _field(self, field: str, layer: int | None) -> Callable[[int], Tensor]:
        """A function from a tensor parallel rank to its part of the field."""

        def read(name: str) -> Tensor:
            name = f"{name}.weight" if layer is None else f"layers.{layer}.{name}.weight"
            return cast(name, self.source.read(name), self.dtype)

        if field == "fc1":
            gates, ups = read("feed_forward.w1").chunk(self._tp), read("feed_forward.w3").chunk(self._tp)
            return lambda rank: torch.cat([gates[rank], ups[rank]])
        if field in (EMBEDDING, OUTPUT):
            table = read("tok_embeddings" if field == EMBEDDING or self.args.tie_embeddings else "output")
            return lambda rank: self._padded(table, rank)
        if field == "qkv":
            tensor = join_qkv(*(read(f"attention.{name}") for name in ("wq", "wk", "wv")), self.args)
        else:
            tensor = read({"proj": "attention.wo", "fc2": "feed_forward.w2"}.get(field, field))
        dimension = SPLIT_DIMENSIONS[field]
        return lambda rank: tensor if dimension is None else tensor.chunk(self._tp, dimension)[rank]

    def _padded(self, table: Tensor, rank: int) -> Tensor:
        """A rank's rows, padded with the last row of all as Megatron's own converters do."""
        count = self._rows // self._tp
        own = table[rank * count : (rank + 1) * count]
        return own if len(own) == count else torch.cat([own, table[-1:].expand(count - len(own), -1)])

    def _write_stage(self, folder: Path, stage: int, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        """Write the files of a stage's ranks side by side, so that each tensor is read once."""
        names = [self._rank_file(rank, stage) for rank in range(self._tp)]
        shapes = {self._name(*key, stage): self._share(key[0]) for key in self._keys(stage)}
        with ExitStack() as stack:
            for name in names:
                (folder / name).parent.mkdir(parents=True)
            files = [stack.enter_context(HashedFile(folder / name)) for name in names]
            writers = [TensorFileWriter(file, shapes, self.dtype, self._contents) for file in files]
            threads = stack.enter_context(ThreadPoolExecutor(min(self._tp, _WRITERS)))
            for key in self._keys(stage):
                name, part = self._name(*key, stage), self._field(*key)

                def write(rank: int, name: str = name, part: Callable[[int], Tensor] = part) -> None:
                    writers[rank].write(name, part(rank))

                for _ in threads.map(write, range(self._tp)):
                    pass
                advance(self._tp * math.prod(shapes[name]) * self.dtype.itemsize)
                del write, part  # and the tensor that it holds, before the next one is read
            for writer in writers:
                writer.close()
            return {name: file.entry() for name, file in zip(names, files, strict=True)}

    def _rank_file(self, rank: int, stage: int) -> str:
        return f"{RELEASE}/mp_rank_{rank:02d}{f'_{stage:03d}' if self._pp > 1 else ''}/{RANK_FILE}"

    def _contents(self, model: dict[str, Any]) -> dict[str, Any]:
        """What a rank's file holds, given its parameters by name."""
        return {
            "args": argparse.Namespace(**self._arguments()),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "model": _nested(model) if self._layout == "legacy" else model,
        }

    def _arguments(self) -> dict[str, Any]:
        """What Megatron takes from a checkpoint or compares with it, and what its own converters ask for."""
        args, length = self.args, self.context_length()
        grouped = args.n_kv_heads != args.n_heads
        return {
            "num_layers": args.n_layers,
            "hidden_size": args.dim,
            "ffn_hidden_size": args.ffn_hidden_dim,
            "num_attention_heads": args.n_heads,
            "group_query_attention": grouped,
            "num_query_groups": args.n_kv_heads if grouped else 1,
            "kv_channels": args.head_dim,
            "seq_length": length,
            "max_position_embeddings": length,
            "position_embedding_type": "rope",
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
            "rotary_base": int(args.rope_theta) if args.rope_theta == int(args.rope_theta) else args.rope_theta,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rotary_seq_len_interpolation_factor": None,
            "use_rope_scaling": args.rope_scaling is not None,
            "rope_scaling_factor": args.rope_scaling.factor if args.rope_scaling else 8.0,
            "normalization": "RMSNorm",
            "norm_epsilon": args.norm_eps,
            "apply_layernorm_1p": False,
            "qk_layernorm": False,
            "swiglu": True,
            "squared_relu": False,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "untie_embeddings_and_output_weights": not args.tie_embeddings,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "apply_query_key_layer_scaling": False,
            "vocab_size": args.vocab_size,
            "padded_vocab_size": self._rows,
            "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
            "tokenizer_type": "Llama2Tokenizer" if self.vocabulary.kind == "sentencepiece" else "HuggingFaceTokenizer",
            "tokenizer_model": None,
            "tensor_model_parallel_size": self._tp,
            "pipeline_model_parallel_size": self._pp,
            "virtual_pipeline_model_parallel_size": None,
            "num_layers_per_virtual_pipeline_stage": None,
            "expert_model_parallel_size": 1,
            "num_experts": None,
            "sequence_parallel": False,
            "params_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
            "ckpt_format": "torch",
            "use_legacy_models": self._layout == "legacy",
            "transformer_impl": "transformer_engine" if self._layout == "core" else "local",
            "bert_binary_head": True,
            "iteration": 0,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
        }

    def _tokenizer_files(self) -> dict[str, bytes]:
        """What Megatron's tokenizer of the model's kind reads."""
        if self.vocabulary.kind == "sentencepiece":
            return {"tokenizer.model": self.tokenizer_model()} | self.vocabulary.stops_file()
        return self.vocabulary.huggingface() | self.vocabulary.stops_file()


def _nested(model: dict[str, Any]) -> dict[str, Any]:
    """The legacy layout: dictionaries of dictionaries, the encoder's being flat again."""
    nested: dict[str, Any] = {}
    for name, value in model.items():
        encoder = "language_model.encoder."
        *path, last = (
            ["language_model", "encoder", name.removeprefix(encoder)] if name.startswith(encoder) else (name.split("."))
        )
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return nested
