"""Writing Meta's own format: any number of model-parallel shards, side by side, and a params.json for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from formats.meta import sharded_dimension, usual_factor
from formats.output import HashedFile, write_file
from formats.pickled import TensorFileWriter
from formats.sink import Option, Sink, cast
from formats.source import FormatError, Source
from llama2 import ModelArgs, RopeScaling

# A record's two zip headers, its padding and its share of the pickle, with room to spare.
RECORD_OVERHEAD = 1024
# Shards that are written side by side.
WRITERS = 4


class MetaSink(Sink):
    """Any number of model-parallel shards, as Meta's own code and torchrun read them."""

    name: ClassVar[str] = "meta"
    title: ClassVar[str] = "Meta"
    options: ClassVar[tuple[Option, ...]] = (
        Option("shards", "model-parallel shards to write (default: as many as IN has, else 1)"),
    )

    def __init__(self, source: Source, dtype: torch.dtype | None = None, shards: int | None = None) -> None:
        super().__init__(source, dtype)
        self._params = params_of(self.args)
        # Llama 1 and 2 split the embedding's columns, Llama 3 its rows; and only rows can be shared with the output.
        by_rows = self.vocabulary.kind == "bpe" or self.args.tie_embeddings
        self._embedding_dimension = 0 if by_rows else 1
        possible = list(self._possible_shards())
        if shards is not None and shards not in possible:
            raise FormatError(f"--shards is {shards}; this model divides into {', '.join(map(str, possible))}")
        self.shards = shards or (source.shards if source.shards in possible else 1)
        self.settings = {"shards": self.shards}

    def size_bound(self) -> int:
        shapes = self.args.tensor_shapes()
        copied = sum(torch.Size(shape).numel() for name, shape in shapes.items() if self._dimension(name) is None)
        records = self.shards * (len(shapes) + 8)
        small = records * RECORD_OVERHEAD + len(self.tokenizer_model())
        return self.tensor_bytes() + (self.shards - 1) * copied * self.dtype.itemsize + small

    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        params = (json.dumps(self._params, indent=2) + "\n").encode()
        write_file(folder / "params.json", params)
        write_file(folder / "tokenizer.model", self.tokenizer_model())
        for name, content in self.vocabulary.stops_file().items():
            write_file(folder / name, content)
        sums = {"params.json": hashlib.md5(params, usedforsecurity=False).hexdigest()}
        shapes = {name: self._shard_of(name, shape) for name, shape in self.args.tensor_shapes().items()}
        names, entries = [f"consolidated.{number:02d}.pth" for number in range(self.shards)], {}
        with ExitStack() as stack:
            files = [stack.enter_context(HashedFile(folder / name, ("sha256", "md5"))) for name in names]
            writers = [TensorFileWriter(file, shapes, self.dtype, self._contents) for file in files]
            threads = stack.enter_context(ThreadPoolExecutor(min(self.shards, WRITERS)))
            for name in self.source.names:
                tensor, dimension = self.source.read(name), self._dimension(name)

                def write(number: int, name: str = name, tensor: Tensor = tensor, dim: int | None = dimension) -> None:
                    part = tensor if dim is None else tensor.chunk(self.shards, dim)[number]
                    writers[number].write(name, cast(name, part, self.dtype))

                for _ in threads.map(write, range(self.shards)):
                    pass
                advance(tensor.numel() * self.dtype.itemsize)
                del tensor, write  # before the next one is read
            for writer in writers:
                writer.close()
            for name, file in zip(names, files, strict=True):
                entries[name], sums[name] = file.entry(), file.digest("md5")
        checklist = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_file(folder / "checklist.chk", checklist.encode())
        return entries

    def _contents(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Meta's code has an output layer always; a tied model's is the embedding under a second name."""
        return tensors | {"output.weight": tensors["tok_embeddings.weight"]} if self.args.tie_embeddings else tensors

    def _dimension(self, name: str) -> int | None:
        return self._embedding_dimension if name == "tok_embeddings.weight" else sharded_dimension(name)

    def _shard_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dimension = self._dimension(name)
        return tuple(size // self.shards if place == dimension else size for place, size in enumerate(shape))

    def _possible_shards(self) -> Iterator[int]:
        args = self.args
        divided = [args.n_heads, args.n_kv_heads, args.ffn_hidden_dim, args.vocab_size]
        if self._embedding_dimension == 1:
            divided.append(args.dim)
        return (count for count in range(1, args.n_kv_heads + 1) if all(size % count == 0 for size in divided))


def params_of(args: ModelArgs) -> dict[str, Any]:
    """The params.json from which Meta's code, and ours, makes this model again.

    Keys that a Llama 1 or 2 does not need are left out: the code of its time does not know them.
    """
    if args.head_dim * args.n_heads != args.dim:
        raise FormatError(
            f"Meta's format has no heads of {args.head_dim}: {args.n_heads} heads of a model {args.dim} wide have "
            f"{args.dim / args.n_heads:g}"
        )
    params: dict[str, Any] = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads}
    if args.n_kv_heads != args.n_heads:
        params["n_kv_heads"] = args.n_kv_heads
    params |= {"vocab_size": args.vocab_size, **_feed_forward_params(args), "norm_eps": args.norm_eps}
    if args.rope_theta != 10000.0:
        params["rope_theta"] = args.rope_theta
    if args.rope_scaling is not None:
        params["use_scaled_rope"] = True
        if args.rope_scaling != RopeScaling(factor=args.rope_scaling.factor):
            raise FormatError(f"Meta's format has no {args.rope_scaling}: only its factor can be chosen")
        if args.rope_scaling.factor != usual_factor(args.dim):
            params["rope_scaling_factor"] = args.rope_scaling.factor
    return params


def _feed_forward_params(args: ModelArgs) -> dict[str, Any]:
    """Settings from which Meta's rule gives the feed-forward width, which has no key of its own."""
    own = (args.multiple_of, args.ffn_dim_multiplier)
    ratio = args.ffn_hidden_dim / int(8 * args.dim / 3)
    powers = [2**power for power in range(12, -1, -1) if args.ffn_hidden_dim % 2**power == 0]
    rounded = [int(ratio * 10**digits) / 10**digits for digits in range(1, 17)]
    exact = (args.ffn_hidden_dim + 0.5) / int(8 * args.dim / 3)
    for multiple, multiplier in (own, *((m, r) for r in (None, *rounded, exact) for m in powers)):
        try:
            made = ModelArgs(
                args.dim, 1, args.n_heads, 1, multiple_of=multiple, ffn_dim_multiplier=multiplier
            ).ffn_hidden_dim
        except ValueError:
            continue
        if made == args.ffn_hidden_dim:
            return {"multiple_of": multiple} | ({"ffn_dim_multiplier": multiplier} if multiplier is not None else {})
    raise FormatError(
        f"Meta's format has no feed-forward width of {args.ffn_hidden_dim} for a model {args.dim} wide: "
        "no multiple_of and ffn_dim_multiplier give it"
    )
