"""A layer of the model in ten kernels on a GPU: its matrices that share an input lie side by side."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.gpu import NotOnThisGpu
from engine.ragged_cache import RaggedCache
from engine.scheduler import Segment
from llama2 import ModelArgs, TransformerBlock


class FusedBlock(nn.Module):
    """What `TransformerBlock` does, over a `RaggedCache`."""

    def __init__(self, block: TransformerBlock) -> None:
        """Takes the block's weights, of this rank."""
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.layer = attention.layer
        self.wqkv, self.wo = _side_by_side(attention.wq, attention.wk, attention.wv), attention.wo
        self.gate_up, self.w2 = _side_by_side(feed_forward.w1, feed_forward.w3), feed_forward.w2
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self._pointwise = _pointwise()

    def forward(self, x_ND: Tensor, cosine: Tensor, sine: Tensor, cache: RaggedCache) -> Tensor:
        qkv_ND = self.wqkv(self.attention_norm(x_ND))
        q_NQH = self._pointwise.place_rotated(qkv_ND, cosine, sine, cache.places_N, *cache.of_layer(self.layer))
        heads_ND = cache.attend_over_kept(self.layer, q_NQH).flatten(1)
        x_ND, normal_ND = self._pointwise.add_norm(x_ND, self.wo(heads_ND), self.ffn_norm.weight, self.ffn_norm.eps)
        return x_ND + self.w2(self._pointwise.swiglu(self.gate_up(normal_ND)))


def _pointwise() -> ModuleType:
    from engine.gpu import pointwise  # where there is no Triton, this module must be importable all the same

    return pointwise


def _side_by_side(*layers: nn.Linear) -> nn.Linear:
    weights = [layer.weight.to_local() if isinstance(layer.weight, DTensor) else layer.weight for layer in layers]
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    fused = nn.Linear(columns, rows, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    return fused


def check_fusion(device: str, dtype: torch.dtype, args: ModelArgs) -> None:
    """Compute a small layer both ways, and raise `NotOnThisGpu` if that does not work here or comes out wrong."""
    random = torch.Generator().manual_seed(0)
    small = ModelArgs(
        dim=200, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=args.head_dim, ffn_hidden_dim=1100, vocab_size=1
    )
    block = TransformerBlock(small, 0).requires_grad_(False)
    for parameter in block.parameters():
        around, spread = (1.0, 0.1) if parameter.dim() == 1 else (0.0, parameter.shape[1] ** -0.5)
        parameter.copy_(around + spread * torch.randn(parameter.shape, generator=random))
    block = block.to(device, dtype)
    x_ND = torch.randn(5, small.dim, generator=random).to(device, dtype)
    angles = torch.randn(5, 1, small.head_dim // 2, generator=random).to(device)
    segments = (Segment(2, 0, (1,) * 3, 1), Segment(1, 0, (1,) * 2, 1))
    positions_N = torch.tensor((0, 1, 2, 0, 1), device=device)
    found = []
    try:
        for layer in (block, FusedBlock(block)):
            cache = RaggedCache(1, 3, small.n_kv_heads, 8, small.head_dim, dtype, device)
            cache.begin(segments, positions_N)
            found.append((layer(x_ND, angles.cos(), angles.sin(), cache), cache.keys_LBKTH, cache.values_LBKTH))
    except ImportError as error:
        raise NotOnThisGpu(f"Triton is not installed: {error}") from error
    except Exception as error:  # Triton's compiler, the C compiler that it calls, the driver: each has its own kinds
        raise NotOnThisGpu(f"Triton's kernels do not run: {type(error).__name__}: {error}") from error
    for expected, ours in zip(*found, strict=True):
        if not (ours.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max():
            raise NotOnThisGpu("a layer came out wrong in a test")
