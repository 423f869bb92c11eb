"""Undamaged checkpoints and tokenizers of every kind, tiny ones, for tools.fuzz to damage."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from checkpoint_converter import convert
from engine.checkpoint import MANIFEST
from llama2 import ModelArgs
from tools.random_checkpoint import DEMO_TOKENIZER

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=768, ffn_hidden_dim=64)


@dataclass(frozen=True)
class Sample:
    """An undamaged checkpoint or tokenizer: its files by their paths in its folder, and what of it is opened."""

    kind: str
    name: str
    files: dict[str, bytes]
    target: str = "."


def make_samples(folder: Path) -> list[Sample]:
    """One or a few of every kind, made by the project's own converter."""
    first = _write_meta(folder / "first", DEMO_TOKENIZER)
    third = _write_meta(folder / "third", _write_ranks(folder / "ranks"), tied=True)
    made: list[Sample] = []

    def add(kind: str, name: str, made_at: Path, target: str = ".") -> None:
        files = _contents(made_at, manifest=kind == "dcp")
        for path in [path for path in files if Path(path).name == ".metadata"]:
            files[path] = _without_origin(files[path])
            if MANIFEST in files:
                files[MANIFEST] = with_entry(files[MANIFEST], path, files[path])
        made.append(Sample(kind, name, files, target))

    def converted(given: Path, name: str, to: str, file: str = "", **options: Any) -> Path:
        return convert(given, folder / name / file, to=to, progress=False, **options)

    add("meta", "two shards", converted(first, "meta2", "meta", shards=2))
    add("meta", "Llama 3", converted(third, "meta3", "meta", shards=2))
    hf = converted(third, "hf3", "hf")
    add("hf", "safetensors", converted(first, "hf", "hf", max_file_size=60_000))
    add("hf", "Llama 3", hf)
    add("hf", "bin", _as_bin(converted(first, "bin", "hf"), count=2))
    for name, given, kind in (("F32", first, "F32"), ("Q8_0", first, "Q8_0"), ("Llama 3", third, "Q8_0")):
        (folder / name).mkdir()
        path = converted(given, name, "gguf", "model.gguf", type=kind.lower())
        add("gguf", name, path.parent, path.name)
    add("megatron", "two ranks", converted(first, "megatron2", "megatron", tensor_parallel=2))
    add("megatron", "four ranks", converted(first, "megatron4", "megatron", tensor_parallel=2, pipeline_parallel=2))
    add("megatron", "torch_dist", _as_distributed(converted(first, "distributed", "megatron")))
    add("dcp", "Llama 2", converted(first, "dcp2", "dcp"))
    add("dcp", "Llama 3", converted(third, "dcp3", "dcp"))
    for name, path in (("SentencePiece", DEMO_TOKENIZER), ("tiktoken", folder / "ranks")):
        made.append(Sample("tokenizers", name, {"tokenizer.model": path.read_bytes()}, "tokenizer.model"))
    for name, given in (("tokenizer.json", hf), ("Llama 2's tokenizer.json", converted(first, "hf2", "hf"))):
        files = {file: content for file, content in _contents(given).items() if file.endswith((".json", ".jinja"))}
        files.pop("config.json")
        made.append(Sample("tokenizers", name, files, "tokenizer.json"))
    return made


def _write_meta(folder: Path, tokenizer: Path, tied: bool = False) -> Path:
    """A random model as Meta would publish it, in one shard."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in ARGS.tensor_shapes().items()}
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
    params |= {"ffn_dim_multiplier": 0.75}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        params |= {"use_scaled_rope": True, "rope_theta": 500000.0}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # the same seed is to damage the same manifest
    return folder


def _write_ranks(path: Path) -> Path:
    """A tiktoken file like Llama 3's: all bytes, and some words of them."""
    words = [bytes([byte]) for byte in range(256)] + [b"he", b"hel", b"lo", b"hello", b"in", b"on", b"12"]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(words)))
    return path


def _as_bin(folder: Path, count: int) -> Path:
    """A Hugging Face folder, its weights in the older form."""
    from safetensors.torch import load_file

    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number in range(count):
        name = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def _as_distributed(folder: Path) -> Path:
    """A Megatron folder of one rank, in the format `torch_dist`."""
    [path] = folder.glob("**/mp_rank_00/*.pt")
    content = torch.load(path, weights_only=False)  # our own
    iteration = path.parent.parent
    shutil.rmtree(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(iteration), no_dist=True)
    torch.save({"args": content["args"]}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def _without_origin(metadata: bytes) -> bytes:
    """DCP's metadata without where and when it was made, which the same seed is not to depend on."""
    content = pickle.loads(metadata)  # our own
    content.storage_meta = None
    return pickle.dumps(content)


def with_entry(manifest: bytes, name: str, new: bytes) -> bytes:
    """The manifest, a file's content being another one now."""
    content = json.loads(manifest)
    content["files"][name] = {"size": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    return json.dumps(content, indent=2).encode()


def _contents(folder: Path, manifest: bool = False) -> dict[str, bytes]:
    """A folder's files; the converter's manifest only if its reader looks at it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if manifest or not path.name.endswith("manifest.json")
    }
