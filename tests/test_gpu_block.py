"""A layer in few kernels for GPUs: against the ordinary one, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, filling, limits

from engine import loader
from engine.config import EngineConfig
from engine.engine import Engine
from engine.gpu import NotOnThisGpu, block
from engine.gpu.block import FusedBlock, check_fusion
from engine.gpu.linear import QuantizedLinear, times
from engine.loader import Limits
from engine.parallel import Launch, Ranks
from engine.ragged_cache import RaggedCache
from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from llama2 import ModelArgs, RowwiseLinear, rotate
from quant import SCHEMES

pytest.importorskip("triton", reason="Triton, which PyTorch for CUDA brings along, is not installed")
from engine.gpu import ahead, attention, choice, pointwise  # noqa: E402

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# PyTorch's attention takes no float32 on a GPU; Triton's interpreter is exact in it.
DTYPE, TOLERANCE = (torch.bfloat16, 0.05) if torch.cuda.is_available() else (torch.float32, 1e-5)
SLOTS, LENGTH = 4, 64
MODELS = {
    "groups of two": TINY,
    "a head of its own each": dataclasses.replace(TINY, n_kv_heads=4),
    "odd sizes": ModelArgs(
        dim=50, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=24, vocab_size=64, ffn_hidden_dim=130, norm_eps=1e-3
    ),
}


def runner(args: ModelArgs, **choices: object) -> Runner:
    chosen = limits(slots=SLOTS, max_seq_len=LENGTH, max_tokens_per_step=LENGTH, **choices)
    chosen = dataclasses.replace(chosen, dtype=DTYPE)
    ranks = Ranks(Launch(), DEVICE, args)
    model = loader.fill_in(loader.lay_out(args, chosen, ranks), chosen, ranks, filling(args, DEVICE))
    assert all(isinstance(layer, FusedBlock) == chosen.fused for layer in model.layers)
    capture = (lambda forward: forward) if chosen.cuda_graphs else None
    return Runner(model, chosen, DEVICE, 1, capture)


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["as it comes", "in static shapes"])
@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_random_plans_give_the_logits_and_the_cache_of_the_ordinary_way(args: ModelArgs, cuda_graphs: bool) -> None:
    rng = random.Random(4)
    ordinary, fused = runner(args), runner(args, ragged=True, fused=True, cuda_graphs=cuda_graphs)
    held = dict.fromkeys(range(SLOTS), 0)
    for step in range(12):
        singles, chunks = [], []
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
            start, count = held[slot], 1 if held[slot] and (step % 2 or rng.random() < 0.5) else rng.randint(2, 5)
            tokens = tuple(rng.randrange(args.vocab_size) for _ in range(count))
            (singles if count == 1 else chunks).append(Segment(slot, start, tokens, 1))
            held[slot] += count
        plan = StepPlan((*sorted(singles, key=lambda segment: segment.slot), *chunks))
        expected, found = ordinary.run(plan), fused.run(plan)
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
        for name in ("keys_LBKTH", "values_LBKTH"):
            kept = getattr(fused.cache, name)[..., :LENGTH, :]  # the position behind is for padded rows
            assert (kept - getattr(ordinary.cache, name)).abs().max() < TOLERANCE * 10


def test_after_a_rehearsal_no_step_of_single_tokens_is_left_to_capture() -> None:
    fused = runner(TINY, ragged=True, fused=True, cuda_graphs=True)
    chosen = limits(slots=SLOTS, max_seq_len=LENGTH, max_tokens_per_step=LENGTH, cuda_graphs=True)
    engine = Engine(fused, chosen, Ranks(Launch(), DEVICE, TINY), TINY.vocab_size)
    engine.rehearse()
    captured = set(fused._graphs._replays)
    assert {rows for rows, _, _ in captured} == {1, 2, 4}
    for slots in ((0,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)):
        assert fused.run(StepPlan(tuple(Segment(slot, 40, (1,), 1) for slot in slots))) is not None
    assert set(fused._graphs._replays) == captured


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_side_by_side_have_the_numbers_that_each_has_alone(name: str) -> None:
    args = ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=90, ffn_hidden_dim=512)
    plan = StepPlan((Segment(0, 0, (1, 2, 3), 3),))
    both = [runner(args, ragged=True, fused=fused, quantization=name, packed=True) for fused in (False, True)]
    assert [sum(isinstance(each, QuantizedLinear) for each in one.model.modules()) for one in both] == [8, 5]
    expected, found = (one.run(plan) for one in both)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("width", [8, 80, 128])
@pytest.mark.parametrize("heads_per_key", [1, 8])
def test_the_check_at_the_start_computes_a_layer_of_the_models_heads(width: int, heads_per_key: int) -> None:
    check_fusion(
        DEVICE, torch.float16, dataclasses.replace(TINY, head_dim=width, n_heads=8, n_kv_heads=8 // heads_per_key)
    )


def wrong_turn(qkv, cosine, sine, *rest):
    return pointwise.place_rotated(qkv, cosine, -sine, *rest)


def forgotten_value(qkv, cosine, sine, places, keys, values):
    return pointwise.place_rotated(qkv, cosine, sine, places, keys, values.clone())


def wrong_turn_of_singles(qkv, cosine, sine, *rest):
    return attention.attend_turned(qkv, cosine, -sine, *rest)


def a_position_too_few(qkv, cosine, sine, cache, layer):
    cache.positions_N = cache.positions_N - 1
    return attention.attend_turned(qkv, cosine, sine, cache, layer)


def only_themselves(qkv, cosine, sine, cache, layer):
    cache.beyond = 0
    return attention.attend_turned(qkv, cosine, sine, cache, layer)


def no_gain(x, weight, epsilon):
    return pointwise.normalise(x, torch.ones_like(weight), epsilon)


def halves_exchanged(gate_up):
    return pointwise.swiglu(gate_up.roll(gate_up.shape[1] // 2, 1))


@pytest.mark.parametrize("shares", [1, 4, 32])
@pytest.mark.parametrize("heads_per_key", [1, 3])
def test_a_long_sequence_is_attended_to_in_whatever_shares(
    heads_per_key: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that differ by far, so that what was found before counts for less again and again."""
    monkeypatch.setattr(attention, "_shares", lambda *_: shares)
    random, width, kv_heads = torch.Generator().manual_seed(1), 24, 2
    cache = RaggedCache(1, 3, kv_heads, 400, width, DTYPE, DEVICE)
    for kept in (cache.keys_LBKTH, cache.values_LBKTH):
        kept.copy_(3.0 * torch.randn(kept.shape, generator=random))
    segments = (Segment(0, 299, (1,), 1), Segment(1, 0, (1,), 1), Segment(2, 57, (1,), 1))
    positions = torch.tensor([segment.start for segment in segments], device=DEVICE)
    heads = kv_heads * heads_per_key
    qkv = torch.randn(3, (heads + 2 * kv_heads) * width, generator=random).to(DEVICE, DTYPE)
    angles = torch.randn(3, 1, width // 2, generator=random).to(DEVICE)
    cosine, sine = angles.cos(), angles.sin()
    cache.begin(segments, positions)
    found = attention.attend_turned(qkv, cosine, sine, cache, 0).unflatten(1, (heads, width))
    q, k, _ = (
        each.unflatten(1, (-1, width)) for each in qkv.split([heads * width, kv_heads * width, kv_heads * width], 1)
    )
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    for row, segment in enumerate(segments):
        keys, values = (
            kept[0, segment.slot, :, : segment.start + 1].float() for kept in (cache.keys_LBKTH, cache.values_LBKTH)
        )
        assert (keys[:, -1] - k[row]).abs().max() < TOLERANCE
        keys, values = (each.repeat_interleave(heads_per_key, 0) for each in (keys, values))
        weights = (keys @ q[row].float()[:, :, None] * width**-0.5).softmax(1)
        assert (found[row] - (weights * values).sum(1)).abs().max() < TOLERANCE * 10


WRONG = "came out wrong in a test"


@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("place_rotated", wrong_turn, WRONG),
        ("place_rotated", forgotten_value, WRONG),
        ("attend_turned", wrong_turn_of_singles, WRONG),
        ("attend_turned", a_position_too_few, WRONG),
        ("attend_turned", only_themselves, WRONG),
        ("normalise", no_gain, WRONG),
        ("swiglu", halves_exchanged, WRONG),
    ],
)
def test_the_check_at_the_start_finds_what_does_not_work(
    name: str, fault: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = block._kernels()
    setattr(kernels, name, fault)
    monkeypatch.setattr(block, "_kernels", lambda: kernels)
    for kv_heads in (TINY.n_kv_heads, TINY.n_heads) if name == "attend_turned" else (TINY.n_kv_heads,):
        with pytest.raises(NotOnThisGpu, match=reason):
            check_fusion(DEVICE, torch.float16, dataclasses.replace(TINY, n_kv_heads=kv_heads))


def test_a_product_of_ranks_is_summed_before_anything_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then is it added once."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda y, group: y.mul_(2))
    random = torch.Generator().manual_seed(1)
    layer = RowwiseLinear(32, 8, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(8, 32, generator=random))
    layer = layer.to(DEVICE, DTYPE)
    quantized = QuantizedLinear(SCHEMES["fp8"].quantize(layer.weight.float()), "the ranks").to(DEVICE)
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, 32, generator=random).to(DEVICE, DTYPE)
        more = torch.randn(tokens, 8, generator=random).to(DEVICE, DTYPE)
        product = x.float() @ layer.weight.float().t()
        for group, times_as_much in ((None, 1), ("the ranks", 2)):
            layer.group = group
            assert (times(layer, x, more) - (times_as_much * product + more)).abs().max() < TOLERANCE * 10
            assert (times(layer, x) - times_as_much * product).abs().max() < TOLERANCE * 10
        assert (times(quantized, x, more) - (2 * product + more)).abs().max() < 0.1 * product.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of an infinite number less itself, interpreted
def test_the_likeliest_tokens_are_found_in_one_pass_with_what_is_no_number() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 20000, generator=random)
    logits[0, 19999] = logits[1, 0] = logits[2, 8191] = logits[3, 8192] = 9.0
    logits[4, 17000] = logits[4, 300] = 9.0  # the first of two
    logits[5] = -1e30
    logits[6, 5], logits[7, 19000], logits[8, 3] = torch.nan, torch.inf, -torch.inf
    tokens, told = choice.likeliest(logits.to(DEVICE), -1)
    finite = logits.sum(-1).isfinite()
    assert finite.tolist() == [True] * 6 + [False] * 3
    assert tokens[:6].tolist() == told[:6].tolist() == [19999, 0, 8191, 8192, 300, 0]
    assert told[6:].tolist() == [-1] * 3 and (0 <= tokens).all() and (tokens < 20000).all()


def test_a_gpu_without_it_is_told_so_and_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine")  # which a command line before may have changed
    asked = []

    def check(*arguments: object) -> None:
        asked.append(arguments)
        if len(asked) == 2:
            raise NotOnThisGpu("Triton is not installed")

    def no_ragged_attention(*_: object) -> None:
        raise NotOnThisGpu("it takes no float32")

    monkeypatch.setattr(loader, "check_fusion", check)
    monkeypatch.setattr(loader, "check_ragged_attention", lambda *_: None)
    config = EngineConfig(dtype="bfloat16")
    settled = [Limits.settle(config, TINY, "cuda:0").fused for _ in range(2)]
    settled.append(Limits.settle(dataclasses.replace(config, kernels="torch"), TINY, "cuda:0").fused)
    assert [record.getMessage() for record in caplog.records] == [
        "a step takes more launches than it needs, because Triton is not installed"
    ]
    monkeypatch.setattr(loader, "check_ragged_attention", no_ragged_attention)
    settled.append(Limits.settle(config, TINY, "cuda:0").fused)
    assert settled == [True, False, False, False]
    assert asked == [("cuda:0", torch.bfloat16, TINY)] * 2


class OnAGpu(list):
    """Tokens, for who asks where they are and how many."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "tokens", "how"),
    [
        ((9, 0), 1, {"AHEAD": "all", "launch_pdl": True}),
        ((10, 0), 2, {"AHEAD": "one", "launch_pdl": True}),
        ((8, 9), 1, {"AHEAD": "none"}),
    ],
)
def test_only_kernels_of_a_single_token_have_more_than_one_ahead(
    capability: tuple[int, int], tokens: int, how: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    ahead._can_overlap.cache_clear()
    try:
        assert ahead.overlapping(OnAGpu(tokens * [0])) == how
    finally:
        ahead._can_overlap.cache_clear()


# Bytes of shared memory that a program may have, by compute capability. For 8.0 and 8.6 the code is that of 8.9 but for
# fp8, and these have as much or more.
SHARED_MEMORY = {89: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_kernels_compile_for_gpus_that_are_not_here_and_fit_into_them(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_for_gpu", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    assert len(made["products"]) == 2 * len(SCHEMES) and len(made["others"]) == 15
    alone, begin, wait = ("unpack_bytes", "unpack_halves", "rotate_and_place", "largest"), "launch_dependents", "wait"
    for each in made["products"]:
        assert each["tensor cores"] and each["loads ahead"], each
        assert each["order"] == ([wait, begin] if capability >= 90 else []), each
    for each in made["products"] + made["others"]:
        assert each["shared"] <= SHARED_MEMORY[capability], each
    # Those of single tokens overlap, as many as there is room for, where a GPU can do that.
    for each in made["others"]:
        overlaps = capability >= 90 and not each["what"].startswith(alone)
        assert each["order"] == ([begin, wait] if overlaps else []), each
