"""python -m tools.check: what is the same is said to be, and what differs is named."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from checkpoints import PARAMS, hf_config, hf_tensors, random_tensors, write_hf, write_meta, write_tokenizer
from torch import Tensor

from formats.conversion import convert
from formats.vocabulary import read_vocabulary
from llama2 import ModelArgs
from tools import check
from tools.check import main

ARGS = ModelArgs(**PARAMS, n_kv_heads=2, vocab_size=96)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(ARGS)


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], tokenizer: Path) -> Path:
    params = {**PARAMS, "n_kv_heads": 2, "vocab_size": 96}
    return write_meta(tmp_path_factory.mktemp("meta") / "m", tensors, params, tokenizer, count=2)


def other(folder: Path, tensors: dict[str, Tensor], tokenizer: Path, args: ModelArgs = ARGS) -> str:
    return str(write_hf(folder / "hf", hf_tensors(tensors, args), hf_config(args), tokenizer))


def test_two_formats_of_one_model_are_the_same(
    meta: Path, tensors: dict, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(meta), other(tmp_path, tensors, tokenizer), "--tokens", "8"]) == 0
    said = capsys.readouterr().out
    assert f"tensors: {len(tensors)} of {len(tensors)} equal to the bit" in said
    assert "greedy text: 5 of 5 equal" in said and said.endswith("the same\n") and "NOT" not in said


def test_one_number_that_changed_is_found_and_its_tensor_named(
    meta: Path, tensors: dict, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["layers.1.feed_forward.w2.weight"][3, 5] += 0.01
    path = other(tmp_path, changed, tokenizer)
    assert main([str(meta), path, "--tensors-only"]) == 1
    said = capsys.readouterr().out
    assert "layers.1.feed_forward.w2.weight: differs by up to 0.01 " in said
    assert said.count("differs") == 1 and said.endswith("NOT the same\n")
    assert main([str(meta), path, "--tensors-only", "--tolerance", "0.5"]) == 0


def test_rounding_to_another_dtype_is_allowed_and_more_is_not(
    meta: Path, tensors: dict, tokenizer: Path, tmp_path: Path
) -> None:
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    assert main([str(meta), other(tmp_path / "a", rounded, tokenizer), "--tokens", "4"]) == 0
    coarse = {name: tensor.to(torch.float8_e4m3fn).to(torch.bfloat16) for name, tensor in tensors.items()}
    assert main([str(meta), other(tmp_path / "b", coarse, tokenizer), "--tensors-only"]) == 1
    broken = {name: tensor.clone() for name, tensor in rounded.items()}
    broken["norm.weight"][0] = float("nan")
    assert main([str(meta), other(tmp_path / "c", broken, tokenizer), "--tensors-only"]) == 1


def test_what_was_unpacked_differs_by_rounding_only(meta: Path, tmp_path: Path) -> None:
    """A quantized GGUF's matrices are read as float32, and stored in 16 bits."""
    packed, unpacked = str(tmp_path / "q8.gguf"), str(tmp_path / "dcp")
    convert(meta, packed, type="q8_0", progress=False)
    convert(packed, unpacked, progress=False)
    assert main([packed, unpacked, "--tokens", "4"]) == 0
    assert main([packed, unpacked, "--tensors-only", "--tolerance", "0"]) == 1


def test_another_setting_or_vocabulary_is_another_model(
    meta: Path, tensors: dict, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = dataclasses.replace(ARGS, rope_theta=20000.0)
    assert main([str(meta), other(tmp_path / "a", tensors, tokenizer, args)]) == 1
    assert "settings: rope_theta is 10000.0 in A, 20000.0 in B" in capsys.readouterr().out
    smaller = write_tokenizer(tmp_path / "tokenizer.model", 90)
    assert main([str(meta), other(tmp_path / "b", tensors, smaller), "--tensors-only"]) == 1
    assert "different tokens" in capsys.readouterr().out


def test_what_cannot_be_read_is_an_error_of_one_line(
    meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(meta), str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("check: error: ") and said.count("\n") == 1 and "no such file or folder" in said


def test_tokens_that_are_cut_another_way_are_another_model(
    meta: Path, tensors: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = read_vocabulary(meta / "tokenizer.model")
    other_way = dataclasses.replace(vocabulary, add_space_prefix=False, originals={})
    (tmp_path / "tokenizer.model").write_bytes(other_way.sentencepiece())
    assert main([str(meta), other(tmp_path, tensors, tmp_path / "tokenizer.model"), "--tokens", "0"]) == 1
    assert "5 of 5 prompts are cut into others, such as 'Once upon a time'" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [(b"\xff", "is not UTF-8 text"), (b"\n", "holds no prompt")])
def test_prompts_that_cannot_be_asked_are_no_difference(
    meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    assert main([str(meta), str(meta), "--prompts", str(tmp_path / "prompts")]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(meta), str(meta), "--tokens", "-5"])
    assert ended.value.code == 2


def test_a_signal_ends_it_however_busy_a_file_keeps_python(monkeypatch: pytest.MonkeyPatch, meta: Path) -> None:
    before, found = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(check, "compare", lambda *_: found.append(signal.getsignal(signal.SIGINT)) or True)
    assert main([str(meta), str(meta)]) == 0
    assert found == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is before
