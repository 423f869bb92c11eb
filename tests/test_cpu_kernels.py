"""The CPU's own kernels: PyTorch's numbers, for every dtype and scheme, and the same bits in whatever company."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from service import wait_until
from tiny_models import TINY, model_of, random_weights

from engine.config import ConfigError, EngineConfig
from engine.cpu import library, packing
from engine.cpu.packing import PANEL, Packed, pack
from engine.cpu.runner import CpuRunner
from engine.loader import Limits, choose_native
from engine.runner import Runner
from engine.sampler import choose_tokens
from engine.scheduler import Copy, Segment, StepPlan
from engine.sequence import SamplingParams, Sequence
from llama2 import ModelArgs
from quant import SCHEMES

LENGTH = 160
MODELS = {
    "GQA": TINY,
    "MHA": replace(TINY, n_kv_heads=TINY.n_heads),
    "odd sizes": ModelArgs(
        dim=100, n_layers=3, n_heads=5, n_kv_heads=1, head_dim=20, vocab_size=77, ffn_hidden_dim=130, max_seq_len=LENGTH
    ),
    "tied, one KV head, wide heads": ModelArgs(
        dim=384, n_layers=2, n_heads=20, n_kv_heads=1, head_dim=96, vocab_size=300, multiple_of=32, tie_embeddings=True
    ),
}
# Every kind of CPU that the kernels are compiled for differently, and what it has above AVX2. This one plays it: what
# it lacks is emulated.
KINDS = {
    "AMX": (library.WIDE, library.PAIRS, library.TILES),
    "bfloat16": (library.WIDE, library.PAIRS),
    "AVX-512": (library.WIDE,),
    "AVX2": (),
}
EMULATED = Path(__file__).with_name("emulated.h")
# Instructions that are written as such, and what emulates them.
WRITTEN = {
    "EMULATED_WIDE": {
        'asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(signed_bytes));': (
            "return emulated::add_bytes(sums, bytes, signed_bytes);"
        ),
        'asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));': "return emulated::add_counted(sums, a, b);",
    },
    "EMULATED_PAIRS": {
        'asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));': "return emulated::add_pairs(sums, a, b);",
    },
}
ON_CPU = [name for name in SCHEMES if name != "fp8"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What float32 activations and a cache in the model's own dtype leave; activations beside int4 have 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def limits(dtype: torch.dtype = torch.float32, quantization: str = "none") -> Limits:
    return Limits(LENGTH, 4, 100, dtype, quantization, native=True)


def tokens_of(args: ModelArgs) -> list[list[int]]:
    return torch.randint(args.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()


def plans(args: ModelArgs) -> list[StepPlan]:
    """Prompts in chunks, alone and beside single tokens, one of a single token, slots in any order, then decoding."""
    tokens = tokens_of(args)

    def segment(slot: int, start: int, count: int, logits: int = 1) -> Segment:
        return Segment(slot, start, tuple(tokens[slot][start : start + count]), logits)

    return [
        StepPlan((segment(2, 0, 40), segment(0, 0, 37, 37))),
        StepPlan((segment(0, 37, 1), segment(2, 40, 33, 2))),
        StepPlan((segment(1, 0, 1), segment(0, 38, 99))),
        *(StepPlan((segment(0, 137 + i, 1), segment(1, 1 + i, 1), segment(2, 73 + i, 1))) for i in range(8)),
    ]


def weights_of(args: ModelArgs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: weight.to(dtype) for name, weight in random_weights(args, seed=5).items()}


def logits_of(runner: Runner | CpuRunner, args: ModelArgs) -> torch.Tensor:
    return torch.cat([runner.run(plan).clone() for plan in plans(args)])


def reference(args: ModelArgs, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same steps by PyTorch in float32."""
    model = model_of(args, {name: weight.float() for name, weight in weights.items()})
    return logits_of(Runner(model, Limits(LENGTH, 4, 100, torch.float32), "cpu", 1), args)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels with emulated instructions are kept: not where a server looks for its own."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(params=KINDS)
def cpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated_library: Path
) -> Iterator[str]:
    """A CPU of this kind, whose name it is."""
    there, levels = library._cpu_flags(), KINDS[request.param]
    monkeypatch.setattr(library, "_cpu_flags", lambda: {*library.NEEDED, *chain.from_iterable(levels)})
    names = {"EMULATED_WIDE": library.WIDE, "EMULATED_PAIRS": library.PAIRS, "EMULATED_TILES": library.TILES}
    lacking = [name for name, level in names.items() if level in levels and not there.issuperset(level)]
    if lacking:
        flags = ("-include", str(EMULATED), *(f"-D{name}" for name in lacking))
        if "EMULATED_WIDE" in lacking:  # and with it, for the compiler, all the others
            compiler = next(filter(None, map(shutil.which, library.COMPILERS)))
            if "clang" in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout:
                pytest.skip("clang hands over no registers of AVX-512 on a CPU without it, which GCC does")
            basic = library._instructions(set(library.NEEDED))
            monkeypatch.setattr(library, "_instructions", lambda there: basic)
            flags += ("-O1",)  # a minute less to compile each kind
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, *flags))
        monkeypatch.setattr(library, "_own_folder", lambda: emulated_library)
        for name in library.SOURCES:
            shutil.copy(Path(library.__file__).with_name(name), tmp_path)
        source = (tmp_path / "vector.h").read_text()
        for written, instead in chain.from_iterable(WRITTEN.get(name, {}).items() for name in lacking):
            assert source.count(written) == 1
            source = source.replace(written, instead)
        (tmp_path / "vector.h").write_text(source)
        compiled = library._compile
        monkeypatch.setattr(library, "_compile", lambda source, *others: compiled(tmp_path / source.name, *others))
    library.load.cache_clear()
    yield request.param
    library.load.cache_clear()


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_gives_pytorchs_logits(name: str, dtype: torch.dtype) -> None:
    args = MODELS[name]
    weights = weights_of(args, dtype)
    runner = CpuRunner(model_of(args, weights), limits(dtype))
    for cached in (runner.cache.keys_LBKTH, runner.cache.values_LBKTH):
        cached.fill_(torch.nan)  # as an earlier sequence may have left it, behind this one's end
    assert difference(logits_of(runner, args), reference(args, weights)) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("scheme", ON_CPU)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_give_the_logits_of_the_numbers_that_they_stand_for(name: str, scheme: str) -> None:
    args, chosen = MODELS[name], SCHEMES[scheme]
    weights = weights_of(args, torch.float32)
    runner = CpuRunner(model_of(args, weights), limits(quantization=scheme))
    rounded = {}
    for each, weight in weights.items():
        kept = weight.dim() == 1 or (each.startswith("tok_embeddings") and not args.tie_embeddings)
        wanted = SCHEMES["int8"] if each.startswith(("output", "tok_embeddings")) else chosen
        rounded[each] = weight if kept or not wanted.fits(weight.shape[1]) else wanted.quantize(weight).dequantize()
    # What activations of eight bits, or of less beside few columns, leave, with a scale for every 128 or 256.
    assert difference(logits_of(runner, args), reference(args, rounded)) <= 5e-2


def int8_scales(blocks: torch.Tensor, numbers: torch.Tensor, cpu: str) -> torch.Tensor:
    """Of blocks (tokens, blocks, columns) beside int8 weights: without dot products of bytes, sums must fit 16 bits."""
    largest = blocks.abs().amax(2, keepdim=True).clamp(min=1e-30)
    if cpu != "AVX2":
        return largest / 127
    pairs = blocks.unflatten(2, (-1, 2)).sum(3).abs().amax(2, keepdim=True)
    scales = torch.maximum(largest, pairs) / 127
    room = 32767 / chains(numbers.float()).norm(dim=-1).amax(0) - 2.01  # rounding sixteen by half a step adds two
    return scales * (chains(blocks / scales).norm(dim=-1) / room).amax(2, keepdim=True).clamp(min=1)


def chains(x: torch.Tensor) -> torch.Tensor:
    """The sixteens of columns (.., 128) whose products are added in 16 bits: (.., 8, 16)."""
    return x.unflatten(-1, (4, 8, 2, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def check_one_product(cpu: str, weights: dict[str, torch.Tensor], args: ModelArgs, tokens: list[int]) -> None:
    """To the last bit of an activation: what is left of a model whose layers add nothing is one product."""
    for name in weights:
        if name.endswith(("wo.weight", "w2.weight")):
            weights[name] = torch.zeros_like(weights[name])
    runner = CpuRunner(model_of(args, weights), limits(quantization="int8"))
    logits = runner.run(StepPlan((Segment(0, 0, tuple(tokens), len(tokens)),)))

    x = F.rms_norm(weights["tok_embeddings.weight"][tokens], (args.dim,), weights["norm.weight"], args.norm_eps)
    output = SCHEMES["int8"].quantize(weights["output.weight"])
    blocks, numbers = (blocks_of(each, beside_int8(cpu)) for each in (x, output.numbers))
    scales = int8_scales(blocks, numbers, cpu)
    rounded = (blocks / scales).round() * scales
    assert difference(logits, rounded.flatten(1)[:, : args.dim] @ output.dequantize().T) <= 1e-5


def beside_int8(cpu: str) -> int:
    """How many activations share a scale."""
    return 256 if cpu == "AMX" else 128


def blocks_of(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Blocks of so many columns, filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 16, 23, 40, 70])
@pytest.mark.parametrize("scheme", ["int4", "int4-128"])
def test_products_with_int4_are_pytorchs_with_rounded_activations(cpu: str, scheme: str, count: int) -> None:
    """Of a layer whose attention adds nothing: what PyTorch computes in another order would be rounded differently."""
    args = ModelArgs(dim=384, n_layers=1, n_heads=6, vocab_size=77, ffn_hidden_dim=1184, max_seq_len=LENGTH)
    weights = weights_of(args, torch.float32)
    weights["layers.0.attention.wo.weight"].zero_()
    plan = StepPlan((Segment(0, 0, tuple(tokens_of(args)[0][:count]), count),))
    logits = CpuRunner(model_of(args, weights), limits(quantization=scheme)).run(plan)

    output = SCHEMES["int8"].quantize(weights["output.weight"])
    for name, weight in weights.items():
        if weight.dim() == 2 and name.startswith("layers") and SCHEMES[scheme].fits(weight.shape[1]):
            weights[name] = unpack(pack(weight, SCHEMES[scheme]))
    weights["output.weight"] = output.dequantize()
    model = model_of(args, weights)

    def round_input(module: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        columns = beside_int8(cpu) if module is model.output else 128
        blocks = blocks_of(inputs[0], columns)
        if module is model.output:
            numbers = blocks_of(output.numbers, columns)
            scales = int8_scales(blocks.flatten(0, -3), numbers, cpu).view(*blocks.shape[:-1], 1)
        else:
            scales = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / scales).round() * scales).nan_to_num(0).flatten(-2)[..., : inputs[0].shape[-1]]

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (
            module is model.output or SCHEMES[scheme].fits(weights[f"{name}.weight"].shape[1])
        ):
            module.register_forward_pre_hook(round_input)
    expected = Runner(model, limits(), "cpu", 1).run(plan)
    apart = (logits - expected).abs().amax(1) / expected.abs().max()
    # Where a number lies between two steps its last bit decides, which seldom happens.
    assert apart.median() <= 1e-6 and apart.max() <= 1e-2


ONE_PRODUCT = ModelArgs(dim=200, n_layers=1, n_heads=2, vocab_size=77, ffn_hidden_dim=64, max_seq_len=LENGTH)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 16, 23, 40])
@pytest.mark.parametrize("columns", [ONE_PRODUCT.dim, 2200])  # few tokens meet 1,024 at a time with AMX
def test_products_with_int8_are_those_of_whole_numbers(cpu: str, columns: int, count: int) -> None:
    args = replace(ONE_PRODUCT, dim=columns)
    check_one_product(cpu, weights_of(args, torch.float32), args, tokens_of(args)[0][:count])


@pytest.mark.parametrize("pattern", ["equal", "alike", "two neighbours", "one"])
def test_products_with_int8_fit_whatever_the_weights_are(cpu: str, pattern: str) -> None:
    """Rows of weights that are the activations themselves come to as much as rows of their size can."""
    args, weights = ONE_PRODUCT, weights_of(ONE_PRODUCT, torch.float32)
    rows = weights["tok_embeddings.weight"]
    if pattern == "equal":
        rows = torch.full_like(rows, 0.3)
    elif pattern == "two neighbours":
        rows = F.pad(torch.tensor([1.0, 0.9]), (6, args.dim - 8)).expand_as(rows)
    elif pattern == "one":
        rows = F.pad(torch.ones(1), (7, args.dim - 8)).expand_as(rows)
    signs = torch.tensor([1.0, -1.0]).repeat(len(rows))[: len(rows), None]
    weights["tok_embeddings.weight"] = weights["output.weight"] = rows * signs
    weights["norm.weight"] = torch.ones(args.dim)
    check_one_product(cpu, weights, args, list(range(12)))


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("scheme", [*DTYPES, *ON_CPU])
def test_a_sequences_numbers_do_not_depend_on_company_or_threads(scheme: torch.dtype | str) -> None:
    args = MODELS["tied, one KV head, wide heads"]
    tokens = torch.randint(args.vocab_size, (20, 136), generator=torch.Generator().manual_seed(1)).tolist()
    dtype, quantization = (torch.float32, scheme) if isinstance(scheme, str) else (scheme, "none")
    sizes = Limits(LENGTH, len(tokens), 100, dtype, quantization, native=True)
    before = torch.get_num_threads()
    results = []
    try:
        # As many tokens as make every tile of linear.h, and more than one.
        for company, threads in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (6, 1), (7, 1), (9, 2), (16, 1), (20, 3)):
            torch.set_num_threads(threads)
            runner = CpuRunner(model_of(args, weights_of(args, dtype)), sizes)
            rows = [runner.run(StepPlan((Segment(0, at, tuple(tokens[0][at:][:66]), 1),)))[0].clone() for at in (0, 66)]
            for position in range(132, 136):
                step = [Segment(slot, position - 132, (tokens[slot][position],), 1) for slot in range(1, company)]
                place = position % company
                step.insert(place, Segment(0, position, (tokens[0][position],), 1))
                rows.append(runner.run(StepPlan(tuple(step)))[place].clone())
            results.append(torch.stack(rows))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_prompt_and_many_single_tokens_leave_one_another_alone() -> None:
    """With as many heads in a step as make a thread take several in a row."""
    args = MODELS["MHA"]
    tokens = torch.randint(args.vocab_size, (12, 40), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = Segment(0, 0, tuple(tokens[0][:37]), 1)

    def numbers(slots: list[int]) -> list[torch.Tensor]:
        runner = CpuRunner(
            model_of(args, weights_of(args, torch.float32)), Limits(40, 12, 100, torch.float32, native=True)
        )
        for slot in set(slots) - {0}:
            runner.run(StepPlan((Segment(slot, 0, tuple(tokens[slot][:20]), 1),)))
        segments = [Segment(slot, 20, (tokens[slot][20],), 1) if slot else prompt for slot in slots]
        return list(runner.run(StepPlan(tuple(segments))).clone())

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            slots = [*range(1, 12), 0]  # single tokens come first in a plan
            together = dict(zip(slots, numbers(slots), strict=True))
            for slot in (0, 1, 4, 11):
                assert torch.equal(together[slot], numbers([slot])[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs: a team of one has nobody to avoid")
def test_a_team_on_all_cores_keeps_apart_and_leaves_its_caller_free() -> None:
    cores, before = os.sched_getaffinity(0), torch.get_num_threads()

    def seated() -> int:
        """How many of this process's threads are kept on a core."""
        return sum(len(os.sched_getaffinity(int(task.name))) == 1 for task in Path("/proc/self/task").iterdir())

    others = seated()  # of teams that earlier tests left behind
    try:
        for threads in (1, len(cores)):
            torch.set_num_threads(threads)
            runner = CpuRunner(model_of(TINY, weights_of(TINY, torch.float32)), limits())
            for plan in plans(TINY):
                runner.run(plan)
            assert seated() - others == threads - 1
            assert os.sched_getaffinity(0) == cores
            del runner
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", ["none", *ON_CPU])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompts_numbers_do_not_depend_on_the_pieces_it_is_cut_into(name: str, scheme: str) -> None:
    args = MODELS[name]
    tokens = tokens_of(args)[0][:90]
    runner = CpuRunner(model_of(args, weights_of(args, torch.bfloat16)), limits(torch.bfloat16, scheme))

    def last(slot: int, *pieces: int) -> torch.Tensor:
        start = 0
        for piece in pieces:
            row = runner.run(StepPlan((Segment(slot, start, tuple(tokens[start : start + piece]), 1),)))[0].clone()
            start += piece
        return row

    assert all(torch.equal(last(0, 90), last(1, *pieces)) for pieces in ((45, 45), (3, 7, 78, 2), (20, 35, 33, 2)))
    runner.cache.copy([Copy(0, 2, 60)])
    rest = runner.run(StepPlan((Segment(2, 60, tuple(tokens[60:]), 1),)))[0]
    assert torch.equal(last(0, 90), rest)


def unpack(packed: Packed) -> torch.Tensor:
    """The weight's numbers in float32."""
    panels, columns = -(-packed.rows // PANEL), packed.columns
    data = packed.data
    if packed.kind == packing.INT4:
        both = torch.stack((data & 15, data >> 4), -2).to(torch.int16) - 8
        numbers = both.transpose(1, 2).reshape(panels * PANEL, columns)
        counts = packed.counts.transpose(1, 2).reshape(panels * PANEL, -1)
        scales = counts * packed.scales.reshape(panels * PANEL, 1)
        weight = (numbers.unflatten(1, (-1, packed.group)) * scales[:, :, None]).flatten(1)
    elif packed.kind == packing.INT8:
        weight = (data.transpose(1, 2).flatten(2).flatten(0, 1).float() - 128) * packed.scales.flatten()[:, None]
    elif packed.kind == packing.KINDS[torch.bfloat16]:
        weight = data.transpose(1, 2).flatten(2).flatten(0, 1).float()
    else:
        weight = data.transpose(1, 2).reshape(panels * PANEL, columns).float()
    return weight[: packed.rows, :columns]


def check_packed(found: torch.Tensor, weight: torch.Tensor, scheme: str | None) -> None:
    """To the bit, but for int4's groups, which count by whole numbers of up to 16,383."""
    if scheme is None:
        assert torch.equal(found, weight.float())
        return
    quantized = SCHEMES[scheme].quantize(weight)
    step = quantized.scales.float().abs().amax(1, keepdim=True) / 16383 if scheme.startswith("int4") else 0
    assert ((found - quantized.dequantize()).abs() <= 8 * 0.501 * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 37, 300])
def test_packing_loses_nothing(dtype: torch.dtype, rows: int) -> None:
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[rows // 2, :64] = 0  # two groups of nothing, and a row of it
    weight[rows // 3] = 0
    assert torch.equal(unpack(pack(weight)), weight.float())
    assert torch.equal(unpack(pack(weight[:, :77])), weight[:, :77].float())
    for scheme in ON_CPU:
        check_packed(unpack(pack(weight, SCHEMES[scheme])), weight, scheme)


@pytest.mark.parametrize("scheme", [None, *ON_CPU])
def test_a_share_of_no_rows_is_packed_too(scheme: str | None) -> None:
    packed = pack(torch.zeros(0, 128, dtype=torch.bfloat16), SCHEMES.get(scheme))
    assert (packed.rows, packed.columns, packed.data.numel()) == (0, 128, 0)


@pytest.mark.parametrize("rows", [16, 37, 300])
@pytest.mark.parametrize("scheme", [None, *ON_CPU])
def test_panels_of_two_weights_take_turns(scheme: str | None, rows: int) -> None:
    gate, up = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    both = unpack(pack(gate, SCHEMES.get(scheme), up)).unflatten(0, (-1, 2, PANEL))
    for weight, found in zip((gate, up), both.unbind(1), strict=True):
        check_packed(found.flatten(0, 1)[:rows], weight, scheme)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_large_activations_and_long_rows_do_not_overflow_whole_numbers(scheme: str, sign: int) -> None:
    """Of int4 sums are as large as they can be: all weights are -8, and all activations 127 or -127."""
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=16, ffn_hidden_dim=9056, max_seq_len=40)
    weights = {name: torch.full_like(weight, 0.5) for name, weight in weights_of(args, torch.float32).items()}
    weights["layers.0.feed_forward.w3.weight"] *= sign
    weights["output.weight"] = weights_of(args, torch.float32)["output.weight"]
    for tokens in ((1, 2, 3), range(40)):
        plan = StepPlan((Segment(0, 0, tuple(token % 16 for token in tokens), len(tokens)),))
        expected = Runner(model_of(args, weights), limits(), "cpu", 1).run(plan)
        runner = CpuRunner(model_of(args, weights), limits(quantization=scheme))
        assert difference(runner.run(plan), expected) <= 2e-2  # where sums have 16 bits, each is 15.6 steps


def test_tiny_activations_become_nothing_but_no_large_numbers() -> None:
    weights = weights_of(TINY, torch.float32)
    weights["norm.weight"] = weights["norm.weight"] * 1e-37
    plan = StepPlan((Segment(0, 0, (1, 2, 3), 3),))
    expected = Runner(model_of(TINY, weights), limits(), "cpu", 1).run(plan).clone()
    found = CpuRunner(model_of(TINY, weights), limits(quantization="int8")).run(plan)
    assert 0 < expected.abs().max() < 1e-35 and (found - expected).abs().max() <= 1.01 * expected.abs().max()


# --- where the kernels cannot be had ---


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without any compiled kernels; they are found again afterwards."""
    monkeypatch.setenv("HOME", str(tmp_path))
    library.load.cache_clear()
    yield tmp_path
    library.load.cache_clear()


def test_the_kernels_are_compiled_once_and_kept_for_this_user_alone(fresh: Path) -> None:
    library.load()
    kept = list((fresh / ".cache" / "llama-on-torchserve").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    assert kept[0].parent.stat().st_mode & 0o077 == 0
    made = kept[0].stat().st_mtime_ns
    library.load.cache_clear()
    library.load()
    assert kept[0].stat().st_mtime_ns == made


def test_a_cache_that_others_may_write_to_is_not_trusted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, temporary = fresh / ".cache" / "llama-on-torchserve", fresh / "tmp"
    for each in (folder, temporary):
        each.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert library.load().model_new
    assert not list(folder.iterdir()) and not list(temporary.iterdir())


NOTHING = 'extern "C" { ' + " ".join(f"void model_{each}() {{}}" for each in ("new", "run", "draw", "delete")) + " }"


@pytest.fixture
def tiny(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels that do nothing, and are compiled in no time; where they are to be kept."""
    (fresh / "model.cpp").write_text(NOTHING)
    monkeypatch.setattr(library, "SOURCES", ("model.cpp",))
    monkeypatch.setattr(library, "__file__", str(fresh / "library.py"))
    return fresh / ".cache" / "llama-on-torchserve"


def damaged(kept: Path, content: bytes) -> None:
    """Give a library other contents, as a new file: the old one is in this process's memory."""
    kept.unlink()
    kept.write_bytes(content)


DAMAGES = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "empty": lambda whole: b"",
    "without its hash": lambda whole: whole[:-32],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_compiled_again(tiny: Path, damage) -> None:
    library.load()
    (kept,) = tiny.iterdir()
    whole = kept.read_bytes()
    damaged(kept, damage(whole))
    library.load.cache_clear()
    assert library.load().model_new
    assert [path.read_bytes() for path in tiny.iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_to_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    (kept,) = tiny.iterdir()
    access = os.access  # which root has to everything
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    compiled = library._compile
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled"))
    library.load.cache_clear()
    assert library.load().model_new
    monkeypatch.setattr(library, "_compile", compiled)
    damaged(kept, b"damaged")
    library.load.cache_clear()
    assert library.load().model_new and kept.read_bytes() == b"damaged"


def compiler_of(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have the shell's commands for a compiler."""
    (folder / "bin").mkdir()
    (folder / "bin" / "c++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def runs(pid: int) -> bool:
    """Whether there is such a process, other than one that only waits to be noticed as ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_compiler_that_hangs_leaves_no_process_behind(
    tiny: Path, tmp_path: Path, interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    compiler_of(tmp_path, monkeypatch, f"sleep 100 & echo $! > {child}; wait")
    monkeypatch.setattr(library, "COMPILED_WITHIN_S", 60 if interrupted else 1)
    if interrupted:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    ended, said = (KeyboardInterrupt, None) if interrupted else (library.NoKernels, "did not end within 1 s")
    with pytest.raises(ended, match=said):
        library.load()
    wait_until(lambda: not runs(int(child.read_text())), 30, "the compiler's own process")  # it ends a little later
    assert not list(tiny.iterdir())


def test_a_compilers_message_may_be_in_any_encoding(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_of(tmp_path, monkeypatch, "printf 'd\\351faut\\n' >&2; exit 1")
    with pytest.raises(library.NoKernels, match="failed: d.faut"):
        library.load()


@pytest.mark.parametrize("lack", ["a compiler", "instructions"])
def test_a_machine_without_what_they_need_takes_pytorchs_and_says_why(
    fresh: Path, lack: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lack == "a compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
        reason = "no C++ compiler"
    else:
        monkeypatch.setattr(library, "_cpu_flags", lambda: {"avx2"})
        reason = "this CPU has no f16c, fma"
    with caplog.at_level(logging.WARNING, "engine"):  # whose level a command line before may have changed
        assert not choose_native(EngineConfig(), TINY, "cpu")
    assert reason in caplog.text
    with pytest.raises(ConfigError, match=re.escape(f"kernels is 'native', but they cannot be had: {reason}")):
        choose_native(EngineConfig(kernels="native"), TINY, "cpu")


def test_pytorchs_kernels_are_used_where_they_are_asked_for_or_the_device_is_another() -> None:
    assert not choose_native(EngineConfig(kernels="torch"), TINY, "cpu")
    assert not choose_native(EngineConfig(), TINY, "cuda:0")
    with pytest.raises(ConfigError, match="those are for the CPU and device is 'cuda:0'"):
        choose_native(EngineConfig(kernels="native"), TINY, "cuda:0")


# --- sampling ---


def test_tokens_are_those_that_pytorchs_sampler_draws() -> None:
    model, rng = model_of(TINY, weights_of(TINY, torch.float32)), random.Random(4)
    runner = CpuRunner(model, limits())
    same = drawn = 0
    for round_ in range(60):
        width, rows = rng.choice((3, 64, 1000, 5000)), rng.randint(1, 9)
        logits = 4 * torch.randn(rows, width + 5, generator=torch.Generator().manual_seed(round_))[:, :width]
        if round_ % 5 == 0:
            logits = logits.round()  # many weights that are equal: of two the lower id counts as the larger
        options = [
            SamplingParams(
                temperature=rng.choice((0.0, 1e-4, 0.7, 1.0, 3.0, 50.0)),
                top_k=rng.choice((0, 0, 1, 2, 40, 100_000)),
                top_p=rng.choice((1.0, 1.0, 0.9, 0.5, 1e-6)),
                min_p=rng.choice((0.0, 0.0, 0.05, 1.0)),
                repetition_penalty=rng.choice((1.0, 1.3)),
                logit_bias=rng.choice(({}, {1: 5.0})),
                seed=rng.randrange(1000),
            )
            for _ in range(rows)
        ]
        ours, theirs = ([Sequence([1, 2], each) for each in options] for _ in range(2))
        pairs = zip(runner.choose_tokens(logits, ours), choose_tokens(logits, theirs), strict=True)
        same += sum(a == b for a, b in pairs)
        drawn += rows
    # Their last bits differ, which may tip a share of the tail or a draw that is as good as even.
    assert same >= 0.99 * drawn


def test_the_smallest_noise_and_numbers_that_are_none_draw_a_token() -> None:
    runner = CpuRunner(model_of(TINY, weights_of(TINY, torch.float32)), limits())
    sequence = Sequence([1], SamplingParams(temperature=1.0, top_k=3))
    sequence.draw = lambda: 208044  # which gives token 50 the largest random bits, all ones
    logits = torch.full((1, 96), -30.0)
    logits[0, [3, 7, 50]] = torch.tensor([3.0, 2.0, 0.1])
    assert runner.choose_tokens(logits, [sequence]) == [50]
    few = Sequence([1], SamplingParams(temperature=1.0, top_p=0.1))  # 0.1 in 32 bits is a little more
    equal = torch.zeros(50, 100)
    assert set(runner.choose_tokens(equal, [few] * 50)) <= set(range(10))
    for wrong in (math.inf, math.nan):
        logits[0, 5] = wrong
        assert 0 <= runner.choose_tokens(logits, [sequence])[0] < 96


def test_draws_follow_the_weights() -> None:
    runner = CpuRunner(model_of(TINY, weights_of(TINY, torch.float32)), limits())
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sequence = Sequence([1], SamplingParams(temperature=1.0, seed=9))
    draws = 4000
    logits = shares.log().expand(100, -1).contiguous()
    tokens = [token for _ in range(draws // 100) for token in runner.choose_tokens(logits, [sequence] * 100)]
    counts = torch.tensor(tokens).bincount(minlength=4)
    # Five standard deviations of a binomial.
    assert ((counts / draws - shares).abs() <= 5 * (shares * (1 - shares) / draws).sqrt()).all()
    kept = Sequence([1], SamplingParams(temperature=1.0, top_p=0.7, seed=9))
    assert set(runner.choose_tokens(logits, [kept] * 100)) == {0, 1}
