"""Hugging Face checkpoints: `config.json` and safetensors or PyTorch's files, one or several with an index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from formats.pickled import check_crcs, load_tensors
from formats.source import (
    FormatError,
    Source,
    byte_bar,
    count_dtypes,
    find_tokenizer,
    first_line,
    model_args,
    read_json,
    shape_text,
)
from formats.vocabulary import GENERATION
from llama2 import ModelArgs, RopeScaling

LONGEST_NAME = 255  # bytes of a file's name
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a folder may hold, the best first: one file, or several and an index of them.
LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

# Canonical name -> theirs; {} is the layer's number.
HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# The tensors whose rows transformers orders otherwise.
OUTPUT = "lm_head.weight"
ROTATED = ("attention.wq.weight", "attention.wk.weight")
# Long contexts are a choice of the server: a cache for 131072 positions would not fit a small machine.
LONGEST_DEFAULT_CONTEXT = 4096


class HFSource(Source):
    """The Llama of transformers, its names mapped and its Q and K put back into neighbouring pairs."""

    name: ClassVar[str] = "hf"
    title: ClassVar[str] = "Hugging Face"
    needs: ClassVar[str] = f"config.json and {SINGLE} or {INDEX}"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None) -> None:
        self._folder = folder
        self.args, self.context_length = _model_args(folder / "config.json")
        self._paths, index = _weight_files(folder)
        beside = [path for path in (index, folder / GENERATION) if path is not None and path.is_file()]
        self.files = [folder / "config.json", *self._paths, *beside]
        self._stored: dict[str, _Stored] = {}
        for path in self._paths:
            for name, stored in _tensors_of(path):
                if name in self._stored:
                    raise FormatError(f"{path}: {name} is in another file too")
                self._stored[name] = stored
        numbers = count_dtypes(self._check_tensors(), self.args)
        self.dtype, self.mixed_dtypes = numbers.most_common(1)[0][0], len(numbers) > 1
        self.tokenizer_path = find_tokenizer(folder, tokenizer_path)

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        if any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            return True
        # A folder of GGUF files may have a config.json too.
        return (folder / "config.json").exists() and next(folder.glob("*.gguf"), None) is None

    def read(self, name: str) -> Tensor:
        tensor = self._stored[hf_name(name)].read()
        if name.endswith(ROTATED):
            return neighbouring_pairs(tensor, self.args.head_dim)
        return tensor

    def verify(self, progress: bool = False) -> None:
        """Compare PyTorch's files with their own CRC32s; safetensors have none."""
        paths = [path for path in self._paths if path.suffix == ".bin"]
        with byte_bar(sum(path.stat().st_size for path in paths), "verifying", progress) as bar:
            for path in paths:
                check_crcs(path, bar.update)

    def close(self) -> None:
        self._stored = {}

    def _check_tensors(self) -> dict[str, torch.dtype]:
        """Compare names, shapes and dtypes with the model of config.json and return the dtypes."""
        shapes, dtypes = self.args.tensor_shapes(), {}
        for name, shape in shapes.items():
            theirs = hf_name(name)
            if theirs not in self._stored:
                raise FormatError(f"{self._folder}: tensor {theirs} is missing")
            stored = self._stored[theirs]
            if stored.shape != shape:
                raise FormatError(
                    f"{self._folder}: {theirs} is {shape_text(stored.shape)}, but config.json means {shape_text(shape)}"
                )
            if stored.dtype not in STORED_DTYPES:
                raise FormatError(
                    f"{self._folder}: {theirs} is {stored.dtype}; {', '.join(STORED_DTYPES)} can be converted"
                )
            dtypes[name] = STORED_DTYPES[stored.dtype]
        expected = {hf_name(name) for name in shapes}
        if self.args.tie_embeddings and OUTPUT in self._stored:  # a copy, or transformers would use it
            output, embedding = self._stored[OUTPUT], self._stored[hf_name("tok_embeddings.weight")]
            if output.shape != embedding.shape or not torch.equal(output.read(), embedding.read()):
                raise FormatError(
                    f"{self._folder}: config.json ties {OUTPUT} to the embedding, but they differ; remove the tensor, "
                    f"or say tie_word_embeddings: false"
                )
        for name in self._stored:
            if name not in expected and name != OUTPUT and not name.endswith("rotary_emb.inv_freq"):
                raise FormatError(f"{self._folder}: tensor {name!r} does not belong to the model of config.json")
        return dtypes


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file, its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def _tensors_of(path: Path) -> Iterator[tuple[str, _Stored]]:
    """What a file holds, be it safetensors or PyTorch's."""
    if path.suffix == ".bin":
        for name, tensor in load_tensors(path).items():
            yield name, _Stored(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], lambda tensor=tensor: tensor)
        return
    file = _open(path)
    for name in file.keys():  # noqa: SIM118 - no dict
        try:
            stored = file.get_slice(name)
            yield name, _Stored(tuple(stored.get_shape()), stored.get_dtype(), _Reading(path, file, name))
        except SafetensorError as error:
            raise FormatError(f"{path}: {name}: {first_line(error)}") from None


@dataclass(frozen=True)
class _Reading:
    path: Path
    file: Any
    name: str

    def __call__(self) -> Tensor:
        try:
            return self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise FormatError(f"{self.path}: {self.name}: {first_line(error)}") from None


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The files of weights that a folder has, and the index that names them, if there is one."""
    for single, index in LAYOUTS:
        if (folder / single).exists():
            return [folder / single], None
        if (folder / index).exists():
            return _indexed(folder / index), folder / index
    raise FormatError(f"{folder}: none of {', '.join(name for layout in LAYOUTS for name in layout)} is there")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: 'weight_map' is missing or is no object")
    names = set()
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
        if not plain or len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
            raise FormatError(f"{index}: {tensor!r:.80} is said to be in {name!r:.80}, which is no plain file name")
        names.add(name)
    paths = [index.parent / name for name in sorted(names)]
    for path in paths:
        if not path.exists():
            raise FormatError(f"{path}: missing, although {index.name} names it")
    return paths


def hf_name(name: str) -> str:
    """What transformers calls the canonical name."""
    return renamed(name, HF_NAMES)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """What others call the canonical name, of names in which {} stands for the number of a layer."""
    layer = re.search(r"\d+", name)
    return names[name] if layer is None else names[name.replace(layer[0], "{}", 1)].format(layer[0])


def neighbouring_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows from first-half-and-second-half pairs, as transformers rotates, to (0, 1), (2, 3)..."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)


def halves(weight: Tensor, head_dim: int) -> Tensor:
    """The other way round: from pairs of neighbours to first and second half."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FormatError(f"{path}: is no regular file" if path.exists() else f"{path}: missing")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FormatError(f"{path}: no valid safetensors file: {first_line(error)}") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or first_line(error)}") from None


def _model_args(path: Path) -> tuple[ModelArgs, int | None]:
    """The model that a config.json means, and how many positions it was made for."""
    config = read_json(path)
    _refuse_other_models(path, config)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if config.get(key) is None:
            raise FormatError(f"{path}: {key!r} is missing")
    rope_theta, rope_scaling = _rope(path, config)
    settings = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn_hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    longest = config.get("max_position_embeddings")
    if longest is not None:
        settings["max_seq_len"] = min(longest, LONGEST_DEFAULT_CONTEXT) if isinstance(longest, int) else longest
    return model_args(path, **settings), longest


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    """Stop at what would convert without complaint and then answer nonsense."""
    if config.get("model_type") != "llama":
        raise FormatError(f"{path}: model_type is {config.get('model_type')!r}; only 'llama' can be converted")
    architectures = config.get("architectures")
    if architectures and architectures != ["LlamaForCausalLM"]:
        raise FormatError(f"{path}: architectures is {architectures!r}; only LlamaForCausalLM can be converted")
    allowed: tuple[tuple[str, object], ...] = (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
        ("partial_rotary_factor", 1.0),
    )
    for key, value in allowed:
        if config.get(key) not in (None, value):
            wanted = "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
            raise FormatError(f"{path}: {key} is {config[key]!r}; only {wanted} is supported")


def _rope(path: Path, config: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """RoPE's base and scaling, in the older form (`rope_theta`, `rope_scaling`) or the newer (`rope_parameters`)."""
    newer, older = (_rope_of(path, config, key) for key in ("rope_parameters", "rope_scaling"))
    if config.get("rope_parameters") and config.get("rope_scaling") and newer != older:
        raise FormatError(f"{path}: rope_parameters and rope_scaling mean different things; remove one of them")
    return newer if config.get("rope_parameters") else older


def _rope_of(path: Path, config: dict[str, Any], key: str) -> tuple[Any, RopeScaling | None]:
    settings = config.get(key) or {}
    if not isinstance(settings, dict):
        raise FormatError(f"{path}: {key} is {settings!r}; an object is needed")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise FormatError(
            f"{path}: partial_rotary_factor is {settings['partial_rotary_factor']!r}; only 1 is supported"
        )
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise FormatError(f"{path}: {key} is of type {kind!r}; 'default' and 'llama3' are supported")
    name = "original_max_position_embeddings"  # which transformers takes from outside, where it is there too
    if config.get(name) is not None and config[name] != settings.get(name):
        raise FormatError(
            f"{path}: {name} is {config[name]!r}, but {settings.get(name)!r} in {key}; remove one of them"
        )
    try:
        scaling = RopeScaling(
            factor=settings["factor"],
            low_freq_factor=settings["low_freq_factor"],
            high_freq_factor=settings["high_freq_factor"],
            original_max_seq_len=settings["original_max_position_embeddings"],
        )
    except KeyError as error:
        raise FormatError(f"{path}: {key} lacks {error.args[0]!r}") from None
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: {key}: {error}") from None
    return theta, scaling
