"""Linear layers that keep their weights quantized on a GPU."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.gpu import NotOnThisGpu
from quant import Quantized, Scheme
from quant.int4 import Int4

# What a GPU needs at least: Ampere's tensor cores, and for fp8 instructions that read it.
_CAPABILITY, _CAPABILITY_FP8 = (8, 0), (8, 9)


class QuantizedLinear(nn.Module):
    """A weight as numbers and scales, in the layout of `engine.gpu.product`."""

    def __init__(self, quantized: Quantized, group: dist.ProcessGroup | None = None) -> None:
        """With a process group, inputs are spread over its ranks and the partial products are summed."""
        super().__init__()
        scheme = quantized.scheme
        self.group, self.columns_per_scale = group, scheme.group if isinstance(scheme, Int4) else None
        numbers, scales = quantized.numbers, quantized.scales
        if isinstance(scheme, Int4):
            numbers, scales = _pair(numbers, scales, scheme.group)
        self.register_buffer("numbers", numbers.contiguous(), persistent=False)
        self.register_buffer("scales", scales.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return times(self, x)


def times(layer: nn.Linear | QuantizedLinear, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A layer's product on a GPU, and what is added to it."""
    group = getattr(layer, "group", None)
    added = residual if group is None else None
    if isinstance(layer, QuantizedLinear):
        y = _kernels().product(x, layer.numbers, layer.scales, layer.columns_per_scale, added)
    elif len(x) == 1:
        y = _kernels().times_floats(x, layer.weight, added)
    else:
        y = F.linear(x, layer.weight) if added is None else torch.addmm(added, x, layer.weight.t())
    if group is None:
        return y
    dist.all_reduce(y, group=group)
    return y if residual is None else y + residual


@cache
def _kernels() -> SimpleNamespace:
    """Imported when they are wanted: where there is no Triton, this module must be importable all the same."""
    from engine.gpu import product, single

    return SimpleNamespace(product=product.product, times_floats=single.times_floats)


def _pair(numbers: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Each byte gets a number of a row's first half and one of its second; an odd last group gets one with scale 0."""
    if scales.shape[1] % 2:
        numbers, scales = F.pad(numbers, (0, group)), F.pad(scales, (0, 1))
    first, second = numbers.chunk(2, 1)
    return first | second << 4, scales


def check_products(device: str, scheme: Scheme, dtype: torch.dtype) -> None:
    """Multiply something small, and raise `NotOnThisGpu` if it comes out wrong."""
    if device.startswith("cuda"):
        needed = _CAPABILITY_FP8 if scheme.name == "fp8" else _CAPABILITY
        found = torch.cuda.get_device_capability(device)
        if found < needed:
            numbers = (".".join(map(str, each)) for each in (needed, found))
            raise NotOnThisGpu("{} needs a GPU of compute capability {}; this one has {}".format(scheme.name, *numbers))
    random = torch.Generator().manual_seed(0)
    quantized = scheme.quantize(torch.randn(48, 384, generator=random).to(device))
    layer, weight_t = QuantizedLinear(quantized), quantized.dequantize().t()
    for tokens in (1, 3, 20, 70):  # one for each way
        x = torch.randn(tokens, 384, generator=random).to(device, dtype)
        expected = x.float() @ weight_t
        if not (layer(x).float() - expected).abs().max() <= 0.02 * expected.abs().max():
            raise NotOnThisGpu("its products came out wrong in a test")
