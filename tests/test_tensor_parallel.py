"""Several ranks against one: the same logits, the same text; on one machine and as two nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import write_meta, write_tokenizer
from rank_worker import work
from tiny_models import random_weights

from checkpoint_converter import convert
from demo import world
from engine import engine as engine_module
from engine.config import ConfigError, EngineConfig
from engine.engine import Engine
from engine.parallel import Launch, Ranks
from llama2 import ModelArgs

PROJECT = Path(__file__).resolve().parent.parent
SIZES = {
    "multi-head": dict(dim=64, n_layers=2, n_heads=8),
    "grouped queries, fewer KV heads than ranks": dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=2),
    "one KV head, odd vocabulary": dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=101),
    "tied, vocabulary in uneven blocks": dict(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=97, tie_embeddings=True
    ),
}
SKILLS = list(world.SKILLS)
QUESTIONS = 60  # as many as tests/test_demo_model.py asks


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    checkpoints = {}
    for number, (name, size) in enumerate(SIZES.items()):
        args = ModelArgs(multiple_of=32, **{"vocab_size": 96, **size})
        params = {key: value for key, value in size.items() if key not in ("vocab_size", "tie_embeddings")}
        params |= {"multiple_of": 32, "norm_eps": args.norm_eps, "vocab_size": args.vocab_size}
        source = write_meta(folder / f"meta{number}", random_weights(args, seed=number), params, tokenizer)
        checkpoints[name] = str(convert(source, folder / f"dcp{number}", progress=False))
    demo = convert(PROJECT / "demo" / "model", folder / "demo", progress=False)
    return {"checkpoints": checkpoints, "demo": str(demo), "skills": SKILLS, "count": QUESTIONS, "folder": str(folder)}


@pytest.fixture(scope="module")
def alone(job: dict) -> dict:
    return work(job, Launch())


def torchrun(job: dict, *nodes: list[str]) -> dict:
    """Run the job with one torchrun for each node's flags, and give what rank 0 saved."""
    folder = Path(job["folder"])
    (folder / "job.json").write_text(json.dumps(job))
    result = folder / "result.pt"
    result.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    worker = str(PROJECT / "tests" / "rank_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            [*command, *flags, worker, str(folder / "job.json"), str(result)],
            env=environment,
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags in nodes
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            end(process)
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return torch.load(result)


def end(process: subprocess.Popen) -> None:
    """Kill a torchrun with its ranks, which would wait for one another without end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check(alone: dict, several: dict) -> None:
    for name, expected in alone["logits"].items():
        difference = (several["logits"][name] - expected).abs().max().item()
        assert difference <= 1e-4, f"{name}: {difference}"
        assert expected.std() > 0.3, f"{name}: logits that are all alike would prove nothing"
    assert several["answers"] == alone["answers"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_on_one_machine_give_the_logits_and_the_text_of_one(job: dict, alone: dict, ranks: int) -> None:
    assert len(alone["answers"]) == (QUESTIONS * len(SKILLS))
    check(alone, torchrun(job, ["--standalone", f"--nproc-per-node={ranks}"]))


def test_two_nodes_of_one_rank_each_give_the_logits_and_the_text_of_one(job: dict, alone: dict) -> None:
    port = free_port()
    node = [f"--master-port={port}", "--master-addr=127.0.0.1", "--nnodes=2", "--nproc-per-node=1"]
    check(alone, torchrun(job, [*node, "--node-rank=0"], [*node, "--node-rank=1"]))


def two_machines(first: Path, second: Path) -> list[tuple[int, str, str]]:
    """generate.py's status and words on two ranks, each with a checkpoint of its own."""
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    flags = ["--prompt", "a", "--max-new-tokens", "3", "--max-seq-len", "64", "--quiet", "--ignore-eos"]
    processes = [
        subprocess.Popen(
            [sys.executable, "generate.py", "--checkpoint", str(folder), *flags],
            env={**os.environ, **shared, "RANK": str(rank)},
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate((first, second))
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            end(process)
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def test_machines_with_other_weights_are_refused_and_with_other_defaults_are_not(job: dict, tmp_path: Path) -> None:
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, multiple_of=32, vocab_size=96)
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": args.norm_eps, "vocab_size": 96}
    folders = {}
    for name, seed, longest in (("ours", 0, 512), ("again", 0, 1024), ("theirs", 1, 512)):
        source = write_meta(
            tmp_path / f"meta-{name}", random_weights(args, seed), params, Path(job["folder"]) / "tokenizer.model"
        )
        folders[name] = convert(source, tmp_path / name, max_seq_len=longest, progress=False)
    (status, text, _), (other, _, _) = two_machines(folders["ours"], folders["again"])
    assert (status, other) == (0, 0) and text
    for status, text, error in two_machines(folders["ours"], folders["theirs"]):
        assert (status, text) == (1, "") and "the files of weights on rank(s) [1] differ from rank 0's" in error


def test_ranks_with_other_limits_do_not_agree(job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(Ranks, "agree", lambda self, what, settings: said.append((what, settings)))
    folder = Path(job["checkpoints"]["multi-head"])
    for tokens in (64, 64, 32):
        Engine.load(folder, EngineConfig(max_seq_len=64, max_tokens_per_step=tokens, threads=1))
    assert said[2:4] == said[:2] and said[4] != said[0] and said[5] == said[1]


def test_one_rank_of_each_machine_reads_every_byte(job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[bool] = []

    def opened(folder: Path, verify: bool) -> None:
        reads.append(verify)
        raise ConfigError("that is all")

    monkeypatch.setattr(engine_module, "open_checkpoint", opened)
    for rank in range(4):
        with pytest.raises(ConfigError, match="that is all"):
            Engine.load(Path(job["demo"]), EngineConfig(), Launch(rank, 4, rank % 2, 2))
    assert reads == [True, False, True, False]


def test_a_number_of_ranks_that_cannot_work_is_refused_with_those_that_can(job: dict) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    flags = ["--checkpoint", job["demo"], "--prompt", "x"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "generate.py"]
    ended = subprocess.run(
        [*command, *flags], env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("generate.py: error:")]
    assert len(said) == 1, ended.stderr
    assert re.search(r"over 3 ranks does not fit .* sizes that work: 1, 2, 4", said[0])
