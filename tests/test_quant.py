"""Quantized weights: as near as their bits allow, and the numbers that llama.cpp's own package would choose."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quant import SCHEMES

WEIGHT = torch.randn(24, 384, generator=torch.Generator().manual_seed(3))
# Half a step of a scale that follows the row's or the group's largest weight; int4's goes from -8 to 7 of them, and
# fp8's steps below the largest number, 448, are 32 wide.
STEP = {"int8": 0.5 / 127, "int4": 1 / 8, "int4-128": 1 / 8, "fp8": 16 / 448}


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_moves_further_than_its_scale_allows(name: str) -> None:
    back = SCHEMES[name].quantize(WEIGHT).dequantize()
    columns = {"int4": 32, "int4-128": 128}.get(name, 384)
    largest = WEIGHT.unflatten(1, (-1, columns)).abs().amax(2, keepdim=True)
    error = (back - WEIGHT).unflatten(1, (-1, columns)).abs()
    assert (error <= largest * STEP[name] * 1.01).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_and_what_is_quantized_already_stays_as_it_is(name: str) -> None:
    weight = WEIGHT.clone()
    weight[5] = 0.0
    once = SCHEMES[name].quantize(weight).dequantize()
    assert (once[5] == 0).all()
    twice = SCHEMES[name].quantize(once).dequantize()
    assert torch.allclose(once, twice, rtol=2e-3, atol=0)


SIZES = [(name, size) for name in SCHEMES for size in (1e-40, 1e-36, 1e-30)]
SIZES += [("int8", 1e30), ("fp8", 1e30)]  # int4's scales are 16 bits wide, as GGUF's


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_rows_of_any_size_stay_numbers(name: str, size: float) -> None:
    weight = WEIGHT.clone()
    weight[5] = 0.0
    weight[5, 7] = size
    back = SCHEMES[name].quantize(weight).dequantize()
    assert back.isfinite().all() and abs(back[5, 7] - size) <= size
    assert (back[5, :7] == 0).all()


def test_int4_chooses_the_numbers_and_scales_of_q4_0() -> None:
    ours = SCHEMES["int4"].quantize(WEIGHT)
    blocks = gguf.quants.quantize(WEIGHT.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(24, 12, 18)
    scales = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0])
    numbers = torch.from_numpy(np.concatenate((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1))
    assert torch.equal(ours.scales, scales)
    assert torch.equal(ours.numbers, numbers.flatten(1))


def test_a_scheme_says_which_widths_it_cannot_have() -> None:
    assert SCHEMES["int8"].fits(6) and not SCHEMES["int8"].fits(7)
    assert SCHEMES["int4"].fits(96) and not SCHEMES["int4"].fits(100)
    assert SCHEMES["int4-128"].fits(256) and not SCHEMES["int4-128"].fits(192)
