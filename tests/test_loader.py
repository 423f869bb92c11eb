"""Sizes, dtypes and the memory preflight, without loading anything."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.loader as loader
from engine.config import ConfigError, EngineConfig, from_mapping
from engine.loader import Limits, choose_dtype, choose_threads, memory_need, preflight
from engine.parallel import Launch, Ranks, choose_device
from engine.scheduler import MAX_PROMPT_LOGIT_ROWS
from llama2 import ModelArgs
from quant import SCHEMES

LLAMA_7B = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)
LLAMA_70B = ModelArgs(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=32000
)
TINY = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=96)


def test_the_need_of_a_7b_is_its_weights_and_its_cache() -> None:
    need = memory_need(LLAMA_7B, Limits(4096, 2, 512, torch.bfloat16), 1)
    assert need.weights == 2 * LLAMA_7B.parameter_count()
    assert need.cache == 2 * 32 * 2 * 4096 * 4096 * 2  # keys and values x layers x slots x tokens x width x bytes
    assert need.working > (2 + MAX_PROMPT_LOGIT_ROWS) * 32000 * 32  # logits of slots and of guesses or prompts


def test_ranks_share_weights_and_kv_heads() -> None:
    limits = Limits(2048, 1, 512, torch.bfloat16)
    one, eight, sixteen = (memory_need(LLAMA_70B, limits, ranks) for ranks in (1, 8, 16))
    assert one.weights / 8 == pytest.approx(eight.weights, rel=1e-3)
    assert one.cache == 8 * eight.cache == 8 * sixteen.cache  # eight KV heads: sixteen ranks hold each twice


def test_a_share_of_columns_that_no_group_fits_counts_as_it_stays() -> None:
    limits = Limits(2048, 8, 512, torch.bfloat16, "int4-128", native=True)
    one, four = (memory_need(LLAMA_7B, limits, ranks).weights for ranks in (1, 4))
    kept = LLAMA_7B.n_layers * LLAMA_7B.dim * LLAMA_7B.ffn_hidden_dim  # w2's, of which a rank has 2752 columns
    assert four == pytest.approx((one + kept * (2 - SCHEMES["int4-128"].bits / 8)) / 4, rel=1e-3)


def test_files_that_were_read_leave_room_in_a_container(tmp_path: Path) -> None:
    before = loader.available_memory("cpu", tmp_path)
    for name, text in (("max", 3 << 20), ("current", 2 << 20), ("stat", f"anon 5\ninactive_file {1 << 20}")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert loader.available_memory("cpu", tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert loader.available_memory("cpu", tmp_path) > before // 2


def test_what_does_not_fit_is_refused_with_figures_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda device: 20 << 30)
    ranks = Ranks(Launch(), "cpu", LLAMA_7B)
    limits = Limits(4096, 8, 512, torch.bfloat16)
    message = r"weights 12.55 GiB \(bfloat16\) \+ KV cache 16.00 GiB \(8 slots x 4096 tokens\).*18.00 GiB usable on cpu"
    with pytest.raises(ConfigError, match=message + ".*lower max_batch_size to 2 or max_seq_len"):
        preflight(LLAMA_7B, limits, ranks, 0.9)
    preflight(LLAMA_7B, Limits(4096, 2, 512, torch.bfloat16), ranks, 0.9)
    with pytest.raises(ConfigError, match="the weights alone do not fit"):
        preflight(LLAMA_7B, Limits(16, 1, 512, torch.float32), ranks, 0.9)


def test_ranks_on_one_machine_share_its_memory_but_each_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda device: 20 << 30)
    gpu, cpu = (SimpleNamespace(launch=Launch(0, 2, 0, 2), device=device) for device in ("cuda:0", "cpu"))
    limits = Limits(4096, 8, 512, torch.bfloat16)
    preflight(LLAMA_7B, limits, gpu, 0.9)
    with pytest.raises(ConfigError, match=r"2 rank\(s\) here") as caught:
        preflight(LLAMA_7B, limits, cpu, 0.9)
    fit = int(re.search(r"lower max_batch_size to (\d+)", str(caught.value))[1])
    preflight(LLAMA_7B, dataclasses.replace(limits, max_batch_size=fit), cpu, 0.9)


def test_the_preflight_says_what_will_be_held(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine")
    preflight(TINY, Limits(128, 4, 64, torch.float32), Ranks(Launch(), "cpu", TINY), 0.9)
    assert "memory: weights 0.5 MiB (float32) + KV cache 0.5 MiB (4 slots x 128 tokens)" in caplog.text


def test_settings_win_over_the_checkpoints_defaults() -> None:
    limits = Limits.settle(EngineConfig(max_seq_len=99), TINY, "cpu")
    assert (limits.max_seq_len, limits.max_batch_size) == (99, TINY.max_batch_size)
    graphs = [
        Limits.settle(EngineConfig(cuda_graphs=wanted, dtype="float32"), TINY, device).cuda_graphs
        for wanted, device in ((True, "cuda:0"), (False, "cuda:0"), (True, "cpu"))
    ]
    assert graphs == [True, False, False], "only a GPU has them"
    with pytest.raises(ConfigError, match=r"max_tokens_per_step is 4; it must be at least max_batch_size \(8\)"):
        Limits.settle(EngineConfig(max_tokens_per_step=4), TINY, "cpu")


def test_auto_dtype_is_float32_for_small_models_on_a_cpu_and_bfloat16_for_large_ones() -> None:
    assert choose_dtype("auto", TINY, "cpu") is torch.float32
    assert choose_dtype("auto", LLAMA_7B, "cpu") is torch.bfloat16
    assert choose_dtype("float16", LLAMA_7B, "cpu") is torch.float16


def test_tiny_layers_get_one_thread_and_large_ones_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert (choose_threads(TINY, 1), choose_threads(LLAMA_7B, 1), choose_threads(LLAMA_7B, 4)) == (1, 8, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA; this machine has it")
def test_cuda_is_refused_where_there_is_none() -> None:
    assert choose_device("auto", Launch()) == "cpu"
    with pytest.raises(ConfigError, match="device is 'cuda' but this machine or this torch has no CUDA"):
        choose_device("cuda", Launch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequence_len": 5}, "config: unknown key 'max_sequence_len'; did you mean 'max_seq_len'?"),
        ({"quux": 5}, "config: unknown key 'quux'; allowed: cuda_graphs, device, dtype, kernels, max_batch_size"),
        ({"max_seq_len": 0}, "config: max_seq_len is 0; it must be a whole number of at least 1"),
        ({"device": "tpu"}, "config: device is 'tpu'; allowed: auto, cpu, cuda"),
        ({"dtype": "int3"}, "config: dtype is 'int3'; allowed: auto, float32, bfloat16, float16"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5; it must be above 0 and at most 1"),
        ({"speculation": "ngram"}, "speculation is 'ngram'; allowed: none, prompt_lookup"),
        ({"max_draft_tokens": 0}, "max_draft_tokens is 0; it must be a whole number of at least 1"),
        ({"prefix_reuse": 1}, "prefix_reuse is 1; it must be true or false"),
        ({"cuda_graphs": "no"}, "cuda_graphs is 'no'; it must be true or false"),
        *(
            ({"prefill_beside_decode": bad}, f"prefill_beside_decode is {bad!r}; it must be auto or a whole number")
            for bad in ("few", 0, True, 2.5)
        ),
        ({"verify_checkpoint": "yes"}, "verify_checkpoint is 'yes'; it must be true or false"),
        ({"max_batch_size": 600}, r"max_tokens_per_step is 512; it must be at least max_batch_size \(600\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(EngineConfig, settings, "config")


def test_launch_reads_torchruns_variables() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Launch.from_environment(environment) == Launch(3, 4, 1, 2)
    assert Launch.from_environment({}) == Launch()
    with pytest.raises(ConfigError, match="start several ranks with torchrun"):
        Launch.from_environment({"RANK": "0"})
