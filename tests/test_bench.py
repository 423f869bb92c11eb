"""What the benchmark measures and writes, on tiny models; no time is looked at."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tools import bench, bench_machine
from tools.bench_engine import EngineBench, model_args, random_engine, settings
from tools.bench_machine import Machine, measure_machine
from tools.bench_report import Table, percentile

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


def test_shares_are_of_what_the_machine_can_do():
    bench = tiny_bench()
    run = bench.run(2, 8, 4)
    row = bench.decode_row(run, MACHINE)
    assert math.isclose(row["bandwidth_share"], row["bytes_per_step"] / run.step_s / 1e10)
    assert math.isclose(row["tokens_per_s"], 2 / run.step_s)
    prompts = bench.prefill_row(bench.run(1, 32, 1), MACHINE)
    assert math.isclose(prompts["flops_share"], bench.costs.prompt_flops(32) * prompts["tokens_per_s"] / 32 / 1e11)


def test_percentiles_are_values_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 20, 50, 99, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]


# --- the machine ---


def test_the_machine_is_measured_with_and_without_a_compiler(monkeypatch):
    small = {"rounds": 1, "read_bytes": 1 << 20, "side": 32}
    with_compiler = measure_machine(1, **small)
    monkeypatch.setattr(bench_machine.shutil, "which", lambda name: None)
    without = measure_machine(1, **small)
    assert set(without.read_ways) == {"torch"} and set(with_compiler.read_ways) <= {"torch", "C++"}
    assert without.read_bytes_per_s > 0 and set(without.product_flops) == {"float32", "bfloat16"}
    assert str(without).startswith(without.cpu)


def test_the_compiled_loop_reads_every_byte():
    loop = bench_machine._compiled_loop()
    if loop is None:
        pytest.skip("no compiler")
    numbers = torch.ones(8 * 8 * 8 * 4, dtype=torch.int64)
    numbers = numbers[-numbers.data_ptr() % 64 // 8 :][: 8 * 8 * 8 * 2]
    assert [loop(numbers.data_ptr(), numbers.nbytes, threads) for threads in (1, 2)] == [len(numbers)] * 2


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
