"""Tiny models for Megatron's tests, and what they check again and again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import FormatError
from formats.megatron import MegatronSource
from llama2 import ModelArgs

SIZES = {"dim": 48, "n_layers": 2, "n_heads": 12, "ffn_hidden_dim": 96, "vocab_size": 96, "max_seq_len": 2048}
MHA = ModelArgs(**SIZES)
GROUPED = ModelArgs(**SIZES, n_kv_heads=4)
TIED = ModelArgs(**SIZES, n_kv_heads=4, tie_embeddings=True)
WIDE_HEADS = ModelArgs(**(SIZES | {"n_heads": 4, "head_dim": 16}), n_kv_heads=2)
MODELS = {"multi-head": MHA, "grouped": GROUPED, "tied": TIED, "wide heads": WIDE_HEADS}
RANK_FILE = "model_optim_rng.pt"
RANK = f"release/mp_rank_00/{RANK_FILE}"


def assert_reads(folder: Path, args: ModelArgs, tensors: dict[str, Tensor]) -> None:
    with MegatronSource(folder) as source:
        source.verify()
        assert source.args == args
        assert source.names == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor), name


def refusal(folder: Path, use: Callable[[MegatronSource], object] = lambda source: None) -> str:
    """What opening the checkpoint, or then using it, complains of."""
    with pytest.raises(FormatError) as caught, MegatronSource(folder) as source:
        use(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(source: MegatronSource) -> None:
    for name in source.names:
        source.read(name)


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


class Poison:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *given: object) -> None:
        self.call = function, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call
