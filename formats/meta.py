"""Meta's own checkpoints: `consolidated.NN.pth` in any number of model-parallel shards, and `params.json`."""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from formats.pickled import check_crcs, load_tensors
from formats.source import (
    FormatError,
    Source,
    byte_bar,
    count_dtypes,
    find_tokenizer,
    model_args,
    read_json,
    shape_text,
)
from llama2 import ModelArgs, RopeScaling

# The dimension along which Meta's shards lie side by side; None where every shard holds the same.
SHARDED_DIMENSIONS: dict[str, int | None] = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "output": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
}
NOT_WEIGHTS = {"rope.freqs"}

PARAMS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "max_seq_len",
    "max_batch_size",
}
# `use_scaled_rope` is what Meta publishes; forks name the factor too.
ROPE_PARAMS = {"use_scaled_rope", "rope_scaling_factor", "rope_scale_factor"}
HARMLESS_PARAMS = {"model_parallel_size", "flash", "use_kv_cache"}
# Meta's files do not say it, but Llama 3.2's 1B (and Guard) and 3B stretch RoPE by 32 and 3.1 to 3.3's others by 8.
LLAMA_3_2_DIMS = {2048, 3072}

_BLOCK = 4 << 20


class MetaSource(Source):
    """`consolidated.00.pth` to `consolidated.<n-1>.pth`, put side by side tensor by tensor."""

    name: ClassVar[str] = "meta"
    title: ClassVar[str] = "Meta"
    needs: ClassVar[str] = "params.json and consolidated.00.pth"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None) -> None:
        self._folder = folder
        self._paths = _shard_paths(folder)
        self.shards = len(self._paths)
        self.files = [folder / "params.json", *self._paths]
        if (folder / "checklist.chk").is_file():
            self.files.append(folder / "checklist.chk")
        self._params = read_json(folder / "params.json")
        self._tensors = [_without_tied_output(load_tensors(path)) for path in self._paths]
        self._embedding_dimension = 0
        self.args = self._model_args()
        self._check_tensors()
        numbers = count_dtypes({name: self._tensors[0][name].dtype for name in self.names}, self.args)
        self.dtype, self.mixed_dtypes = numbers.most_common(1)[0][0], len(numbers) > 1
        self.tokenizer_path = find_tokenizer(folder, tokenizer_path)

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        if next(folder.glob("consolidated.*.pth"), None) is not None:
            return True
        # Alone it says that the shards are missing; a folder of Hugging Face's may have one too.
        return (folder / "params.json").exists() and not (folder / "config.json").exists()

    def read(self, name: str) -> Tensor:
        parts = [tensors[name] for tensors in self._tensors]
        dimension = self._dimension(name)
        if dimension is None:
            for path, part in zip(self._paths[1:], parts[1:], strict=True):
                if not torch.equal(part, parts[0]):
                    raise FormatError(
                        f"{path}: {name} differs from {self._paths[0].name}'s; every shard must hold the same"
                    )
            return parts[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)

    def verify(self, progress: bool = False) -> None:
        """Compare the files with Meta's checklist of MD5s, and those it does not name with their own CRC32s."""
        checklist = _read_checklist(self._folder / "checklist.chk")
        listed = [name for name in checklist if (self._folder / name).is_file()]
        unlisted = [path for path in self._paths if path.name not in checklist]
        total = sum((self._folder / name).stat().st_size for name in listed) + sum(p.stat().st_size for p in unlisted)
        with byte_bar(total, "verifying", progress) as bar:
            for name in listed:
                if _md5(self._folder / name, bar) != checklist[name]:
                    raise FormatError(
                        f"{self._folder / name}: the content does not match checklist.chk: the file is corrupt"
                    )
            for path in unlisted:
                check_crcs(path, bar.update)

    def close(self) -> None:
        self._tensors = []

    def _model_args(self) -> ModelArgs:
        path, params = self._folder / "params.json", dict(self._params)
        known = PARAMS | ROPE_PARAMS | HARMLESS_PARAMS
        for key in params:
            if key not in known and params[key] is not None:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "it may change the model, so it is not ignored"
                raise FormatError(f"{path}: unknown key {key!r}; {hint}")
        for key in ("dim", "n_layers", "n_heads"):
            if params.get(key) is None:
                raise FormatError(f"{path}: {key!r} is missing")
        settings: dict[str, Any] = {key: params[key] for key in PARAMS if params.get(key) is not None}
        settings["rope_scaling"] = self._rope_scaling(path)
        settings["tie_embeddings"] = "output.weight" not in self._tensors[0]
        if settings.get("vocab_size", -1) == -1:
            settings["vocab_size"] = 1  # the embedding says it, but reading its shape needs a checked `dim`
            settings["vocab_size"] = self._vocabulary(model_args(path, **settings).dim)
        args = model_args(path, **settings)
        embedding, rows = self._embedding().shape, args.vocab_size
        # Llama 1 and 2 split the embedding's columns, Llama 3 its rows.
        if len(embedding) == 2 and embedding[0] * self.shards == rows and embedding[1] == args.dim:
            self._embedding_dimension = 0
        else:
            self._embedding_dimension = 1
        return args

    def _rope_scaling(self, path: Path) -> RopeScaling | None:
        if not self._params.get("use_scaled_rope"):
            return None
        factor = self._params.get("rope_scaling_factor") or self._params.get("rope_scale_factor")
        try:
            return RopeScaling(factor=factor or usual_factor(self._params["dim"]))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path}: {error}") from None

    def _embedding(self) -> Tensor:
        embedding = self._tensors[0].get("tok_embeddings.weight")
        if embedding is None:
            raise FormatError(f"{self._paths[0]}: tensor tok_embeddings.weight is missing")
        return embedding

    def _vocabulary(self, dim: int) -> int:
        embedding = self._embedding()
        if embedding.dim() == 2 and embedding.shape[1] == dim:
            return embedding.shape[0] * self.shards
        return embedding.shape[0] if embedding.dim() == 2 else 1

    def _dimension(self, name: str) -> int | None:
        if name == "tok_embeddings.weight":
            return self._embedding_dimension
        return sharded_dimension(name)

    def _check_tensors(self) -> None:
        """Every shard must hold its part of every tensor, and nothing else."""
        shapes = self.args.tensor_shapes()
        for path, tensors in zip(self._paths, self._tensors, strict=True):
            for name, shape in shapes.items():
                if name not in tensors:
                    raise FormatError(f"{path}: tensor {name} is missing")
                expected, dimension = list(shape), self._dimension(name)
                if dimension is not None:
                    if shape[dimension] % self.shards:
                        raise FormatError(
                            f"{path}: {name} ({shape_text(shape)}) does not divide into {self.shards} shards"
                        )
                    expected[dimension] //= self.shards
                found = tensors[name]
                if list(found.shape) != expected:
                    raise FormatError(
                        f"{path}: {name} is {shape_text(found.shape)}, but params.json means "
                        f"{shape_text(tuple(expected))} (shard of {self.shards})"
                    )
                if found.dtype != self._tensors[0][name].dtype:
                    raise FormatError(
                        f"{path}: {name} is {found.dtype}, but {self._tensors[0][name].dtype} in {self._paths[0].name}"
                    )
            for name in tensors:
                if name not in shapes and name not in NOT_WEIGHTS:
                    raise FormatError(f"{path}: tensor {name!r} does not belong to the model of params.json")


def sharded_dimension(name: str) -> int | None:
    """The dimension along which Meta's shards of a tensor lie side by side; of the embedding there are two kinds."""
    return SHARDED_DIMENSIONS[re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")]


def usual_factor(dim: int) -> float:
    """How much RoPE is stretched where params.json does not say it."""
    return 32.0 if dim in LLAMA_3_2_DIMS else 8.0


def _without_tied_output(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out an output layer that is the embedding under a second name: the model is tied."""
    output, embedding = tensors.get("output.weight"), tensors.get("tok_embeddings.weight")
    if output is None or embedding is None or output.data_ptr() != embedding.data_ptr():
        return tensors
    if output.shape != embedding.shape or output.stride() != embedding.stride() or output.dtype != embedding.dtype:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "output.weight"}


def _shard_paths(folder: Path) -> list[Path]:
    """The shards in order; their numbers must run from 00 without a gap, or weights would go missing silently."""
    found = {}
    for path in folder.glob("consolidated.*.pth"):
        number = re.fullmatch(r"consolidated\.(\d{2,})\.pth", path.name)
        if not number:
            raise FormatError(f"{path}: is no shard name; shards are consolidated.00.pth, consolidated.01.pth, ...")
        found[int(number[1])] = path
    if not found:
        raise FormatError(f"{folder}: consolidated.00.pth is missing")
    for number in range(max(found) + 1):
        if number not in found:
            raise FormatError(
                f"{folder / f'consolidated.{number:02d}.pth'}: missing, although {found[max(found)].name} is there"
            )
    return [found[number] for number in range(len(found))]


def _read_checklist(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        entry = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](?:\./)?([^/\\]+)", line.strip())
        if line.strip() and not entry:
            raise FormatError(f"{path}: line {number} is no MD5 and file name")
        if entry:
            sums[entry[2]] = entry[1].lower()
            if re.fullmatch(r"consolidated\.\d+\.pth", entry[2]) and not (path.parent / entry[2]).exists():
                raise FormatError(f"{path.parent / entry[2]}: missing, although {path.name} lists it")
    return sums


def _md5(path: Path, bar: tqdm) -> str:
    digest, buffer = hashlib.md5(usedforsecurity=False), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                bar.update(count)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()
