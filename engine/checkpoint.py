"""A converted checkpoint: one folder with DCP files, `model_args.json`, the tokenizer and a manifest of hashes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan

from engine.config import ConfigError, from_mapping
from llama2 import ModelArgs, RopeScaling

FORMAT_VERSION = 1
DCP_METADATA = ".metadata"
MANIFEST = "manifest.json"
MODEL_ARGS = "model_args.json"
# The tokenizer is one of these: SentencePiece's or tiktoken's file, or Hugging Face's.
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
CHECKPOINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HASH_BLOCK = 4 << 20
_LARGEST_JSON = 16 << 20


class CheckpointError(ConfigError):
    """A checkpoint folder that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A converted folder that passed its checks."""

    folder: Path
    args: ModelArgs
    dtype: torch.dtype
    tokenizer_path: Path
    manifest: Mapping[str, Any] = field(repr=False, compare=False)
    metadata: Metadata = field(repr=False, compare=False)

    @property
    def weights(self) -> str:
        """What differs where the weights do: converting the same ones again gives the same."""
        files = self.manifest["files"]
        return " ".join(f"{name} {files[name]['sha256']}" for name in sorted(files) if name.endswith(".distcp"))


def open_checkpoint(folder: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Check a converted folder, its hashes too if `verify`, and say what model it holds."""
    folder = Path(folder)
    try:
        _check_is_converted(folder)
        manifest = read_manifest(folder)
        check_sizes(folder, manifest["files"])
        if verify:
            check_hashes(folder, manifest["files"])
        args = _read_model_args(folder / MODEL_ARGS)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror}") from None
    dtype, metadata = CHECKPOINT_DTYPES[manifest["dtype"]], _read_metadata(folder)
    _check_metadata(folder, metadata, args, dtype, manifest["files"])
    tokenizer = next(name for name in TOKENIZERS if name in manifest["files"])
    return Checkpoint(folder, args, dtype, folder / tokenizer, manifest, metadata)


def read_tensors(checkpoint: Checkpoint, state_dict: Mapping[str, Tensor]) -> None:
    """Fill tensors or DTensors by their checkpoint names, each rank reading only the blocks that its shards touch.

    Values are converted to each target's dtype block by block; no rank waits for another.
    """
    metadata = checkpoint.metadata
    for name, target in state_dict.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{checkpoint.folder}: the checkpoint has no tensor {name!r}")
        if tuple(stored.size) != tuple(target.shape):
            given, wanted = _text(stored.size), _text(target.shape)
            raise CheckpointError(f"{checkpoint.folder}: {name} is {given} in the checkpoint, {wanted} in the model")
    reader = _CheckedReader(checkpoint.folder, metadata)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is what we want
        try:
            dcp.load(dict(state_dict), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, Exception) or isinstance(cause, MemoryError):
                raise cause from None  # Ctrl-C, not the checkpoint's fault
            raise CheckpointError(f"{checkpoint.folder}: cannot read the tensors: {_first_line(cause)}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with the keys and types that it must have."""
    path = folder / MANIFEST
    manifest = _read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}; this version reads {FORMAT_VERSION}: convert again"
        )
    for key, kind in (
        ("source_format", str),
        ("dtype", str),
        ("parameters", int),
        ("files", dict),
        ("fingerprint", dict),
    ):
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} is missing or is no {kind.__name__}")
    if manifest["dtype"] not in CHECKPOINT_DTYPES:
        raise CheckpointError(f"{path}: dtype is {manifest['dtype']!r}; allowed: {', '.join(CHECKPOINT_DTYPES)}")
    for name, entry in manifest["files"].items():
        # The manifest may come from anywhere: it must not lead the reader out of its folder.
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path}: {name!r} is no plain file name")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise CheckpointError(f"{path}: the entry of {name!r} needs a size and a sha256")
    for name in (DCP_METADATA, MODEL_ARGS):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path}: {name!r} is not listed")
    if not any(name in manifest["files"] for name in TOKENIZERS):
        raise CheckpointError(f"{path}: {' or '.join(map(repr, TOKENIZERS))} is not listed")
    return manifest


def sha256_of(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """The hash of a file, read in large blocks into one buffer; `advance` is told the bytes of every block."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the files that a manifest lists are there, and whole as far as their sizes tell."""
    for name, entry in files.items():
        path = folder / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, although {MANIFEST} lists it; convert again") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                f"{path}: is no regular file (a link or a folder); a checkpoint's files lie in its folder"
            )
        if found.st_size != entry["size"]:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, {MANIFEST} says {entry['size']} (cut short?)")


def check_hashes(
    folder: Path, files: Mapping[str, Mapping[str, Any]], advance: Callable[[int], object] = lambda count: None
) -> None:
    """Compare every file with its hash in the manifest, several side by side."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda name: sha256_of(folder / name, advance), files)
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise CheckpointError(f"{folder / name}: the content does not match its hash in {MANIFEST} (corrupt)")


def _check_is_converted(folder: Path) -> None:
    if not folder.is_dir():
        reason = "is a file; the converted folder is needed" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {reason}")
    if not (folder / MODEL_ARGS).exists():
        for kind, patterns in (
            ("Meta", ("params.json", "consolidated.*.pth")),
            ("Hugging Face", ("config.json", "*.safetensors")),
            ("GGUF", ("*.gguf",)),
            ("Megatron", ("latest_checkpointed_iteration.txt",)),
        ):
            if any(next(folder.glob(pattern), None) for pattern in patterns):
                raise CheckpointError(
                    f"{folder}: this is a {kind} checkpoint, not a converted one; "
                    f"run: python checkpoint_converter.py {folder} OUT"
                )
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is no converted checkpoint")


def _read_model_args(path: Path) -> ModelArgs:
    settings = _read_json(path)
    try:
        if settings.get("rope_scaling") is not None:
            settings["rope_scaling"] = from_mapping(RopeScaling, settings["rope_scaling"], f"{path}: rope_scaling")
        return from_mapping(ModelArgs, settings, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: too large for a {path.name}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no valid JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


class DataUnpickler(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    """Fills the objects of a pickle, but no class and no function that it names: those are everybody's."""

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, type | FunctionType | BuiltinFunctionType):
            raise pickle.UnpicklingError(f"the pickle changes {target.__name__}; refused")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


class _MetadataUnpickler(DataUnpickler):
    """Reads DCP's metadata, which is a pickle, without letting it call anything but the metadata's own classes."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _ALLOWED = {
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name in CHECKPOINT_DTYPES),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how early releases of Python 3.11 pickle an enum's member
            return _enum_member
        if (module, name) not in self._ALLOWED:
            raise CheckpointError(f"the pickle asks for {module}.{name}, which no checkpoint needs; refused")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: Any) -> Any:
    """What a pickle may use getattr for: a member of the one enum that DCP's metadata has."""
    if owner is not _MEM_FORMAT_ENCODING or name not in owner.__members__:
        raise CheckpointError(f"the pickle asks for the attribute {name!r} of {owner!r}; refused")
    return owner[name]


def _read_metadata(folder: Path) -> Metadata:
    path = folder / DCP_METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle can fail in any way
        raise CheckpointError(f"{path}: no valid DCP metadata: {_first_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: no DCP metadata but {type(metadata).__name__}")
    return metadata


def _check_metadata(
    folder: Path, metadata: Metadata, args: ModelArgs, dtype: torch.dtype, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare what DCP will read with the model, and keep every read inside the folder's own files."""
    path, shapes = folder / DCP_METADATA, args.tensor_shapes()
    try:
        stored = metadata.state_dict_metadata
        for name in shapes:
            if name not in stored:
                raise CheckpointError(f"{path}: tensor {name} of {MODEL_ARGS} is missing")
        blocks = 0
        for name, tensor in stored.items():
            if name not in shapes:
                raise CheckpointError(f"{path}: tensor {name!r} does not belong to the model of {MODEL_ARGS}")
            if tuple(tensor.size) != shapes[name]:
                raise CheckpointError(
                    f"{path}: {name} is {_text(tensor.size)}, {MODEL_ARGS} says {_text(shapes[name])}"
                )
            if tensor.properties.dtype != dtype:
                raise CheckpointError(f"{path}: {name} is {tensor.properties.dtype}, {MANIFEST} says {dtype}")
            if not tiles(tensor.chunks, shapes[name]):
                raise CheckpointError(f"{path}: the blocks of {name} do not add up to {_text(shapes[name])}")
            blocks += len(tensor.chunks)
        for index, place in metadata.storage_data.items():
            size = files.get(place.relative_path, {}).get("size", -1)
            if place.offset < 0 or place.length < 0 or place.offset + place.length > size:
                raise CheckpointError(f"{path}: {index.fqn} lies outside the files that {MANIFEST} lists")
            if place.transform_descriptors:
                raise CheckpointError(f"{path}: {index.fqn} is stored transformed, which is not supported")
        if blocks != len(metadata.storage_data):
            raise CheckpointError(f"{path}: {blocks} blocks of tensors, {len(metadata.storage_data)} of them stored")
    except (AttributeError, TypeError) as error:  # the right classes, filled with the wrong things
        raise CheckpointError(f"{path}: no valid DCP metadata: {_first_line(error)}") from None


def tiles(blocks: Sequence[Any], shape: tuple[int, ...]) -> bool:
    """Whether the blocks cover the shape exactly: all inside, none overlapping, volumes adding up."""
    for block in blocks:
        if len(block.offsets) != len(shape) or len(block.sizes) != len(shape):
            return False
        if any(o < 0 or s < 1 or o + s > n for o, s, n in zip(block.offsets, block.sizes, shape, strict=True)):
            return False
    for a, b in itertools.combinations(blocks, 2):
        edges = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        if all(ao < bo + bs and bo < ao + as_ for ao, as_, bo, bs in edges):
            return False
    return sum(math.prod(block.sizes) for block in blocks) == math.prod(shape)


class _CheckedReader(FileSystemReader):
    """DCP's reader over metadata that was read safely, going through each file from front to back."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        return self._metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """A block, which is a zip file as torch.save writes it; compressed it could be of any size."""
        part = io.BytesIO(super()._slice_file(file, sinfo).read())
        with zipfile.ZipFile(part) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise CheckpointError(f"{sinfo.relative_path}: has compressed records; torch.save writes none")
        part.seek(0)
        return part

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        places = self._metadata.storage_data
        plan.items.sort(key=lambda item: (places[item.storage_index].relative_path, places[item.storage_index].offset))
        return plan


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
