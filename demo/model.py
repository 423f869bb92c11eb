"""The Llama-2 architecture as training needs it: Meta's parameter names, no cache."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The hyperparameters of params.json, with the vocabulary size that the tokenizer gives."""

    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    multiple_of: int = 32
    ffn_dim_multiplier: float = 0.7
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Return the width of the feed-forward layer by Meta's rule."""
        width = int(self.ffn_dim_multiplier * int(2 * 4 * self.dim / 3))
        return self.multiple_of * math.ceil(width / self.multiple_of)

    def parameters(self) -> dict:
        """Return the content of params.json, where Meta leaves the vocabulary to the tokenizer."""
        return {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "multiple_of": self.multiple_of,
            "ffn_dim_multiplier": self.ffn_dim_multiplier,
            "norm_eps": self.norm_eps,
            "vocab_size": -1,
        }


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Return random weights under Meta's names."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, deviation: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * deviation

    dim, hidden, kv_dim = shape.dim, shape.hidden_dim, shape.n_kv_heads * shape.head_dim
    into_residual = 0.5 / math.sqrt(shape.n_layers)
    weights = {"tok_embeddings.weight": matrix(shape.vocab_size, dim, 0.5)}
    for layer in range(shape.n_layers):
        prefix = f"layers.{layer}."
        weights[prefix + "attention.wq.weight"] = matrix(dim, dim, dim**-0.5)
        weights[prefix + "attention.wk.weight"] = matrix(kv_dim, dim, dim**-0.5)
        weights[prefix + "attention.wv.weight"] = matrix(kv_dim, dim, dim**-0.5)
        weights[prefix + "attention.wo.weight"] = matrix(dim, dim, dim**-0.5 * into_residual)
        weights[prefix + "feed_forward.w1.weight"] = matrix(hidden, dim, dim**-0.5)
        weights[prefix + "feed_forward.w2.weight"] = matrix(dim, hidden, hidden**-0.5 * into_residual)
        weights[prefix + "feed_forward.w3.weight"] = matrix(hidden, dim, dim**-0.5)
        weights[prefix + "attention_norm.weight"] = torch.ones(dim)
        weights[prefix + "ffn_norm.weight"] = torch.ones(dim)
    weights["norm.weight"] = torch.ones(dim)
    weights["output.weight"] = matrix(shape.vocab_size, dim, 0.02)
    return weights


def rotations(shape: Shape, length: int) -> Tensor:
    """Return the complex rotary factors of each position and pair."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


class _RootMeanSquareNorm(torch.autograd.Function):
    """RMSNorm with less memory traffic than the composite one, which costs much in a model this small."""

    @staticmethod
    def forward(context, values: Tensor, gain: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vecdot(values, values).unsqueeze(-1) / values.shape[-1]
        scale = torch.rsqrt(mean_square + eps)
        normed = values * scale
        context.save_for_backward(normed, scale, gain)
        return normed * gain

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, gain = context.saved_tensors
        gain_gradient = (gradient * normed).flatten(0, -2).sum(0)
        gradient = gradient * gain
        along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1) / normed.shape[-1]
        return (gradient - normed * along) * scale, gain_gradient, None


def _rotate(heads: Tensor, factors: Tensor) -> Tensor:
    """Turn neighbouring pairs of each head, as Meta's checkpoints expect."""
    pairs = torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * factors).flatten(-2)


def forward(shape: Shape, weights: Weights, ids: Tensor, factors: Tensor, wanted: Tensor) -> Tensor:
    """Return the logits at the flat positions `wanted` of a batch of token ids."""
    rows, length = ids.shape
    head_dim, heads, kv_heads = shape.head_dim, shape.n_heads, shape.n_kv_heads
    factors = factors[:length, None]
    hidden = functional.embedding(ids, weights["tok_embeddings.weight"])
    for layer in range(shape.n_layers):
        attention, mlp = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        normed = _RootMeanSquareNorm.apply(hidden, weights[f"layers.{layer}.attention_norm.weight"], shape.norm_eps)
        projections = torch.cat([weights[f"{attention}w{name}.weight"] for name in "qkv"])
        projected = functional.linear(normed, projections).view(rows, length, heads + 2 * kv_heads, head_dim)
        rotated = _rotate(projected[:, :, : heads + kv_heads], factors)
        queries, keys = rotated[:, :, :heads], rotated[:, :, heads:]
        values = projected[:, :, heads + kv_heads :]
        keys, values = (part.repeat_interleave(heads // kv_heads, 2) for part in (keys, values))
        mixed = functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (queries, keys, values)), is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + functional.linear(mixed, weights[attention + "wo.weight"])
        normed = _RootMeanSquareNorm.apply(hidden, weights[f"layers.{layer}.ffn_norm.weight"], shape.norm_eps)
        projections = torch.cat([weights[mlp + "w1.weight"], weights[mlp + "w3.weight"]])
        gate, up = functional.linear(normed, projections).chunk(2, -1)
        hidden = hidden + functional.linear(functional.silu(gate) * up, weights[mlp + "w2.weight"])
    chosen = hidden.reshape(rows * length, -1)[wanted]
    normed = _RootMeanSquareNorm.apply(chosen, weights["norm.weight"], shape.norm_eps)
    return functional.linear(normed, weights["output.weight"])


@torch.inference_mode()
def greedy(
    shape: Shape, weights: Weights, prompts: list[list[int]], new_tokens: int, end: int
) -> list[list[int] | None]:
    """Continue each prompt until `end` by plain uncached decoding; None for one that did not end in time."""
    factors = rotations(shape, max(map(len, prompts)) + new_tokens)
    rows = [list(prompt) for prompt in prompts]
    answers: list[list[int] | None] = [None] * len(prompts)
    running = list(range(len(prompts)))
    for _ in range(new_tokens):
        length = max(len(rows[row]) for row in running)
        # Padding on the right cannot reach the tokens before it: attention is causal.
        ids = torch.tensor([rows[row] + [0] * (length - len(rows[row])) for row in running])
        last = torch.tensor([place * length + len(rows[row]) - 1 for place, row in enumerate(running)])
        chosen = forward(shape, weights, ids, factors, last).argmax(-1).tolist()
        for row, token in zip(running, chosen, strict=True):
            if token == end:
                answers[row] = rows[row][len(prompts[row]) :]
            rows[row].append(token)
        running = [row for row in running if answers[row] is None]
        if not running:
            break
    return answers


def save_checkpoint(folder: Path, shape: Shape, weights: Weights) -> None:
    """Write Meta's checkpoint files, each in one step so that a reader never sees half of one."""
    half = {name: tensor.detach().to(torch.float16) for name, tensor in weights.items()}
    partial = folder / "consolidated.00.pth.partial"
    torch.save(half, partial)
    partial.replace(folder / "consolidated.00.pth")
    partial = folder / "params.json.partial"
    partial.write_text(json.dumps(shape.parameters(), indent=1) + "\n")
    partial.replace(folder / "params.json")


def load_checkpoint(folder: Path, vocab_size: int) -> tuple[Shape, Weights]:
    """Read a checkpoint back, its weights as float32."""
    parameters = json.loads((folder / "params.json").read_text())
    shape = Shape(**{**parameters, "vocab_size": vocab_size})
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return shape, {name: tensor.float() for name, tensor in weights.items()}
