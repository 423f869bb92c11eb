"""Write a random checkpoint of a real model's shapes, to test memory and speed without the real weights.

python -m tools.random_checkpoint OUT --shape 7B --format meta
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command_line import Parser, end_with
from deploy.configuration import PROJECT
from engine.checkpoint import CHECKPOINT_DTYPES
from formats.hf import DTYPE_NAMES, INDEX, SINGLE, hf_name
from formats.meta import SHARDED_DIMENSIONS
from llama2 import ModelArgs

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32},
    "50M": {"dim": 512, "n_layers": 16, "n_heads": 8, "multiple_of": 32},
    "1.1B": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "multiple_of": 256},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256},
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
}
VOCABULARY = 32000
DEMO_TOKENIZER = PROJECT / "demo" / "model" / "tokenizer.model"

_BLOCK = 1 << 22
_PAGE = 4096


@dataclass
class Noise:
    """Tensors that are windows on one file of random numbers, so that none of them takes memory of its own."""

    path: Path
    dtype: torch.dtype
    numbers: int
    windows: np.random.Generator

    @classmethod
    @contextlib.contextmanager
    def make(cls, folder: Path, largest: int, dtype: torch.dtype, seed: int) -> Iterator[Noise]:
        """The file, for tensors of up to `largest` numbers; it is removed in the end."""
        generator, numbers = torch.Generator().manual_seed(seed), largest + _BLOCK
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".noise-") as file:
            for start in range(0, numbers, _BLOCK):
                block = torch.randn(min(_BLOCK, numbers - start), generator=generator).mul_(0.02).to(dtype)
                file.write(block.view(torch.uint8).numpy())
            file.flush()
            yield cls(Path(file.name), dtype, numbers, np.random.default_rng(seed))

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Random numbers of the given shape; of ones if it is a norm's, as after training they are near it."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        room = (self.numbers - math.prod(shape)) * self.dtype.itemsize // _PAGE
        start = int(self.windows.integers(room)) * _PAGE
        size = math.prod(shape) * self.dtype.itemsize
        window = np.memmap(self.path, np.uint8, "c", start, (size,))
        return torch.from_numpy(window).view(self.dtype).view(shape)


def write_meta(folder: Path, args: ModelArgs, params: dict[str, Any], noise: Noise, shards: int) -> None:
    """Meta's layout: one .pth per shard, in PyTorch's own file format."""
    for shard in range(shards):
        tensors = {}
        for name, shape in args.tensor_shapes().items():
            part, stem = list(shape), re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")
            dimension = 1 if stem == "tok_embeddings" else SHARDED_DIMENSIONS[stem]
            if dimension is not None:
                part[dimension] //= shards
            tensors[name] = noise.tensor(tuple(part))
        # The mapped windows stay on disk until torch.save writes them, one after the other.
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5, "vocab_size": -1}))


def write_hf(folder: Path, args: ModelArgs, noise: Noise, shards: int) -> None:
    """Hugging Face's layout: safetensors, written front to back, and their index if there are several."""
    shapes = {hf_name(name): shape for name, shape in args.tensor_shapes().items()}
    names, weight_map = list(shapes), {}
    each = math.ceil(len(names) / shards)
    for number in range(shards):
        file = SINGLE if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * each : (number + 1) * each]
        weight_map |= dict.fromkeys(part, file)
        _write_safetensors(folder / file, {name: shapes[name] for name in part}, noise)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "intermediate_size": args.ffn_hidden_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], noise: Noise) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * noise.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[noise.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tqdm(shapes.values(), desc=path.name, unit="tensor", mininterval=1):
            file.write(noise.tensor(shape).view(torch.uint8).numpy().data)


def write_random_checkpoint(
    folder: Path,
    shape: str,
    form: str = "meta",
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    tokenizer: Path = DEMO_TOKENIZER,
    vocab_size: int = VOCABULARY,
) -> None:
    """Write the whole checkpoint, holding about one tensor in memory."""
    args = ModelArgs(**SHAPES[shape], vocab_size=vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(math.prod(size) for size in args.tensor_shapes().values())
    with Noise.make(folder, largest, dtype, seed) as noise:
        if form == "meta":
            write_meta(folder, args, SHAPES[shape], noise, shards)
        else:
            write_hf(folder, args, noise, shards)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="random_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to write; it must not hold anything yet")
    parser.add_argument("--shape", choices=list(SHAPES), default="7B", help="model size (default: %(default)s)")
    parser.add_argument("--format", choices=("meta", "hf"), default="meta", help="layout (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of files (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(CHECKPOINT_DTYPES), default="float16", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for other numbers (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, default=DEMO_TOKENIZER, metavar="FILE", help="tokenizer.model to copy"
    )
    options = parser.parse_args(argv)
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    if options.shards < 1 or SHAPES[options.shape]["n_heads"] % options.shards:
        parser.error(f"--shards is {options.shards}; it must divide the {SHAPES[options.shape]['n_heads']} heads")
    if not options.tokenizer.is_file():
        parser.error(f"{options.tokenizer}: no such file; name a tokenizer.model with --tokenizer")
    dtype = CHECKPOINT_DTYPES[options.dtype]
    write_random_checkpoint(
        options.folder, options.shape, options.format, options.shards, dtype, options.seed, options.tokenizer
    )
    print(f"{options.folder}: random {options.shape} checkpoint written")
    return 0


if __name__ == "__main__":
    end_with(main)
