"""Llama, from Llama 1 to Llama 3.2, by configuration alone, and how it is sharded over ranks.

Torch only: nothing here reads the environment, a file or the device's name. Checkpoint names are Meta's.

Shapes: N tokens of one step (of many sequences, side by side), R rows whose logits are wanted, D model width,
F feed-forward width, Q query heads, K key/value heads, H head width, V vocabulary. Under tensor parallelism
Q, K, F and V are this rank's share.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies: low ones are divided by `factor`, high ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _check_number("rope_scaling.factor", self.factor, 1.0)
        _check_number("rope_scaling.low_freq_factor", self.low_freq_factor, 1e-6)
        _check_number("rope_scaling.high_freq_factor", self.high_freq_factor, 1e-6)
        _check_whole("rope_scaling.original_max_seq_len", self.original_max_seq_len)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must exceed "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True)
class ModelArgs:
    """One Llama's architecture, and the serving limits that its checkpoint suggests."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    ffn_hidden_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    max_seq_len: int = 2048
    max_batch_size: int = 8

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        sizes = (
            "dim",
            "n_layers",
            "n_heads",
            "vocab_size",
            "n_kv_heads",
            "multiple_of",
            "max_seq_len",
            "max_batch_size",
        )
        for name in sizes:
            _check_whole(name, getattr(self, name))
        _check_whole("n_layers", self.n_layers, most=4096)
        for name in ("head_dim", "ffn_hidden_dim"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        _check_number("norm_eps", self.norm_eps, 0.0)
        _check_number("rope_theta", self.rope_theta, 1.0)
        if self.ffn_dim_multiplier is not None:
            _check_number("ffn_dim_multiplier", self.ffn_dim_multiplier, 1e-3)
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings is {self.tie_embeddings!r}; it must be true or false")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim is {self.dim}; it must be a multiple of n_heads ({self.n_heads})")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.ffn_hidden_dim is None:
            object.__setattr__(self, "ffn_hidden_dim", self._metas_ffn_hidden_dim())

    def _metas_ffn_hidden_dim(self) -> int:
        """Meta's rule: two thirds of 4 * dim, scaled, rounded up to a multiple."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the canonical checkpoint by its name."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            for name, shape in (
                ("attention.wq", (queries, self.dim)),
                ("attention.wk", (keys, self.dim)),
                ("attention.wv", (keys, self.dim)),
                ("attention.wo", (self.dim, queries)),
                ("feed_forward.w1", (self.ffn_hidden_dim, self.dim)),
                ("feed_forward.w2", (self.dim, self.ffn_hidden_dim)),
                ("feed_forward.w3", (self.ffn_hidden_dim, self.dim)),
                ("attention_norm", (self.dim,)),
                ("ffn_norm", (self.dim,)),
            ):
                shapes[f"layers.{layer}.{name}.weight"] = shape
        shapes["norm.weight"] = (self.dim,)
        if not self.tie_embeddings:
            shapes["output.weight"] = (self.vocab_size, self.dim)
        return shapes

    def parameter_count(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_parallel_sizes(self) -> list[int]:
        """The numbers of ranks that this model can be sharded over."""
        return [
            size
            for size in range(1, self.n_heads + 1)
            if self.n_heads % size == 0
            and (self.n_kv_heads % size == 0 or size % self.n_kv_heads == 0)
            and self.ffn_hidden_dim % size == 0
        ]


def _check_whole(name: str, value: object, most: int = 1 << 31) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {_short(value)}; it must be a whole number from 1 to {most}")


def _short(value: object) -> str:
    """A value for a message; a number of thousands of digits is none."""
    return (
        f"a number of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 64 else repr(value)
    )


def _check_number(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {_short(value)}; it must be a finite number of at least {least:g}")


class Cache(Protocol):
    """What attention needs of a cache: keep the new keys and values, attend over all that the sequences have."""

    def attend(self, layer: int, q_NQH: Tensor, k_NKH: Tensor, v_NKH: Tensor) -> Tensor: ...


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The angle that each pair of a head's numbers turns by per position, (H/2) in float32."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponents)
    scaling = args.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn neighbouring pairs of each head, (N, heads, H), by the angles (N, 1, H/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).type_as(x)


class RowwiseLinear(nn.Linear):
    """A linear layer whose input may be spread over ranks: the partial products are summed over `group`."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y


class TokenEmbedding(nn.Embedding):
    """An embedding whose rows may be spread over ranks, `first_row` being this rank's first."""

    group: dist.ProcessGroup | None = None
    first_row: int = 0

    def forward(self, tokens_N: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(tokens_N, self.weight)
        if len(self.weight) == 0:  # more ranks than blocks of rows: this one holds none
            x = self.weight.new_zeros(len(tokens_N), self.embedding_dim)
        else:
            rows = tokens_N - self.first_row
            elsewhere = (rows < 0) | (rows >= len(self.weight))
            x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0.0)
        dist.all_reduce(x, group=self.group)
        return x


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; keys go to the cache already rotated."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, queries, bias=False)
        self.wk = nn.Linear(args.dim, keys, bias=False)
        self.wv = nn.Linear(args.dim, keys, bias=False)
        self.wo = RowwiseLinear(queries, args.dim, bias=False)

    def forward(self, x_ND: Tensor, cosine: Tensor, sine: Tensor, cache: Cache) -> Tensor:
        q_NQH, k_NKH, v_NKH = (w(x_ND).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q_NQH, k_NKH = rotate(q_NQH, cosine, sine), rotate(k_NKH, cosine, sine)
        return self.wo(cache.attend(self.layer, q_NQH, k_NKH, v_NKH).flatten(1))


class FeedForward(nn.Module):
    """The gated feed-forward layer (SwiGLU)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)
        self.w2 = RowwiseLinear(args.ffn_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_ND)) * self.w3(x_ND))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x_ND: Tensor, cosine: Tensor, sine: Tensor, cache: Cache) -> Tensor:
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), cosine, sine, cache)
        return x_ND + self.feed_forward(self.ffn_norm(x_ND))


class Transformer(nn.Module):
    """A Llama over a flat run of tokens: chunks of prompts and single decode tokens side by side."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = TokenEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        # Tied embeddings: one weight under one name, as in the checkpoint.
        self.output = None if args.tie_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)
        self.group: dist.ProcessGroup | None = None

    def forward(self, tokens_N: Tensor, positions_N: Tensor, cache: Cache, rows_R: Tensor | None) -> Tensor | None:
        """Logits (R, V) in float32 for the chosen rows or all; with tensor parallelism on the first rank only."""
        angles = positions_N[:, None, None].float() * self.frequencies
        cosine, sine = angles.cos(), angles.sin()
        x_ND = self.tok_embeddings(tokens_N)
        for layer in self.layers:
            x_ND = layer(x_ND, cosine, sine, cache)
        x_RD = self.norm(x_ND if rows_R is None else x_ND[rows_R])
        logits_RV = self.output(x_RD) if self.output is not None else F.linear(x_RD, self.tok_embeddings.weight)
        return gather_vocabulary(logits_RV.float(), self.args.vocab_size, self.group)

    def set_rope(self, device: torch.device) -> None:
        """Compute the rotary frequencies on `device`; they are no part of the checkpoint and stay float32."""
        self.frequencies = rope_frequencies(self.args).to(device)


def first_vocabulary_row(args: ModelArgs, rank: int, ranks: int) -> int:
    """Where a rank's block of the vocabulary begins."""
    return rank * math.ceil(args.vocab_size / ranks)


def gather_vocabulary(logits_RV: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """All ranks' blocks of the vocabulary side by side, on the group's first rank; the last ones may be short, so they
    travel padded.
    """
    if group is None:
        return logits_RV
    ranks = dist.get_world_size(group)
    block = math.ceil(vocab_size / ranks)
    padded = F.pad(logits_RV, (0, block - logits_RV.shape[1])).contiguous()
    first = dist.get_rank(group) == 0
    blocks = [torch.empty_like(padded) for _ in range(ranks)] if first else None
    dist.gather(padded, blocks, group=group, group_dst=0)
    return torch.cat(blocks, 1)[:, :vocab_size] if first else None


def tensor_parallel_mesh_shape(args: ModelArgs, ranks: int) -> tuple[int, int]:
    """(parts of the KV heads, ranks that share one part): with more ranks than KV heads each head has several."""
    if ranks not in args.tensor_parallel_sizes():
        sizes = ", ".join(map(str, args.tensor_parallel_sizes()))
        raise ValueError(
            f"tensor parallelism over {ranks} ranks does not fit this model ({args.n_heads} heads, "
            f"{args.n_kv_heads} KV heads, feed-forward width {args.ffn_hidden_dim}); sizes that work: {sizes}"
        )
    parts = min(ranks, args.n_kv_heads)
    return parts, ranks // parts


def parallelize(model: Transformer, tp: DeviceMesh, kv: DeviceMesh) -> None:
    """Lay the weights out as DTensors: over all ranks of `tp`, but keys and values over `kv`.

    The two are one and the same mesh, unless there are more ranks than KV heads; then `kv` holds one rank of each
    part, and the ranks that share a part hold the same heads.
    """
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.wq": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(),
        "layers.*.feed_forward.w3": ColwiseParallel(),
    }
    if model.output is not None:
        plan["output"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, tp, plan)
    parallelize_module(model, kv, {f"layers.*.attention.{name}": ColwiseParallel() for name in ("wk", "wv")})


def localize(model: Transformer, tp: DeviceMesh) -> None:
    """Swap every DTensor for this rank's shard, and its dispatch for the three explicit collectives."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(parameter.to_local(), requires_grad=False))
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
    group, rank, ranks = tp.get_group(), tp.get_local_rank(), tp.size()
    for module in model.modules():
        if isinstance(module, RowwiseLinear | TokenEmbedding | Transformer):
            module.group = group
    model.tok_embeddings.first_row = first_vocabulary_row(model.args, rank, ranks)
