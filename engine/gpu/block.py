"""A layer of the model in few kernels on a GPU: its matrices that share an input lie side by side."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.gpu import NotOnThisGpu
from engine.gpu.linear import times
from engine.ragged_cache import RaggedCache
from engine.scheduler import Segment
from llama2 import ModelArgs, RMSNorm, TransformerBlock


class FusedBlock(nn.Module):
    """What `TransformerBlock` does, over a `RaggedCache`."""

    def __init__(self, block: TransformerBlock) -> None:
        """Takes the block's weights, of this rank."""
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.layer = attention.layer
        self.wqkv, self.wo = _side_by_side(attention.wq, attention.wk, attention.wv), attention.wo
        self.gate_up, self.w2 = _side_by_side(feed_forward.w1, feed_forward.w3), feed_forward.w2
        self.attention_norm, self.ffn_norm = FusedNorm(block.attention_norm), FusedNorm(block.ffn_norm)
        self._kernels = _kernels()

    def forward(self, x_ND: Tensor, cosine: Tensor, sine: Tensor, cache: RaggedCache) -> Tensor:
        qkv_ND = times(self.wqkv, self.attention_norm(x_ND))
        if cache.singles:
            heads_ND = self._kernels.attend_turned(qkv_ND, cosine, sine, cache, self.layer)
        else:
            q_NQH = self._kernels.place_rotated(qkv_ND, cosine, sine, cache.places_N, *cache.of_layer(self.layer))
            heads_ND = cache.attend_over_kept(self.layer, q_NQH).flatten(1)
        x_ND = times(self.wo, heads_ND, x_ND)
        return times(self.w2, self._kernels.swiglu(times(self.gate_up, self.ffn_norm(x_ND))), x_ND)


class FusedNorm(nn.Module):
    """What `RMSNorm` does, in a kernel that overlaps with its neighbours."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self._epsilon = norm.weight, norm.eps
        self._kernels = _kernels()

    def forward(self, x_ND: Tensor) -> Tensor:
        return self._kernels.normalise(x_ND, self.weight, self._epsilon)


def _kernels() -> SimpleNamespace:
    from engine.gpu import attention, pointwise  # where there is no Triton, this module must be importable all the same

    chosen = (pointwise.normalise, pointwise.place_rotated, pointwise.swiglu, attention.attend_turned)
    return SimpleNamespace(**{each.__name__: each for each in chosen})


def _side_by_side(*layers: nn.Linear) -> nn.Linear:
    weights = [layer.weight.to_local() if isinstance(layer.weight, DTensor) else layer.weight for layer in layers]
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    fused = nn.Linear(columns, rows, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    return fused


def check_fusion(device: str, dtype: torch.dtype, args: ModelArgs) -> None:
    """Compute a small layer both ways, and raise `NotOnThisGpu` if it comes out wrong."""
    random = torch.Generator().manual_seed(0)
    heads = 2 * (args.n_heads // args.n_kv_heads)  # as many to a key as the model has, for which kernels differ
    small = ModelArgs(
        dim=200, n_layers=1, n_heads=heads, n_kv_heads=2, head_dim=args.head_dim, ffn_hidden_dim=1100, vocab_size=1
    )
    block = TransformerBlock(small, 0).requires_grad_(False)
    for parameter in block.parameters():
        around, spread = (1.0, 0.1) if parameter.dim() == 1 else (0.0, parameter.shape[1] ** -0.5)
        parameter.copy_(around + spread * torch.randn(parameter.shape, generator=random))
    block = block.to(device, dtype)
    steps = (  # chunks, and single tokens: few, many, one
        (Segment(2, 0, (1,) * 40, 1), Segment(1, 0, (1,) * 2, 1)),
        (Segment(1, 2, (1,), 1), Segment(2, 40, (1,), 1)),
        (Segment(2, 41, (1,), 1),),
    )
    found = [_computed(layer, steps, small, device, dtype) for layer in (block, FusedBlock(block))]
    for expected, ours in zip(*found, strict=True):
        if not (ours.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max():
            raise NotOnThisGpu("a layer came out wrong in a test")


def _computed(
    layer: nn.Module, steps: Ordered[Ordered[Segment]], args: ModelArgs, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """What a layer makes of some steps, and of the cache."""
    random = torch.Generator().manual_seed(1)
    cache = RaggedCache(1, 3, args.n_kv_heads, 50, args.head_dim, dtype, device)
    found = []
    for segments in steps:
        positions = [segment.start + place for segment in segments for place in range(len(segment.tokens))]
        x_ND = torch.randn(len(positions), args.dim, generator=random).to(device, dtype)
        angles = torch.randn(len(positions), 1, args.head_dim // 2, generator=random).to(device)
        cache.begin(segments, torch.tensor(positions, device=device))
        found.append(layer(x_ND, angles.cos(), angles.sin(), cache))
    return [*found, cache.keys_LBKTH, cache.values_LBKTH]
