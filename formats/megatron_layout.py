"""What Megatron-LM's checkpoints look like inside: parameters' names, how they are split, and the saved arguments."""

from __future__ import annotations

import argparse
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats.hf import LONGEST_DEFAULT_CONTEXT, halves, neighbouring_pairs
from formats.source import FormatError, first_line, model_args
from llama2 import ModelArgs, RopeScaling

# Says which iteration is the latest: its number, or `release` for weights that no run of Megatron's made.
TRACKER = "latest_checkpointed_iteration.txt"
# Megatron rounds the vocabulary up to a multiple of this times the tensor parallel size, unless told otherwise.
VOCABULARY_MULTIPLE = 128

# What Megatron calls the fields of a model: with Transformer Engine ("core"), with its own layers ("local"), and before
# Megatron-core ("legacy"). A legacy name's dots up to `layers` and `weight` are nested dictionaries.
EMBEDDING, OUTPUT, NORM = "embedding", "output", "norm"
_CORE = {
    EMBEDDING: "embedding.word_embeddings.weight",
    OUTPUT: "output_layer.weight",
    NORM: "decoder.final_layernorm.weight",
    "attention_norm": "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight",
    "qkv": "decoder.layers.{}.self_attention.linear_qkv.weight",
    "proj": "decoder.layers.{}.self_attention.linear_proj.weight",
    "ffn_norm": "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight",
    "fc1": "decoder.layers.{}.mlp.linear_fc1.weight",
    "fc2": "decoder.layers.{}.mlp.linear_fc2.weight",
}
_LEGACY = {
    EMBEDDING: "language_model.embedding.word_embeddings.weight",
    OUTPUT: "language_model.output_layer.weight",
    NORM: "language_model.encoder.final_norm.weight",
    "attention_norm": "language_model.encoder.layers.{}.input_norm.weight",
    "qkv": "language_model.encoder.layers.{}.self_attention.query_key_value.weight",
    "proj": "language_model.encoder.layers.{}.self_attention.dense.weight",
    "ffn_norm": "language_model.encoder.layers.{}.post_attention_norm.weight",
    "fc1": "language_model.encoder.layers.{}.mlp.dense_h_to_4h.weight",
    "fc2": "language_model.encoder.layers.{}.mlp.dense_4h_to_h.weight",
}
LAYOUTS = {
    "core": _CORE,
    "local": _CORE
    | {
        "attention_norm": "decoder.layers.{}.input_layernorm.weight",
        "ffn_norm": "decoder.layers.{}.pre_mlp_layernorm.weight",
    },
    "legacy": _LEGACY,
}
# The legacy layout's copy of a tied embedding on the last pipeline stage; the others call it the output layer.
LEGACY_TIED_COPY = "word_embeddings_for_head.weight"
# Names of earlier releases, and the copy, beside those above.
_OLDER = {
    LEGACY_TIED_COPY: OUTPUT,
    "language_model.encoder.final_layernorm.weight": NORM,
    "language_model.encoder.layers.{}.input_layernorm.weight": "attention_norm",
    "language_model.encoder.layers.{}.post_attention_layernorm.weight": "ffn_norm",
    "language_model.encoder.layers.{}.attention.query_key_value.weight": "qkv",
    "language_model.encoder.layers.{}.attention.dense.weight": "proj",
}
_FIELDS = {theirs: field for layout in LAYOUTS.values() for field, theirs in layout.items()} | _OLDER

# The dimension along which tensor parallelism splits a field; None where every rank holds the same.
SPLIT_DIMENSIONS: dict[str, int | None] = {
    EMBEDDING: 0,
    OUTPUT: 0,
    NORM: None,
    "attention_norm": None,
    "qkv": 0,
    "proj": 1,
    "ffn_norm": None,
    "fc1": 0,
    "fc2": 1,
}


class Place(NamedTuple):
    """Where a canonical tensor is found: the whole field of a layer, or its part with this name."""

    field: str
    layer: int | None = None
    part: str | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        return self.field, self.layer


_PLACES = {
    "tok_embeddings": (EMBEDDING, None),
    "output": (OUTPUT, None),
    "norm": (NORM, None),
    "attention.wq": ("qkv", "q"),
    "attention.wk": ("qkv", "k"),
    "attention.wv": ("qkv", "v"),
    "attention.wo": ("proj", None),
    "feed_forward.w1": ("fc1", "gate"),
    "feed_forward.w3": ("fc1", "up"),
    "feed_forward.w2": ("fc2", None),
    "attention_norm": ("attention_norm", None),
    "ffn_norm": ("ffn_norm", None),
}


def place_of(name: str) -> Place:
    """Where the canonical tensor is in Megatron's model."""
    layer = re.match(r"layers\.(\d+)\.", name)
    field, part = _PLACES[name[layer.end() if layer else 0 :].removesuffix(".weight")]
    return Place(field, int(layer[1]) if layer else None, part)


def field_of(name: str) -> tuple[str, int | None] | None:
    """The field and layer that a parameter of any layout is; None if no Llama has it."""
    name = re.sub(r"^language_model\.transformer\.", "language_model.encoder.", name.removeprefix("module."))
    layer = re.match(r"(?:language_model\.encoder|decoder)\.layers\.(\d{1,9})\.", name)
    if not layer:
        field = _FIELDS.get(name)
        return (field, None) if field in (EMBEDDING, OUTPUT, NORM) else None
    field = _FIELDS.get(name[: layer.start(1)] + "{}" + name[layer.end(1) :])
    return (field, int(layer[1])) if field else None


def is_no_weight(name: str) -> bool:
    """Whether this is state that a model can do without: of Transformer Engine's 8-bit scales, or computed angles."""
    return name.endswith("_extra_state") or name.endswith("rotary_pos_emb.inv_freq")


def field_shape(args: ModelArgs, field: str) -> tuple[int, ...]:
    """The whole field's shape, before padding of the vocabulary."""
    queries = args.n_heads * args.head_dim
    return {
        EMBEDDING: (args.vocab_size, args.dim),
        OUTPUT: (args.vocab_size, args.dim),
        NORM: (args.dim,),
        "attention_norm": (args.dim,),
        "qkv": (queries + 2 * args.n_kv_heads * args.head_dim, args.dim),
        "proj": (args.dim, queries),
        "ffn_norm": (args.dim,),
        "fc1": (2 * args.ffn_hidden_dim, args.dim),
        "fc2": (args.dim, args.ffn_hidden_dim),
    }[field]


def join_qkv(q: Tensor, k: Tensor, v: Tensor, args: ModelArgs) -> Tensor:
    """Megatron's order of rows: group by group, its queries, its key, its value; Q and K rotate in halves."""
    rows = [halves(q, args.head_dim), halves(k, args.head_dim), v]
    return torch.cat([part.view(args.n_kv_heads, -1, args.dim) for part in rows], 1).view(-1, args.dim)


def split_qkv(parts: list[Tensor], part: str, args: ModelArgs, interleaved: bool) -> Tensor:
    """Q, K or V from the ranks' rows; Q and K rotate neighbouring pairs (as they did before, if `interleaved`)."""
    queries = args.n_heads // args.n_kv_heads * args.head_dim
    group = queries + 2 * args.head_dim
    if parts[0].shape[0] % group:  # more ranks than groups: a rank holds a piece of one
        parts = [torch.cat(parts)]
    start = {"q": 0, "k": queries, "v": queries + args.head_dim}[part]
    stop = queries if part == "q" else start + args.head_dim
    made = torch.cat([each.view(-1, group, args.dim)[:, start:stop].reshape(-1, args.dim) for each in parts])
    return made if part == "v" or interleaved else neighbouring_pairs(made, args.head_dim)


# What a Llama may say; absent or None is as good. Anything else would convert without complaint and answer nonsense.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "use_mup": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (1,),
    "no_rope_freq": (),
    "num_experts": (0,),
    "mtp_num_layers": (0,),
    "window_size": (),
    "softmax_type": ("vanilla",),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "hybrid_layer_pattern": (),
    "hybrid_override_pattern": (),
    "experimental_attention_variant": (),
}


class Arguments:
    """The arguments that a Megatron run saved beside its weights, as far as a Llama needs them."""

    def __init__(self, path: Path, given: object) -> None:
        if type(given) is not argparse.Namespace:
            raise FormatError(f"{path}: 'args' is {_short(given)}; Megatron's argparse.Namespace is needed")
        self.path, self._given = path, vars(given)
        self._refuse_other_models()

    def get(self, name: str, default: Any = None) -> Any:
        """An argument's value, or the default where it is missing or None."""
        value = self._given.get(name)
        return default if value is None else value

    def flag(self, name: str) -> bool:
        """A switch; missing is off."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise FormatError(f"{self.path}: args.{name} is {_short(value)}; it must be True or False")
        return value

    def number(self, name: str) -> int | None:
        """A whole number of at least 1, where there is one."""
        value = self.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise FormatError(f"{self.path}: args.{name} is {_short(value)}; it must be a whole number of at least 1")
        return value

    def vocabulary(self, rows: int, count_tokens: Callable[[], int | None]) -> int:
        """How many of the embedding's rows are tokens: as the arguments say, else as many as the tokenizer has."""
        # The one tokenizer that the number is given for adds a token to it.
        stated = self.number("vocab_size") if self.get("tokenizer_type") != "NullTokenizer" else None
        if stated is not None:
            if stated > rows:
                raise FormatError(f"{self.path}: args.vocab_size is {stated}, but the embedding has {rows} rows")
            return stated
        multiple = self.number("make_vocab_size_divisible_by") or VOCABULARY_MULTIPLE
        padding = multiple * (self.number("tensor_model_parallel_size") or 1)
        tokens = count_tokens()
        # What padding does not explain are tokens that the tokenizer does not know of.
        return tokens if tokens is not None and 0 <= rows - tokens < padding else rows

    def model_args(self, vocab_size: int) -> ModelArgs:
        """The architecture."""
        for name in ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size"):
            if self.get(name) is None:
                raise FormatError(f"{self.path}: args.{name} is missing")
        longest = self.number("max_position_embeddings")
        settings = {
            "dim": self.number("hidden_size"),
            "n_layers": self.number("num_layers"),
            "n_heads": self.number("num_attention_heads"),
            "n_kv_heads": self.number("num_query_groups") if self.flag("group_query_attention") else None,
            "head_dim": self.number("kv_channels"),
            "ffn_hidden_dim": self.number("ffn_hidden_size"),
            "vocab_size": vocab_size,
            "norm_eps": self.get("norm_epsilon", self.get("layernorm_epsilon", 1e-5)),
            "rope_theta": self.get("rotary_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_embeddings": not self.flag("untie_embeddings_and_output_weights"),
        }
        if longest is not None:
            settings["max_seq_len"] = min(longest, LONGEST_DEFAULT_CONTEXT)
        return model_args(self.path, **settings)

    def _rope_scaling(self) -> RopeScaling | None:
        if not self.flag("use_rope_scaling"):
            return None
        try:
            return RopeScaling(factor=self.get("rope_scaling_factor", 8.0))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{self.path}: args: {first_line(error)}") from None

    def _refuse_other_models(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = self.get(name)
            if value is not None and not _one_of(value, allowed):
                wanted = " or ".join(map(repr, allowed)) or "None"
                raise FormatError(f"{self.path}: args.{name} is {_short(value)}; only {wanted} can be converted")
        rotary = self.get("position_embedding_type") == "rope" or self.get("use_rotary_position_embeddings") is True
        for name, found, wanted in (
            ("position_embedding_type", rotary, "'rope'"),
            ("normalization", self.get("normalization") == "RMSNorm", "'RMSNorm'"),
            ("swiglu", self.get("swiglu") is True, "True"),
        ):
            if not found:
                value = _short(self._given.get(name))
                raise FormatError(f"{self.path}: args.{name} is {value}; only {wanted} can be converted")


def _one_of(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether the value is plain and one of these; a tensor's comparison would be another tensor."""
    return isinstance(value, bool | int | float | str) and value in allowed


def _short(value: object) -> str:
    return reprlib.repr(value) if isinstance(value, bool | int | float | str | list | None) else type(value).__name__
