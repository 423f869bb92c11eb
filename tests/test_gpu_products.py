"""Quantized products for GPUs: computed by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY, filling, limits

from engine import loader
from engine.config import EngineConfig
from engine.gpu import NotOnThisGpu, linear
from engine.gpu.linear import QuantizedLinear, check_products, times
from engine.loader import Limits, memory_need
from engine.parallel import Launch, Ranks
from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from llama2 import ModelArgs
from quant import SCHEMES

pytest.importorskip("triton", reason="Triton, which PyTorch for CUDA brings along, is not installed")
from engine.gpu import product  # noqa: E402

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# Without a GPU everything but bfloat16, whose products Triton's interpreter gets wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if torch.cuda.is_available() else ())
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def in_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """What a single token's activations become beside whole numbers: 8 bits, with a scale for every 32."""
    grouped = x.float().unflatten(1, (-1, 32))
    scales = grouped.abs().amax(2, keepdim=True) / 127.0
    return (torch.where(scales > 0, grouped / scales, 0.0).round() * scales).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_those_of_the_numbers_that_the_weights_stand_for(name: str, dtype: torch.dtype) -> None:
    """Sizes that fill no share of the work, and groups whose number is odd."""
    random = torch.Generator().manual_seed(1)
    scheme = SCHEMES[name]
    for rows, columns in ((5, 128), (40, 384), (130, 256)):
        quantized = scheme.quantize(torch.randn(rows, columns, generator=random))
        layer, weight_t = QuantizedLinear(quantized).to(DEVICE), quantized.dequantize().t()
        for tokens in (1, 3, 16, 17, 65, 130):
            x = torch.randn(tokens, columns, generator=random).to(dtype)
            counted = in_eight_bits(x) if tokens == 1 and name != "fp8" else x.float()
            expected, found = counted @ weight_t, layer(x.to(DEVICE)).cpu()
            assert found.dtype == dtype and found.shape == (tokens, rows)
            assert (found.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.fixture
def anew() -> Iterator[None]:
    """How many programs have arrived is counted by as many processors as a test says."""
    product._arrived.cache_clear()
    yield
    product._arrived.cache_clear()


@pytest.mark.parametrize("processors", [1, 100], ids=["whole rows", "rows in two parts"])
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_cut_in_two_where_they_are_too_few_for_all_processors(
    name: str, processors: int, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that two programs cannot share alike, and one of a single block."""
    monkeypatch.setattr(product, "processors", lambda _: processors)
    random = torch.Generator().manual_seed(1)
    for columns in (128, 384, 640):
        quantized = SCHEMES[name].quantize(torch.randn(100, columns, generator=random))
        layer, weight_t = QuantizedLinear(quantized).to(DEVICE), quantized.dequantize().t()
        for tokens in (3, 40):
            x, more = (torch.randn(tokens, size, generator=random) for size in (columns, 100))
            expected = x @ weight_t + more
            for _ in range(2):  # what was counted begins anew
                found = times(layer, x.to(DEVICE), more.to(DEVICE)).cpu()
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    arrived = product._arrived(layer.numbers.device)
    assert len(arrived) == 2 * processors and not arrived.any()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_token_of_zeros_or_of_few_large_numbers_is_no_exception(name: str) -> None:
    quantized = SCHEMES[name].quantize(torch.randn(40, 256, generator=torch.Generator().manual_seed(1)))
    layer, weight_t = QuantizedLinear(quantized).to(DEVICE), quantized.dequantize().t()
    x = torch.zeros(1, 256)
    assert not layer(x.to(DEVICE)).any()
    x[0, 3], x[0, 4], x[0, 250] = 1e4, -1e-4, 3.0
    expected = x @ weight_t
    assert (layer(x.to(DEVICE)).cpu() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as it is computed by the interpreter
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_no_number_makes_no_number(name: str, number: float) -> None:
    """An overflow has to be seen in the logits."""
    random = torch.Generator().manual_seed(1)
    layer = QuantizedLinear(SCHEMES[name].quantize(torch.randn(40, 256, generator=random))).to(DEVICE)
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, 256, generator=random)
        x[0, 77] = number
        found = layer(x.to(DEVICE)).cpu()
        assert not found[0].isfinite().any() and found[1:].isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_added_to_a_product_is_added_once(name: str) -> None:
    random = torch.Generator().manual_seed(1)
    layer = QuantizedLinear(SCHEMES[name].quantize(torch.randn(40, 256, generator=random))).to(DEVICE)
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 256, generator=random).to(DEVICE)
        more = torch.randn(tokens, 40, generator=random).to(DEVICE)
        assert (times(layer, x, more) - (layer(x) + more)).abs().max() < 1e-4


def test_a_token_gets_the_same_bits_in_whatever_company_of_its_size() -> None:
    random = torch.Generator().manual_seed(1)
    layer = QuantizedLinear(SCHEMES["int4"].quantize(torch.randn(40, 384, generator=random))).to(DEVICE)
    x = torch.randn(16, 384, generator=random).to(DEVICE)
    assert torch.equal(layer(x)[:3], layer(x[:3]))
    strided = torch.randn(3, 500, generator=random).to(DEVICE)[:, :384]
    assert torch.equal(layer(strided), layer(strided.clone()))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_gives_the_logits_of_the_rounded_one(name: str, tied: bool) -> None:
    args = ModelArgs(
        dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=90, ffn_hidden_dim=512, tie_embeddings=tied
    )
    found, held = [], []
    plan = StepPlan((Segment(0, 0, tuple(range(20)), 20), Segment(1, 0, (5, 6), 1)))
    for packed in (False, True):
        chosen = dataclasses.replace(limits(quantization=name), packed=packed)
        ranks = Ranks(Launch(), DEVICE, args)
        model = loader.fill_in(loader.lay_out(args, chosen, ranks), chosen, ranks, filling(args, DEVICE))
        tensors = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}.values()
        held.append(sum(each.numel() * each.element_size() for each in tensors))
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == packed * (14 + (not tied))
        found.append(Runner(model, chosen, DEVICE, 1).run(plan))
        assert memory_need(args, chosen, 1).weights == pytest.approx(held[-1], rel=0.03)
    assert (found[1] - found[0]).abs().max() < 1e-4 * found[0].abs().max()
    assert held[1] < 0.6 * held[0]


def test_a_width_that_a_scheme_cannot_have_stays_as_it_is() -> None:
    """TINY's rows have 32 and 96 numbers: one group of 32 and three, and none of 128."""
    ranks = Ranks(Launch(), DEVICE, TINY)
    for name, layers in (("int4", 15), ("int4-128", 1)):  # the output has 8 bits and any width
        chosen = limits(quantization=name, packed=True)
        model = loader.fill_in(loader.lay_out(TINY, chosen, ranks), chosen, ranks, filling(TINY, DEVICE))
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == layers


def test_ranks_sum_what_each_makes_of_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other; a group of weights is never cut, so both have the numbers of one."""
    summed: list[tuple[torch.Tensor, str]] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda y, group: summed.append((y, group)))
    random = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 256, generator=random), torch.randn(3, 256, generator=random)
    scheme = SCHEMES["int4"]
    whole = QuantizedLinear(scheme.quantize(weight)).to(DEVICE)(x.to(DEVICE))
    assert not summed
    for half, own in zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True):
        QuantizedLinear(scheme.quantize(own), "the ranks").to(DEVICE)(half.to(DEVICE))
    assert [group for _, group in summed] == ["the ranks"] * 2
    assert (summed[0][0] + summed[1][0] - whole).abs().max() < 1e-4


def test_under_tensor_parallelism_the_layers_that_are_summed_have_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "localize", lambda *_: None)
    chosen = limits(quantization="int4", packed=True)
    model = loader.lay_out(TINY, chosen, Ranks(Launch(), DEVICE, TINY))
    ranks = SimpleNamespace(tp=SimpleNamespace(get_group=lambda: "the ranks"), device=DEVICE)
    model = loader.fill_in(model, chosen, ranks, filling(TINY, DEVICE))
    groups = {
        name: module.group for name, module in model.layers[1].named_modules() if isinstance(module, QuantizedLinear)
    }
    summed = {"attention.wo", "feed_forward.w2"}
    assert summed < groups.keys() and len(groups) == 7
    assert all(group == ("the ranks" if name in summed else None) for name, group in groups.items())


# --- what a machine can do ---


@pytest.mark.parametrize(
    ("capability", "scheme", "refused"),
    [
        ((7, 5), "int8", "int8 needs a GPU of compute capability 8.0; this one has 7.5"),
        ((8, 6), "fp8", "fp8 needs a GPU of compute capability 8.9; this one has 8.6"),
    ],
)
def test_a_gpu_that_is_too_old_is_named(
    capability: tuple[int, int], scheme: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(NotOnThisGpu, match=refused):
        check_products("cuda:0", SCHEMES[scheme], torch.float16)


@pytest.mark.parametrize("fault", ["wrong", "not a number", "raises"])
def test_the_check_at_the_start_finds_what_does_not_work(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_products(DEVICE, SCHEMES["int4"], torch.float16)

    def faulty(x: torch.Tensor, *rest: object) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no C compiler")
        y = product.product(x, *rest)
        return y * 1.1 if fault == "wrong" else y * torch.nan

    monkeypatch.setattr(linear, "_kernels", lambda: SimpleNamespace(product=faulty))
    kind, reason = (RuntimeError, "no C compiler") if fault == "raises" else (NotOnThisGpu, "came out wrong in a test")
    with pytest.raises(kind, match=reason):
        check_products(DEVICE, SCHEMES["int4"], torch.float16)


def test_without_the_kernels_weights_are_rounded_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine")  # which a command line before may have changed
    monkeypatch.setattr(loader, "choose_ragged", lambda *_: False)
    asked = []

    def check(*arguments: object) -> None:
        asked.append(arguments)
        if len(asked) == 3:
            raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(loader, "check_products", check)
    settled = [
        Limits.settle(EngineConfig(dtype="bfloat16", quantization=name, kernels=kernels), TINY, device).packed
        for name, kernels, device in (
            ("int4", "auto", "cuda:0"),
            ("int4", "auto", "cuda:0"),
            ("none", "auto", "cuda:0"),
            ("int4", "torch", "cuda:0"),
            ("int4", "torch", "cpu"),
        )
    ]
    assert settled == [True, False, False, False, False]
    # Both that a model of int4 has, and then the one that fails.
    assert {each[1] for each in asked[:2]} == {SCHEMES["int4"], SCHEMES["int8"]} and len(asked) == 3
    assert {(device, dtype) for device, _, dtype in asked} == {("cuda:0", torch.bfloat16)}
    assert [record.getMessage() for record in caplog.records] == [
        "quantization saves no memory and no time here, because ModuleNotFoundError: No module named 'triton'"
    ]
