"""The demo model's held-out questions through the engine, and faults planted to see that they would show."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_worker import demo_answers

import llama2
from checkpoint_converter import convert
from demo import world
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.sequence import SamplingParams
from generate import LLM, Request

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
STORIES = MODEL.parent / "tasks" / "stories.jsonl"
CONFIG = EngineConfig(dtype="float32", max_batch_size=16, max_seq_len=768)
CHUNKED = dataclasses.replace(CONFIG, max_tokens_per_step=16)  # so that prompts take several steps
QUESTIONS = 60
FEW = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(MODEL, tmp_path_factory.mktemp("demo") / "dcp", progress=False)


def scores(llm: LLM, count: int) -> dict[str, float]:
    """Each skill's share of exact answers."""
    answers = iter(demo_answers(llm, list(world.SKILLS), count))
    result = {}
    for skill in world.SKILLS:
        right = [next(answers) == question.answer.strip() for question in world.questions(skill, count)]
        result[skill] = sum(right) / count
    return result


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def test_held_out_questions_are_answered_exactly(checkpoint: Path, record_property: Callable) -> None:
    got = scores(LLM(checkpoint, CONFIG), QUESTIONS)
    table = ", ".join(f"{skill} {100 * share:.0f}%" for skill, share in got.items())
    print(f"mean {100 * mean(got):.1f}%: {table}")
    assert mean(got) >= 0.98, table
    assert min(got.values()) >= 0.9, table


def perplexity(llm: LLM) -> float:
    """Of held-out stories, per token."""
    texts = [json.loads(line)["text"] for line in STORIES.read_text().splitlines()]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scored = llm.generate([Request(prompt=text, params=params) for text in texts])
    logprobs = [each.logprob for completion in scored for each in completion.prompt_logprobs]
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> float:
    return perplexity(LLM(checkpoint, dataclasses.replace(CONFIG, kernels="torch")))


@pytest.mark.parametrize(
    ("choice", "least", "most"),
    [
        ({"kernels": "torch"}, 0.97, 1.0001),
        ({"dtype": "bfloat16"}, 0.97, 1.01),
        ({"quantization": "int8"}, 0.97, 1.01),
        ({"quantization": "int4"}, 0.9, 1.1),
        ({"quantization": "int4-128"}, 0.9, 1.1),
        ({"quantization": "fp8", "kernels": "torch"}, 0.97, 1.02),
    ],
)
def test_other_kernels_and_rounded_weights_answer_nearly_as_well(
    checkpoint: Path, exact: float, choice: dict[str, str], least: float, most: float
) -> None:
    llm = LLM(checkpoint, dataclasses.replace(CONFIG, **choice))
    got, ratio = mean(scores(llm, 2 * FEW)), perplexity(llm) / exact
    print(f"{choice}: {100 * got:.1f}%, perplexity {ratio:.4f} times that of float32 ({exact:.4f})")
    assert got >= least
    assert ratio <= most


def half_split_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)

    monkeypatch.setattr(llama2, "rotate", rotate)


def cache_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_singles = KVCache._attend_singles

    def next_slot(self: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_singles(self, q, k.roll(-1, 0), v.roll(-1, 0))

    monkeypatch.setattr(KVCache, "_attend_singles", next_slot)


def causal_mask_from_the_wrong_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = KVCache.begin

    def square(self: KVCache, segments: tuple, positions_N: torch.Tensor) -> None:
        begin(self, segments, positions_N)  # a chunk behind cached tokens sees as if it stood at the beginning
        self._chunks = [(slot, length, rows, None) for slot, length, rows, _ in self._chunks]

    monkeypatch.setattr(KVCache, "begin", square)


def wrong_query_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = KVCache.attend

    def tiled(self: KVCache, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        order = torch.arange(q.shape[1]).view(-1, k.shape[1]).t().flatten()
        out = torch.empty_like(q)
        out[:, order] = attend(self, layer, q[:, order], k, v)
        return out

    monkeypatch.setattr(KVCache, "attend", tiled)


@pytest.mark.parametrize(
    "fault", [half_split_rope, cache_off_by_one, causal_mask_from_the_wrong_corner, wrong_query_groups]
)
def test_a_fault_planted_in_the_engine_shows(
    checkpoint: Path, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    # Planted in PyTorch's path; both have the same oracles.
    got = mean(scores(LLM(checkpoint, dataclasses.replace(CHUNKED, kernels="torch")), FEW))
    print(f"{fault.__name__}: {100 * got:.1f}%")
    assert got < 0.5


def write_demo(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    """The demo model's folder with other weights."""
    folder.mkdir()
    for name in ("params.json", "tokenizer.model"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    return folder


def without_permutation(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Q and K as Hugging Face orders their rows, as if nobody had put them back."""

    def halves(weight: torch.Tensor) -> torch.Tensor:
        heads = weight.view(-1, 32, weight.shape[1])
        return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).reshape(weight.shape)

    return [{name: halves(w) if name.endswith(("wq.weight", "wk.weight")) else w for name, w in weights.items()}]


def shards_in_wrong_order(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Two shards as Meta cuts them, each under the other's number."""
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, weight in weights.items():
        columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        parts = [weight, weight] if weight.dim() == 1 else weight.chunk(2, 1 if columns else 0)
        for shard, part in zip(shards, reversed(parts), strict=True):
            shard[name] = part.clone()
    return shards


@pytest.mark.parametrize("fault", [without_permutation, shards_in_wrong_order])
def test_a_fault_planted_in_the_checkpoint_shows(tmp_path: Path, fault: Callable) -> None:
    weights = torch.load(MODEL / "consolidated.00.pth", weights_only=True)
    folder = convert(write_demo(tmp_path / "meta", fault(weights)), tmp_path / "dcp", progress=False)
    got = mean(scores(LLM(folder, CONFIG), FEW))
    print(f"{fault.__name__}: {100 * got:.1f}%")
    assert got < 0.5


def test_two_shards_in_the_right_order_lose_nothing(tmp_path: Path, checkpoint: Path) -> None:
    weights = torch.load(MODEL / "consolidated.00.pth", weights_only=True)
    shards = shards_in_wrong_order(weights)[::-1]
    folder = convert(write_demo(tmp_path / "meta", shards), tmp_path / "dcp", progress=False)
    assert scores(LLM(folder, CONFIG), FEW) == scores(LLM(checkpoint, CONFIG), FEW)
