"""What the benchmark measures and writes, on tiny models; no time is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenizing import load_tokenizer
from tools import bench, bench_machine, bench_peers
from tools.bench_engine import EngineBench, Marks, model_args, random_engine, settings
from tools.bench_hf import Generation, Transformers, TransformersError, make_model
from tools.bench_llamacpp import LlamaCpp
from tools.bench_load import Ask, Load, LoadError, Target, intrude, offer, summarize
from tools.bench_machine import Machine, measure_gpu, measure_machine
from tools.bench_report import NoPictures, Table, draw, percentile, write_csv
from tools.bench_weights import answer_token, usual_tokens
from tools.peers import PeerError
from tools.random_checkpoint import DEMO_TOKENIZER

MACHINE = Machine("a CPU", 2, 1, 1e10, {"torch": 1e10}, {"float32": 1e11}, (0.0, 0.0, 0.0), {"Python": "3"}, "abc")


def tiny_bench(weights: str = "f32", slots: int = 4) -> EngineBench:
    args = model_args("tiny")
    return EngineBench(random_engine(args, settings(weights, slots, 64, 1)), args)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the engine ---


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_a_run_times_every_step_in_which_all_sequences_decode(weights):
    run = tiny_bench(weights).run(batch=3, prompt=8, tokens=5)
    assert len(run.first_token_s) == 3
    assert len(run.decode_s) == 4  # the first tokens come with the prompts
    assert run.wall_s >= sum(run.decode_s) and min(run.first_token_s) > 0


def test_steps_that_also_compute_prompts_are_no_decode_steps():
    bench = tiny_bench()
    bench.engine._scheduler._max_tokens = 10  # the second prompt is computed beside the first one's tokens
    run = bench.run(batch=2, prompt=8, tokens=6)
    assert len(run.decode_s) < 5


def test_no_prompt_is_given_twice():
    bench = tiny_bench()
    prompts = [bench.prompt(16) for _ in range(20)]
    assert len({tuple(prompt) for prompt in prompts}) == 20


def test_bytes_of_a_step_are_all_matrices_but_the_table_and_the_keys_and_values():
    bench = tiny_bench("bf16")
    args = bench.args
    matrices = args.parameter_count() - args.vocab_size * args.dim
    assert bench.costs.bytes_per_step(1, 0) == 2 * matrices
    per_token = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 2
    assert bench.costs.bytes_per_step(3, 10) - bench.costs.bytes_per_step(3, 0) == 30 * per_token
    assert tiny_bench("int8").costs.bytes_per_step(1, 0) < 1.1 * matrices


def test_a_prompt_takes_what_its_tokens_take_one_by_one_but_for_all_but_one_logits():
    bench = tiny_bench()
    logits = 2 * bench.args.vocab_size * bench.args.dim
    assert bench.costs.flops(32) == sum(bench.costs.flops(1, before) for before in range(32)) - 31 * logits


def test_shares_are_of_what_the_machine_can_do():
    bench = tiny_bench()
    run = bench.run(2, 8, 4)
    row = bench.decode_row(run, MACHINE)
    assert math.isclose(row["bandwidth_share"], row["bytes_per_step"] / run.step_s / 1e10)
    assert math.isclose(row["tokens_per_s"], 2 / run.step_s)
    assert math.isclose(row["flops_share"], 2 * bench.costs.flops(1, row["context"]) / run.step_s / 1e11)
    prompts = bench.prefill_row(bench.run(1, 32, 1), MACHINE)
    assert math.isclose(prompts["flops_share"], bench.costs.flops(32) * prompts["tokens_per_s"] / 32 / 1e11)


def test_gaps_between_a_gpus_steps_are_those_of_the_last_ones(monkeypatch):
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner = SimpleNamespace(run=lambda plan: plan)
    marks = Marks(runner)
    for plan, pause in (("a", 5), ("b", 0), ("c", 2), ("d", 0)):  # a pause follows each
        assert runner.run(plan) == plan
        for _ in range(pause):
            next(clock)
    assert marks.gaps(4) == (6.0, 1.0, 3.0)
    assert marks.gaps(3) == (1.0, 3.0)


def test_an_engine_that_makes_room_comes_again_when_it_is_asked_for():
    made = []

    def make():
        made.append(weakref.ref(bench := tiny_bench()))
        return bench

    for stays, expected in ((True, 1), (False, 2)):
        made.clear()
        visitor = bench_peers.Visitor(make, stays)
        assert not made
        for _ in range(2):
            assert visitor.run(1, 4, 2).tokens == 2
            visitor.make_room()
            assert (made[-1]() is not None) == stays
        assert len(made) == expected


def test_percentiles_are_values_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 20, 50, 99, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]


# --- the machine ---


def test_the_machine_is_measured_with_and_without_a_compiler(monkeypatch):
    small = {"rounds": 1, "read_bytes": 1 << 20, "side": 32}
    compiled = {"C++", "C++, eight places"} if bench_machine._compiled_loop() else set()
    assert set(measure_machine(1, **small).read_ways) == {"torch", *compiled}
    monkeypatch.setattr(bench_machine.shutil, "which", lambda name: None)
    without = measure_machine(1, **small)
    assert set(without.read_ways) == {"torch"}
    assert without.read_bytes_per_s > 0 and set(without.product_flops) == {"float32", "bfloat16"}
    assert str(without).startswith(without.name)


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ((0.01, 0.01, 0.01, 0.01), 2 * 64**3 / 0.01),  # the small ones waited for their threads
        ((0.1, 0.7, 9, 9), 2 * 16**3 / 0.7),
        ((0.1, 0.1, 0.7, 9), 2 * 32**3 / 0.7),
    ],
)
def test_a_product_that_would_take_long_is_measured_on_smaller_matrices(monkeypatch, times, best):
    took = iter(times)
    monkeypatch.setattr(bench_machine, "_seconds", lambda work, device="cpu": next(took))
    assert bench_machine._product_rate(torch.float32, 1, 64) == pytest.approx(best)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_gpu_is_measured_in_its_own_memory(device):
    """Without one the same code measures the CPU, which proves its arithmetic and nothing about waiting for a GPU."""
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = measure_gpu(device, 1, rounds=1, read_bytes=1 << 22, side=64)
    assert set(found.read_ways) == {"sum", "copy"} and set(found.product_flops) == {"float32", "bfloat16"}
    assert found.read_bytes_per_s == max(found.read_ways.values()) > 0


def test_a_machine_with_a_gpu_is_measured_there_unless_the_cpu_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "PROJECT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    measured = []
    monkeypatch.setattr(bench, "measure_machine", lambda threads: measured.append("cpu") or MACHINE)
    monkeypatch.setattr(bench, "measure_gpu", lambda device, threads: measured.append(device) or MACHINE)
    told = []
    monkeypatch.setattr(bench, "bench_engine", lambda flags, machine: told.append(flags) or {})
    for words in ([], ["--device", "cpu"], ["--device", "cuda", "--no-cuda-graphs"]):
        assert bench.main(["--quick", "--shape", "tiny", "--threads", "1", *words]) == 0
    assert measured == ["cuda:0", "cpu", "cuda:0"]
    assert [(flags.device, flags.cuda_graphs) for flags in told] == [("auto", True), ("cpu", True), ("cuda", False)]


def test_the_compiled_loop_reads_every_byte():
    loop = bench_machine._compiled_loop()
    if loop is None:
        pytest.skip("no compiler")
    numbers = torch.arange(1 << 18)  # some turns of eight places, and a rest
    numbers = numbers[-numbers.data_ptr() % 64 // 8 :][: (1 << 18) - 64]
    for places in (1, 8):
        assert [loop(numbers.data_ptr(), numbers.nbytes, threads, places) for threads in (1, 2)] == [numbers.sum()] * 2


# --- the command line ---


def test_quick_prints_a_row_for_each_figure_and_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "PROJECT", tmp_path)
    monkeypatch.setattr(bench, "measure_machine", lambda threads: MACHINE)
    monkeypatch.setattr(bench, "QUICK_LONG_PROMPT", 40)
    assert bench.main(["--quick", "--shape", "tiny", "--weights", "f32,int8", "--batch", "1,2", "--threads", "1"]) == 0
    results = json.loads((tmp_path / "quick.json").read_text())
    assert [(row["weights"], row.get("batch")) for row in results["engine"]] == [
        (weights, batch) for weights in ("f32", "int8") for batch in (1, 2, None)
    ]
    assert results["machine"]["commit"] == "abc" and results["flags"]["threads"] == 1
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("f32", "int8"))]) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int3"], "'int3' is not one of f32, bf16"),
        (["--batch", "1,x"], "'1,x' is not a list of whole numbers"),
        (["--threads", "0"], "--threads is 0; this machine allows 1 to"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_table_has_dashes_for_what_a_row_lacks():
    table = Table(("weights", "weights", "8"), ("ms", "ms", "6.1f"))
    assert [table.head(), table.line({"weights": "int8"})] == [" weights      ms", "    int8       -"]


# --- clients ---


TOKEN = "262"


class Completions:
    """A server that answers with as many words as it is asked for, in chunks that do not end where events do."""

    def __init__(self, status: int = 200, missing: int = 0, per_token_s: float = 0.0) -> None:
        """Every token of a prompt but the first takes time."""
        self.bodies: list[dict] = []
        self._status, self._missing, self._per_token_s = status, missing, per_token_s

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        size = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
        body = json.loads(await reader.readexactly(size))
        self.bodies.append(body)
        if self._status != 200:
            writer.write(f"HTTP/1.1 {self._status} No\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy".encode())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.sleep(self._per_token_s * (len(body["prompt"]) - 1))
            events = b"".join(
                b'data: {"choices": [{"text": "%s"}]}\n\n' % text
                for text in [b"word"] * (body["max_tokens"] - self._missing) + [b""]
            )
            for start in range(0, len(events), 50):
                part = events[start : start + 50]
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
                await asyncio.sleep(0.001)
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()


def with_server(completions: Completions, work: Callable[[Target], Awaitable[Any]]) -> Any:
    async def both() -> Any:
        server = await asyncio.start_server(completions.answer, "127.0.0.1", 0)
        async with server:
            return await work(Target("a server", server.sockets[0].getsockname()[1], "/v1/completions", 262))

    return asyncio.run(both())


def test_clients_see_every_token_though_chunks_cut_events():
    completions = Completions()
    asks = Load(6, (4, 8), (3, 5)).draw(range(3, 50), seed=1)
    seen = with_server(completions, lambda target: offer(target, asks, at_once=2))
    assert [len(each.tokens) for each in seen] == [each.tokens for each in asks]
    assert all(body["logit_bias"] == {TOKEN: 100} and body["ignore_eos"] for body in completions.bodies)
    assert sorted(tuple(body["prompt"]) for body in completions.bodies) == sorted(each.prompt for each in asks)
    figures = summarize(seen, 100.0, 100.0)
    assert figures["requests"] == 6 and figures["good_share"] == 1.0
    assert summarize(seen, 0.0, 0.0)["goodput"] == 0.0
    assert figures["gap_p50_ms"] <= figures["gap_p99_ms"] <= figures["gap_max_ms"]


@pytest.mark.parametrize(
    ("completions", "said"),
    [(Completions(503), "status 503: busy"), (Completions(missing=1), "status 200, 2 of 3 tokens")],
)
def test_an_answer_that_is_not_whole_is_an_error(completions, said):
    with pytest.raises(LoadError, match=f"a server: 2 of 2 requests failed; the first: {said}"):
        with_server(completions, lambda target: offer(target, [Ask((5, 6), 3)] * 2))


def test_a_long_prompt_among_streams_is_timed_against_their_steps():
    felt = with_server(Completions(), lambda target: intrude(target, [Ask((5,), 90)] * 2, Ask(tuple(range(3, 40)), 2)))
    assert 0 < felt.step_s and felt.steps == felt.worst_s / felt.step_s


def test_a_long_prompt_waits_for_streams_that_begin_late():
    streams = [Ask((5,), 90), Ask((5, 6), 90)]
    felt = with_server(Completions(per_token_s=0.05), lambda target: intrude(target, streams, Ask((3, 4, 5), 2)))
    assert 0.1 <= felt.first_token_s and 0 < felt.step_s < 0.05


def test_arrivals_and_shared_beginnings_are_as_asked_and_the_same_for_a_seed():
    load = Load(50, (4, 8), (1, 9), shared=5, rate=10.0)
    asks = load.draw(range(3, 50), seed=7)
    assert asks == load.draw(range(3, 50), seed=7) != load.draw(range(3, 50), seed=8)
    assert len({each.prompt[:5] for each in asks}) == 1 and {len(each.prompt) for each in asks} == {9, 10, 11, 12, 13}
    times = [each.at for each in asks]
    assert times == sorted(times) and 2.5 < times[-1] < 10.0


@pytest.fixture
def endpoint() -> Iterator[Target]:
    """The same server in a thread, for what has event loops of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(Completions().answer, "127.0.0.1", 0, limit=1 << 20), loop
    ).result()
    yield Target("a server", server.sockets[0].getsockname()[1], "/v1/completions", 262)
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_services_part_has_a_row_for_each_load(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "PROJECT", tmp_path)
    monkeypatch.setattr(bench, "measure_machine", lambda threads: MACHINE)
    monkeypatch.setattr(bench, "torchserve", lambda *_, **__: contextlib.nullcontext(endpoint))
    words = ["service", "--shape", "tiny", "--streams", "1,2", "--rate", "100,200", "--requests", "2", "--threads", "1"]
    assert bench.main(words) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    loads = ["1 stream", "2 streams", "Poisson, 100/s", "Poisson, 200/s", "2 at once, 256 shared"]
    assert [row["load"] for row in results["service"]] == loads
    assert results["intrusion"]["prompt"] == 512 and results["chat"]["history"] == 400
    assert "second turn of a chat of 400 tokens" in capsys.readouterr().out


def test_prompts_and_answers_are_of_whole_words():
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    assert answer_token() in usual_tokens()
    assert all(tokenizer.token_bytes(id).strip().isalpha() for id in usual_tokens())


# --- the peers ---


def comparison(*words: str) -> bench_peers.Comparison:
    return bench_peers.Comparison(bench_peers._parse(["--shape", "tiny", "--threads", "1", *words]))


def test_ratios_have_every_key_and_null_for_what_was_not_measured():
    assert comparison().ratios() == dict.fromkeys(bench_peers.RATIOS)
    assert len(bench_peers.RATIOS) == 16


def test_a_ratio_is_the_median_of_its_rounds():
    found = comparison()
    for ours, theirs in ((10.0, 5.0), (30.0, 10.0), (8.0, 8.0)):
        found.add("decode b8 int4", "engine", ours)
        found.add("decode b8 int4", "llama.cpp", theirs)
    assert found.ratios()["decode_b8_int4_vs_llamacpp"] == 2.0


def test_transformers_is_compared_as_whichever_is_faster():
    found = comparison()
    for who, rate in (("engine", 12.0), ("llama.cpp", 9.0), ("transformers", 4.0), ("transformers, compiled", 6.0)):
        found.add("decode b8 bf16", who, rate)
    assert found.ratios()["decode_b8_bf16_vs_hf"] == 2.0


def test_transformers_computes_in_float32_where_bfloat16_would_take_too_long(capsys, monkeypatch):
    found, started = comparison("hf"), []

    class Peer(contextlib.nullcontext):
        def __init__(self, *how):
            super().__init__(self)
            self.name, self.run = "transformers", lambda *_: None
            started.append(how)

    monkeypatch.setattr(bench_peers, "Transformers", Peer)
    with contextlib.ExitStack() as stack:
        found._transformers(stack, replace(MACHINE, product_flops={"float32": 1e12, "bfloat16": 1e12}))
        assert {dtype for *_, dtype in started} == {"bfloat16"} and not found.notes
        started.clear()
        found._transformers(stack, replace(MACHINE, product_flops={"float32": 1e12, "bfloat16": 1e3}))
    assert {dtype for *_, dtype in started} == {"float32"}
    assert "has the same weights in float32: PyTorch computes bfloat16 at 1e-06" in capsys.readouterr().err


def test_transformers_is_left_out_where_its_prompts_alone_would_take_too_long(capsys):
    found = comparison("hf")
    slow = replace(MACHINE, product_flops={"float32": 1e3, "bfloat16": 1e3})
    with contextlib.ExitStack() as stack:
        assert found._transformers(stack, slow) == []
    assert "PyTorch computes bfloat16 at 1e-06 GFLOP/s on this CPU" in capsys.readouterr().err
    assert found.notes["transformers"].startswith("is left out: PyTorch computes bfloat16")


def test_transformers_is_left_out_where_it_would_not_fit_into_memory(capsys, monkeypatch):
    found = comparison("hf")
    monkeypatch.setattr(bench_peers, "available_memory", lambda device: 1 << 20)
    with contextlib.ExitStack() as stack:
        assert found._transformers(stack, replace(MACHINE, product_flops={"float32": 1e12, "bfloat16": 1e12})) == []
    assert "is left out: bfloat16 needs" in capsys.readouterr().err
    assert "float32 needs" in found.notes["transformers"] and "0.0 are available" in found.notes["transformers"]


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch, capsys):
    def engines(self: bench_peers.Comparison, machine: Machine) -> None:
        self.add("decode b1 int8", "engine", 3.0)
        self.add("decode b1 int8", "llama.cpp", 2.0)
        raise PeerError("llama-bench failed: no memory")

    monkeypatch.setattr(bench_peers, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_peers, "PROJECT", tmp_path)
    monkeypatch.setattr(bench_peers, "measure_machine", lambda threads: MACHINE)
    monkeypatch.setattr(bench_peers.Comparison, "engines", engines)
    assert bench_peers.main(["--threads", "1"]) == 1
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert ratios["decode_b1_int8_vs_llamacpp"] == 1.5 and set(ratios) == set(bench_peers.RATIOS)
    assert capsys.readouterr().err == "bench_peers: error: llama-bench failed: no memory\n"


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport json, sys\nwords = sys.argv\n{text}")
    path.chmod(0o755)
    return path


def test_llama_cpp_is_asked_for_the_same_sizes_and_keeps_its_faster_flags(tmp_path):
    batched = program(
        tmp_path / "batched",
        "on = words[words.index('-fa') + 1] == 'on'\n"
        "for pl in words[words.index('-npl') + 1].split(','):\n"
        "    print(json.dumps({'pl': int(pl), 'speed_tg': int(pl) * (3.0 if on else 2.0)}))\n"
        "print('llama_perf_context_print: nothing')",
    )
    plain = program(
        tmp_path / "plain",
        "assert words[words.index('-p') + 1] == '512' and words[words.index('-t') + 1] == '2'\n"
        "print(json.dumps({'avg_ts': 50.0 if words[words.index('-fa') + 1] == 'off' else 40.0}))",
    )
    cpp = LlamaCpp({"llama-batched-bench": batched, "llama-bench": plain}, tmp_path / "model.gguf", 2)
    cpp.choose_flags((1, 8), 64, 16, 512)
    assert (cpp.decode_flags, cpp.prefill_flags) == ("on", "off")
    assert cpp.decode((1, 8), 64, 16) == {1: 3.0, 8: 24.0} and cpp.prefill(512) == 50.0


def test_a_program_that_fails_is_named_with_its_last_words(tmp_path):
    broken = program(tmp_path / "broken", "print('first', file=sys.stderr)\nsys.exit('no memory')")
    with pytest.raises(PeerError, match="llama-bench failed: no memory"):
        LlamaCpp({"llama-bench": broken}, tmp_path / "model.gguf", 1).prefill(512)


def test_transformers_gives_the_time_of_every_step():
    times = Generation(make_model("tiny"), compiled=False).run(2, 8, 4)
    assert len(times["decode_s"]) == 3 and times["first_token_s"] > 0


def test_transformers_in_float32_has_the_weights_of_bfloat16():
    wide, narrow = make_model("tiny", "float32").state_dict(), make_model("tiny").state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v.bfloat16(), narrow[name]) for name, v in wide.items())
    assert all(torch.equal(v, v.bfloat16().float()) for v in wide.values())


def test_a_peer_in_a_process_of_its_own_answers_line_by_line_and_says_why_it_ended(tmp_path, monkeypatch):
    answers = "asked = json.loads(input())\nprint(json.dumps({'decode_s': [asked['batch']]}), flush=True)\n"
    monkeypatch.setattr(
        sys, "executable", str(program(tmp_path / "python", answers + "input()\nsys.exit('no memory')"))
    )
    with Transformers("tiny", 1) as peer:
        assert peer.run(2, 8, 4) == {"decode_s": [2]}
        with pytest.raises(TransformersError, match="transformers ended: no memory"):
            peer.run(2, 8, 4)


# --- what is written ---


def test_the_historical_table_has_its_columns(tmp_path):
    row = {"weights": "int8", "tokens": 32, "prompt": 64, "batch": 8, "bytes_per_step": 2e9, "step_ms": 100.0}
    write_csv(tmp_path / "bench.csv", "1.1B", [row | {"throughput": 55.5}], gpus=0)
    assert (tmp_path / "bench.csv").read_text().splitlines() == [
        "model_size,max_gen_len,max_prompt_len,batch_size,tokens/second,bandwidth,GPUs",
        "1.1B-int8,32,64,8,55.50,20.00,0",
    ]


def test_pictures_are_drawn_or_their_lack_explained(tmp_path, monkeypatch):
    rows = [{"batch": batch, "ms": 10.0 * batch, "weights": kind} for batch in (1, 2, 8) for kind in ("bf16", "int8")]
    sizes = ("batch", "sequences"), ("ms", "ms")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NoPictures, match="matplotlib is not installed; run: make install"):
        draw(tmp_path / "steps.png", "steps", rows, *sizes, by="weights")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    draw(tmp_path / "steps.png", "steps", rows, *sizes, by="weights", logarithmic=True)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_engines_part_writes_json_csv_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "PROJECT", tmp_path)
    monkeypatch.setattr(bench, "measure_machine", lambda threads: MACHINE)
    words = ["engine", "--shape", "tiny", "--weights", "f32,int8", "--batch", "1,2", "--context", "8,16"]
    assert bench.main([*words, "--threads", "1"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["engine"]
    assert [row["scan"] for row in rows] == 2 * (["batch"] * 2 + ["prompt", "context"] * 2)
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 5
