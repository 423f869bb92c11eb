"""Megatron-LM's layout and arithmetic, written down from its own rules and not from what reads or writes it here.

A rank of a column parallel layer holds a block of the weight's rows, of a row parallel one a block of its columns, of
the vocabulary a block of rows; a fused QKV holds, group by group, the group's queries, its key and its value; a fused
first layer of a gated MLP holds the rank's gates above the rank's ups; a pipeline stage counts its layers from 0.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from llama2 import ModelArgs

CORE = {
    "input_norm": "self_attention.linear_qkv.layer_norm_weight",
    "qkv": "self_attention.linear_qkv.weight",
    "attention_out": "self_attention.linear_proj.weight",
    "mlp_norm": "mlp.linear_fc1.layer_norm_weight",
    "mlp_in": "mlp.linear_fc1.weight",
    "mlp_out": "mlp.linear_fc2.weight",
}
LOCAL = CORE | {"input_norm": "input_layernorm.weight", "mlp_norm": "pre_mlp_layernorm.weight"}
LEGACY = {
    "input_norm": "input_norm.weight",
    "qkv": "self_attention.query_key_value.weight",
    "attention_out": "self_attention.dense.weight",
    "mlp_norm": "post_attention_norm.weight",
    "mlp_in": "mlp.dense_h_to_4h.weight",
    "mlp_out": "mlp.dense_4h_to_h.weight",
}
OLD = LEGACY | {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "qkv": "attention.query_key_value.weight",
    "attention_out": "attention.dense.weight",
}


def padded(rows: Tensor, tp: int, multiple: int = 128) -> Tensor:
    """A table whose last row is repeated until its rows are a multiple of `multiple` on every rank."""
    while len(rows) % (multiple * tp):
        rows = torch.cat([rows, rows[-1:]])
    return rows


def block(tensor: Tensor, rank: int, tp: int, dimension: int) -> Tensor:
    """A rank's block of rows (0) or columns (1)."""
    size = tensor.shape[dimension] // tp
    return tensor[rank * size : (rank + 1) * size] if dimension == 0 else tensor[:, rank * size : (rank + 1) * size]


def head_rows(weight: Tensor, head: int, size: int, rotated: bool) -> list[Tensor]:
    """The rows of a head; rotated ones turn with the row half a head away, where Meta's turn with their neighbour."""
    rows = [weight[head * size + row] for row in range(size)]
    return rows[0::2] + rows[1::2] if rotated else rows


def fused_qkv(tensors: dict[str, Tensor], layer: int, args: ModelArgs, interleaved: bool = False) -> Tensor:
    """All groups, one after the other: queries, key, value."""
    wq, wk, wv = (tensors[f"layers.{layer}.attention.{name}.weight"] for name in ("wq", "wk", "wv"))
    rows: list[Tensor] = []
    heads_of_group = args.n_heads // args.n_kv_heads
    for group in range(args.n_kv_heads):
        for head in range(group * heads_of_group, (group + 1) * heads_of_group):
            rows += head_rows(wq, head, args.head_dim, not interleaved)
        rows += head_rows(wk, group, args.head_dim, not interleaved) + head_rows(wv, group, args.head_dim, False)
    return torch.stack(rows)


def layer_of_rank(tensors: dict[str, Tensor], layer: int, args: ModelArgs, rank: int, tp: int, **how: Any) -> dict:
    """What a tensor parallel rank holds of one layer."""

    def own(name: str) -> Tensor:
        return tensors[f"layers.{layer}.{name}.weight"]

    return {
        "input_norm": own("attention_norm"),
        "qkv": block(fused_qkv(tensors, layer, args, **how), rank, tp, 0),
        "attention_out": block(own("attention.wo"), rank, tp, 1),
        "mlp_norm": own("ffn_norm"),
        "mlp_in": torch.cat([block(own("feed_forward.w1"), rank, tp, 0), block(own("feed_forward.w3"), rank, tp, 0)]),
        "mlp_out": block(own("feed_forward.w2"), rank, tp, 1),
    }


def rank_model(
    tensors: dict[str, Tensor],
    args: ModelArgs,
    rank: int,
    tp: int,
    layers: range,
    layout: str = "core",
    **how: Any,
) -> dict[str, Any]:
    """The `model` of one rank's file that holds these layers."""
    names = {"core": CORE, "local": LOCAL, "legacy": LEGACY, "old": OLD}[layout]
    stack: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        for part, tensor in layer_of_rank(tensors, layer, args, rank, tp, **how).items():
            stack[f"layers.{number}.{names[part]}"] = tensor.clone()
    first, last = layers.start == 0, layers.stop == args.n_layers
    embedding = block(padded(tensors["tok_embeddings.weight"], tp), rank, tp, 0).clone()
    norm = tensors["norm.weight"].clone()
    output = None
    if last and not args.tie_embeddings:
        output = block(padded(tensors["output.weight"], tp), rank, tp, 0).clone()
    if layout in ("core", "local"):
        model = {f"decoder.{name}": tensor for name, tensor in stack.items()}
        if first:
            model["embedding.word_embeddings.weight"] = embedding
        if last:
            model["decoder.final_layernorm.weight"] = norm
        if output is not None:
            model["output_layer.weight"] = output
        elif last and not first:
            model["output_layer.weight"] = embedding
        return model
    if last:
        stack["final_norm.weight" if layout == "legacy" else "final_layernorm.weight"] = norm
    language: dict[str, Any] = {"encoder" if layout == "legacy" else "transformer": stack}
    if first:
        language["embedding"] = {"word_embeddings": {"weight": embedding}}
    if output is not None:
        language["output_layer"] = {"weight": output}
    model = {"language_model": language}
    if last and not first and args.tie_embeddings:
        model["word_embeddings_for_head"] = {"weight": embedding}
    return model


def namespace(args: ModelArgs, tp: int = 1, pp: int = 1, **changes: Any) -> argparse.Namespace:
    """The arguments that a Megatron run of this model would have."""
    settings: dict[str, Any] = {
        "num_layers": args.n_layers,
        "hidden_size": args.dim,
        "ffn_hidden_size": args.ffn_hidden_dim,
        "num_attention_heads": args.n_heads,
        "group_query_attention": args.n_kv_heads != args.n_heads,
        "num_query_groups": args.n_kv_heads if args.n_kv_heads != args.n_heads else 1,
        "kv_channels": args.head_dim,
        "max_position_embeddings": 2048,
        "position_embedding_type": "rope",
        "rotary_base": args.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "norm_epsilon": args.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not args.tie_embeddings,
        "vocab_size": args.vocab_size,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**(settings | changes))


def write_ranks(
    folder: Path,
    tensors: dict[str, Tensor],
    args: ModelArgs,
    tp: int = 1,
    pp: int = 1,
    stages: list[range] | None = None,
    iteration: str = "release",
    layout: str = "core",
    how: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint as Megatron's format `torch` has it."""
    per_stage = args.n_layers // pp
    stages = stages or [range(s * per_stage, (s + 1) * per_stage) for s in range(pp)]
    for stage, layers in enumerate(stages):
        for rank in range(tp):
            place = folder / iteration / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            place.mkdir(parents=True)
            content = {
                "args": namespace(args, tp, pp, **changes),
                "checkpoint_version": 3.0,
                "iteration": 0,
                "model": rank_model(tensors, args, rank, tp, layers, layout, **(how or {})),
            }
            torch.save(content, place / "model_optim_rng.pt")
    number = "release" if iteration == "release" else str(int(iteration.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(number)
    return folder


def rotate_half(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of (position, head, width), as Megatron's without interleaving: the halves are the pairs."""
    length, _, width = x.shape
    angles = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, width, 2).float() / width))
    angles = torch.cat([angles, angles], -1)[:, None, :]
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def logits(files: list[list[dict[str, Any]]], tokens: list[int]) -> Tensor:
    """What Megatron-core would answer, each stage's ranks computing their shares: (position, padded vocabulary)."""
    given = files[0][0]["args"]
    tp = len(files[0])
    heads = given.num_attention_heads // tp
    groups = (given.num_query_groups if given.group_query_attention else given.num_attention_heads) // tp
    width = given.kv_channels
    hidden = None
    for stage in files:
        models = [file["model"] for file in stage]
        if hidden is None:
            table = torch.cat([model["embedding.word_embeddings.weight"] for model in models])
            hidden = table[tokens]
        count = 1 + max(int(name.split(".")[2]) for name in models[0] if name.startswith("decoder.layers."))
        for layer in range(count):
            prefix = f"decoder.layers.{layer}."
            normed = norm(hidden, models[0][prefix + CORE["input_norm"]], given.norm_epsilon)
            answers = []
            for model in models:
                mixed = (normed @ model[prefix + CORE["qkv"]].T).view(len(tokens), groups, -1)
                query, key, value = mixed.split([heads // groups * width, width, width], -1)
                query = rotate_half(query.reshape(len(tokens), heads, width), given.rotary_base)
                key = rotate_half(key, given.rotary_base).repeat_interleave(heads // groups, 1)
                value = value.repeat_interleave(heads // groups, 1)
                seen = F.scaled_dot_product_attention(
                    query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
                )
                context = seen.transpose(0, 1).reshape(len(tokens), heads * width)
                answers.append(context @ model[prefix + CORE["attention_out"]].T)
            hidden = hidden + sum(answers)
            normed = norm(hidden, models[0][prefix + CORE["mlp_norm"]], given.norm_epsilon)
            answers = []
            for model in models:
                gate, up = (normed @ model[prefix + CORE["mlp_in"]].T).chunk(2, -1)
                answers.append((F.silu(gate) * up) @ model[prefix + CORE["mlp_out"]].T)
            hidden = hidden + sum(answers)
    models = [file["model"] for file in files[-1]]
    hidden = norm(hidden, models[0]["decoder.final_layernorm.weight"], given.norm_epsilon)
    head = "output_layer.weight" if "output_layer.weight" in models[0] else "embedding.word_embeddings.weight"
    return torch.cat([hidden @ model[head].T for model in models], -1)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def stacked(tensors: dict[str, Tensor], args: ModelArgs, tp: int) -> dict[str, tuple[tuple[int, ...], dict]]:
    """What the ranks save together in format `torch_dist`: by name, the whole shape and the blocks by their offsets."""
    whole: dict[str, tuple[tuple[int, ...], dict]] = {}
    table = padded(tensors["tok_embeddings.weight"], tp)
    tables = {"embedding.word_embeddings.weight": table}
    if not args.tie_embeddings:
        tables["output_layer.weight"] = padded(tensors["output.weight"], tp)
    for name, table in tables.items():
        rows = len(table) // tp
        whole[name] = (tuple(table.shape), {(rank * rows, 0): block(table, rank, tp, 0) for rank in range(tp)})
    whole["decoder.final_layernorm.weight"] = ((args.dim,), {(0,): tensors["norm.weight"]})
    for layer in range(args.n_layers):
        for rank in range(tp):
            for part, tensor in layer_of_rank(tensors, layer, args, rank, tp).items():
                name = f"decoder.layers.{CORE[part]}"
                if tensor.dim() == 1:
                    shape, blocks = whole.setdefault(name, ((args.n_layers, args.dim), {}))
                    blocks[layer, 0] = tensor[None]
                elif part == "mlp_in":  # the gates of all ranks lie above the ups of all ranks
                    shape, blocks = whole.setdefault(name, ((args.n_layers, 2 * args.ffn_hidden_dim, args.dim), {}))
                    for half, piece in enumerate(tensor.chunk(2)):
                        blocks[layer, half * args.ffn_hidden_dim + rank * len(piece), 0] = piece[None]
                else:
                    by_rows = part == "qkv"
                    shape = (len(tensor) * tp, args.dim) if by_rows else (args.dim, tensor.shape[1] * tp)
                    shape, blocks = whole.setdefault(name, ((args.n_layers, *shape), {}))
                    place = (rank * len(tensor), 0) if by_rows else (0, rank * tensor.shape[1])
                    blocks[layer, *place] = tensor[None]
    return whole


class BlockPlanner(dcp.DefaultSavePlanner):
    """Lets DCP write the given blocks, as ranks that each have a piece of a tensor would."""

    def __init__(self, whole: dict[str, tuple[tuple[int, ...], dict]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.whole = whole

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, torch.Size(offsets)),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(torch.Size(offsets), piece.shape),
                        TensorProperties(dtype=piece.dtype),
                        torch.Size(shape),
                    ),
                )
                for name, (shape, blocks) in self.whole.items()
                for offsets, piece in blocks.items()
            ]
            # 8-bit scales and the like
            + [WriteItem(MetadataIndex("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"), WriteItemType.BYTE_IO)]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(b"state")
        return self.whole[write_item.index.fqn][1][tuple(write_item.index.offset)]


def write_distributed(
    folder: Path, tensors: dict[str, Tensor], args: ModelArgs, tp: int = 1, edit: Any = None, **changes: Any
) -> Path:
    """A checkpoint as Megatron's format `torch_dist` has it, written by DCP; `edit` may change its blocks before."""
    place = folder / "iter_0000020"
    whole = stacked(tensors, args, tp)
    moments = {(0, 0): torch.zeros(2, 2)}
    whole["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"] = ((2, 2), moments)
    if edit is not None:
        edit(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({}, storage_writer=dcp.FileSystemWriter(place), planner=BlockPlanner(whole), no_dist=True)
    content = {"args": namespace(args, tp, **changes), "checkpoint_version": 3.0, "iteration": 20}
    torch.save(content, place / "common.pt")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(config | {"common_backend": "torch", "common_backend_version": 1}))
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    return folder
