"""Reading GGUF, against files of the package of llama.cpp's authors and what it makes of them."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import random_tensors, write_tokenizer
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from gguf_files import ARGS, llama_cpp_tensors, llama_cpps_factors, refusal, text, write_gguf
from torch import Tensor

from formats.gguf import GGUFSource
from formats.gguf_blocks import READABLE
from formats.gguf_model import GGUF_NAMES, gguf_name, rope_factors, rope_scaling
from formats.source import FormatError
from llama2 import ModelArgs, RopeScaling

F32, Q4_0, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "Q4_0", "Q8_0"))
UINT32, FLOAT32, STRING, BOOL = (GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING", "BOOL"))


def arrays(args: ModelArgs = ARGS) -> dict[str, np.ndarray]:
    return llama_cpp_tensors(random_tensors(args), args)


def bits(values: Tensor) -> Tensor:
    """For comparisons in which what is no number equals itself, and zeros have signs."""
    return values.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_kind_of_blocks_is_read_as_the_reference_reads_it(tmp_path, kind):
    expected = write_gguf(tmp_path / "a.gguf", arrays(), kind=kind)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert len(expected) == len(source.names) == 12
        for name in source.names:
            assert torch.equal(bits(source.read(name).float()), bits(expected[gguf_name(name)])), name
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        assert source.dtype == plain.get(kind.name, torch.float16) and not source.mixed_dtypes
        assert source.read("output.weight").dtype == plain.get(kind.name, torch.float32)


def test_every_kind_that_the_reference_reads_is_read() -> None:
    def readable(kind: GGMLQuantizationType) -> bool:
        try:
            dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    # NVFP4 has further scales, in tensors of their own.
    assert set(READABLE) == {kind for kind in GGMLQuantizationType if readable(kind)} - {GGMLQuantizationType.NVFP4}


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 8}, {"n_kv_heads": 1, "n_layers": 3}, {"head_dim": 64}, {"tie_embeddings": True}],
    ids=str,
)
def test_a_model_that_came_from_transformers_by_llama_cpps_way_is_the_canonical_one(tmp_path, changes):
    args = dataclasses.replace(ARGS, **changes)
    tensors = random_tensors(args)
    width = {f"llama.attention.{each}_length": (args.head_dim, UINT32) for each in ("key", "value")}
    write_gguf(tmp_path / "a.gguf", llama_cpp_tensors(tensors, args), args, fields=width)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.args == dataclasses.replace(args, max_seq_len=4096) and source.context_length == 1 << 17
        assert source.names == list(tensors)
        for name, expected in tensors.items():
            assert torch.equal(source.read(name), expected), name


def test_names_are_those_of_the_packages_map_of_llama() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for ours, theirs in GGUF_NAMES.items():
        assert gguf_name(ours.format(11)) == theirs.format(11)
        assert names.get_name(ours.format(11), try_suffixes=(".weight",)) == theirs.format(11)


def test_a_tensor_larger_than_one_block_of_rows_is_whole(tmp_path):
    args = dataclasses.replace(ARGS, vocab_size=1101)
    expected = write_gguf(tmp_path / "a.gguf", arrays(args), args, Q4_0)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert torch.equal(source.read("tok_embeddings.weight"), expected["token_embd.weight"])


def test_settings_are_the_shortest_numbers_that_their_float32_can_mean(tmp_path):
    args = dataclasses.replace(ARGS, norm_eps=1e-5, rope_theta=12345.678)
    write_gguf(tmp_path / "a.gguf", arrays(args), args)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert (source.args.norm_eps, source.args.rope_theta) == (1e-5, 12345.678)


def test_settings_that_have_defaults_may_be_absent(tmp_path):
    gone = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "context_length")
    args = dataclasses.replace(ARGS, n_kv_heads=8)
    write_gguf(tmp_path / "a.gguf", arrays(args), args, fields={f"llama.{key}": None for key in gone})
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.args == dataclasses.replace(args, rope_theta=10000.0, max_seq_len=2048)
        assert source.context_length is None


def test_a_value_for_every_layer_is_read_if_it_is_the_same(tmp_path):
    args = dataclasses.replace(ARGS, n_layers=2)
    fields = {"llama.attention.head_count_kv": ([2, 2], GGUFValueType.ARRAY)}
    write_gguf(tmp_path / "a.gguf", arrays(args), args, fields=fields)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.args.n_kv_heads == 2


def test_matrices_of_several_dtypes_are_mixed_and_the_prevailing_one_is_reported(tmp_path):
    write_gguf(tmp_path / "a.gguf", arrays(), kind=Q8_0, kinds={"output.weight": F32})
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.dtype == torch.float16 and source.mixed_dtypes


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_followed(tmp_path, alignment):
    expected = write_gguf(tmp_path / "a.gguf", arrays(), alignment=alignment)
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert all(torch.equal(source.read(name), expected[gguf_name(name)]) for name in source.names)


def test_without_a_tokenizer_inside_the_one_beside_is_taken(tmp_path):
    write_gguf(tmp_path / "a.gguf", arrays())
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.tokenizer_path is None and source.vocabulary() is None
    beside = write_tokenizer(tmp_path / "tokenizer.model")
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.tokenizer_path == beside and len(source.vocabulary().tokens) == 96


def test_version_2_is_read(tmp_path):
    expected = write_gguf(tmp_path / "a.gguf", arrays())
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert torch.equal(source.read("output.weight"), expected["output.weight"])


def test_a_file_that_is_cut_short_while_it_is_read_is_no_crash(tmp_path):
    for kind in (F32, Q8_0):
        write_gguf(tmp_path / "a.gguf", arrays(), kind=kind)
        with GGUFSource(tmp_path / "a.gguf") as source:
            with open(tmp_path / "a.gguf", "r+b") as file:
                file.truncate(20000)
            with pytest.raises(FormatError, match=r"a\.gguf: was cut short while output.weight was read"):
                source.read("output.weight")


def test_a_folder_with_one_file_is_that_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", arrays())
    assert GGUFSource.recognizes(tmp_path) and GGUFSource.recognizes(tmp_path / "a.gguf")
    with GGUFSource(tmp_path) as source:
        assert source.files == [tmp_path / "a.gguf"]
    write_gguf(tmp_path / "b.gguf", arrays())
    assert "2 models are there; name one of them: a.gguf, b.gguf" in refusal(tmp_path)
    with GGUFSource(tmp_path / "b.gguf") as source:
        assert source.files == [tmp_path / "b.gguf"]


def test_folders_without_a_gguf_file_are_not_taken_for_one(tmp_path):
    (tmp_path / "a.txt").touch()
    assert not GGUFSource.recognizes(tmp_path) and not GGUFSource.recognizes(tmp_path / "a.txt")
    assert "no .gguf file" in refusal(tmp_path)


def parts(folder: Path) -> list[Path]:
    write_gguf(folder / "a.gguf", arrays(), split_max_tensors=5)
    return sorted(folder.glob("*.gguf"))


def test_a_model_in_parts_is_read_from_its_folder_or_any_of_them(tmp_path):
    files, tensors = parts(tmp_path), random_tensors(ARGS)
    assert [file.name for file in files] == [f"a-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for given in (tmp_path, *files):
        with GGUFSource(given) as source:
            assert source.files == files
            assert all(torch.equal(source.read(name), tensors[name]) for name in source.names)


def test_parts_that_are_missing_swapped_or_on_their_own_are_refused(tmp_path):
    first, second, third = parts(tmp_path)
    second.rename(tmp_path / "kept")
    with pytest.raises(FormatError, match=r"a-00002-of-00003\.gguf: missing, although it is one of 3 parts"):
        GGUFSource(tmp_path)
    second.write_bytes(third.read_bytes())
    with pytest.raises(FormatError, match=r"00002-of.*should be part 1 of 3 \(counted from 0\), but says 2 of 3"):
        GGUFSource(tmp_path)
    first.rename(tmp_path / "b.gguf")
    assert "should be part 0 of 1 (counted from 0), but says 0 of 3" in refusal(tmp_path / "b.gguf")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    splits = ("split.no", "split.count")
    for number, name in enumerate(("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")):
        numbers = dict(zip(splits, ((number, GGUFValueType.UINT16), (2, GGUFValueType.UINT16)), strict=True))
        write_gguf(tmp_path / name, arrays(), fields=numbers)
    with pytest.raises(FormatError, match=r"00002\.gguf: 'token_embd.weight' is in a-00001-of-00002\.gguf too"):
        GGUFSource(tmp_path)


LLAMA_3 = ModelArgs(dim=4096, n_layers=1, n_heads=32, vocab_size=8, rope_theta=500000.0)
SMALL = dataclasses.replace(LLAMA_3, head_dim=64)
CODE = dataclasses.replace(LLAMA_3, rope_theta=1e6)


SCALINGS = [
    *((args, RopeScaling(factor)) for args in (LLAMA_3, SMALL, CODE) for factor in (8.0, 32.0, 2.5)),
    *((args, RopeScaling(4.0, 1.0, 4.0, original)) for args in (LLAMA_3, SMALL) for original in (256, 4096, 16384)),
]


@pytest.mark.parametrize(("args", "scaling"), SCALINGS, ids=str)
def test_stretched_rope_is_recovered_from_llama_cpps_factors(args, scaling):
    factors = llama_cpps_factors(args, scaling)
    assert rope_scaling(Path("a"), factors, args) == scaling
    torch.testing.assert_close(
        rope_factors(dataclasses.replace(args, rope_scaling=scaling)), factors, rtol=1e-6, atol=0
    )


def test_too_few_frequencies_to_tell_the_context_still_give_the_same_ones() -> None:
    tiny = dataclasses.replace(LLAMA_3, head_dim=8)
    for original in (64, 300, 100_000):
        factors = llama_cpps_factors(tiny, RopeScaling(8.0, 1.0, 4.0, original))
        found = rope_scaling(Path("a"), factors, tiny)
        torch.testing.assert_close(
            rope_factors(dataclasses.replace(tiny, rope_scaling=found)), factors, rtol=1e-5, atol=0
        )


def test_factors_of_one_do_not_stretch() -> None:
    assert rope_scaling(Path("a"), torch.ones(64), LLAMA_3) is None


@pytest.mark.parametrize(
    "factors",
    [
        torch.full((64,), 2.0),
        torch.linspace(1, 8, 64),
        llama_cpps_factors(LLAMA_3, RopeScaling(8.0, 1.0, 8.0)),
        llama_cpps_factors(LLAMA_3, RopeScaling(8.0)).index_fill(0, torch.tensor([40]), 7.99),
        llama_cpps_factors(LLAMA_3, RopeScaling(8.0)).flip(0),
        torch.full((64,), math.nan),
        torch.full((64,), math.inf),
        torch.zeros(64),
        torch.full((64,), 0.5),
        -torch.ones(64),
    ],
    ids=lambda factors: f"{factors[0]:g} to {factors[-1]:g}",
)
def test_factors_of_another_kind_are_refused(factors):
    with pytest.raises(FormatError, match="a: rope_freqs.weight"):
        rope_scaling(Path("a"), factors, LLAMA_3)


def test_a_files_factors_stretch_its_model(tmp_path):
    factors = llama_cpps_factors(ARGS, RopeScaling(16.0, 1.0, 4.0, 4096)).numpy()
    write_gguf(tmp_path / "a.gguf", arrays() | {"rope_freqs.weight": factors})
    with GGUFSource(tmp_path / "a.gguf") as source:
        assert source.args.rope_scaling == RopeScaling(16.0, 1.0, 4.0, 4096)
        assert "rope_freqs.weight" not in map(gguf_name, source.names)
    write_gguf(tmp_path / "a.gguf", arrays() | {"rope_freqs.weight": factors[:-1]})
    assert "rope_freqs.weight is 15, but the metadata mean 16" in refusal(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"general.architecture": ("qwen2", STRING)}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"general.architecture": None}, "general.architecture is None"),
        ({"general.type": ("adapter", STRING)}, "general.type is 'adapter'; only 'model'"),
        ({"llama.expert_count": (8, UINT32)}, "llama.expert_count is 8; only 0 is supported"),
        ({"llama.rope.scaling.type": ("yarn", STRING)}, "llama.rope.scaling.type is 'yarn'; only 'none' or 'linear'"),
        ({"llama.rope.scaling.factor": (4.0, FLOAT32)}, "llama.rope.scaling.factor is 4.0; only 0.0 or 1.0"),
        ({"llama.rope.scale_linear": (2.0, FLOAT32)}, "llama.rope.scale_linear is 2.0"),
        ({"llama.rope.dimension_count": (16, UINT32)}, "dimension_count is 16; only the head's width (32)"),
        ({"llama.attention.value_length": (16, UINT32)}, "value_length is 16; only the head's width (32)"),
        ({"llama.attention.causal": (False, BOOL)}, "llama.attention.causal is False; only True"),
        ({"llama.attention.sliding_window": (4096, UINT32)}, "sliding_window is 4096; only 0"),
        ({"llama.tensor_data_layout": ("other", STRING)}, "tensor_data_layout is 'other'; only 'Meta AI original pth'"),
        ({"llama.logit_scale": (2.0, FLOAT32)}, "unknown key 'llama.logit_scale'; it may change the model"),
        ({"llama.attention.head_count_kv": ([2, 4], GGUFValueType.ARRAY)}, "head_count_kv differs from layer to layer"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.block_count": (1 << 31, UINT32)}, "2147483648 layers are too many"),
        ({"llama.block_count": ("two", STRING)}, "llama.block_count is 'two'; a number is needed"),
        ({"llama.block_count": (1.5, FLOAT32)}, "n_layers is 1.5; it must be a whole number"),
        ({"llama.context_length": ("long" * 10000, STRING)}, "llama.context_length is 'longlong"),
        ({"llama.context_length": (131072.0, FLOAT32)}, "llama.context_length is 131072.0; a whole number is needed"),
        ({"llama.attention.head_count": (0, UINT32)}, "n_heads is 0"),
        ({"llama.context_length": (0, UINT32)}, "max_seq_len is 0"),
        ({"llama.rope.freq_base": (math.nan, FLOAT32)}, "rope_theta is nan"),
        ({"llama.block_count": (2, UINT32)}, "tensor blk.1.attn_q.weight is missing"),
        ({"llama.feed_forward_length": (256, UINT32)}, "blk.0.ffn_gate.weight is 512x256, but the metadata mean 256"),
        ({"llama.vocab_size": (41, UINT32)}, "token_embd.weight is 40x256, but the metadata mean 41x256"),
    ],
    ids=str,
)
def test_a_model_that_is_not_ours_is_refused_by_key(tmp_path, fields, expected):
    write_gguf(tmp_path / "a.gguf", arrays(), fields=fields)
    assert expected in refusal(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"blk.0.attn_q.bias": np.zeros(256)}, "'blk.0.attn_q.bias' does not belong to the model of the metadata (bia"),
        ({"blk.1.attn_q.weight": np.zeros((256, 256))}, "'blk.1.attn_q.weight' does not belong to the model"),
        ({"blk.0.ffn_gate_exps.weight": np.zeros((2, 2, 32))}, "'blk.0.ffn_gate_exps.weight' does not belong"),
        ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
        ({"token_embd.weight": np.zeros(256)}, "token_embd.weight is 256, but the metadata mean 256x256"),
        ({"output_norm.weight": None}, "tensor output_norm.weight is missing"),
        ({"output.weight": np.zeros((41, 256))}, "output.weight is 41x256, but the metadata mean 40x256"),
    ],
    ids=str,
)
def test_tensors_of_another_model_are_refused_by_name(tmp_path, changes, expected):
    tensors = {name: array for name, array in (arrays() | changes).items() if array is not None}
    write_gguf(tmp_path / "a.gguf", tensors)
    assert expected in refusal(tmp_path / "a.gguf")


def test_a_kind_of_numbers_that_cannot_be_read_is_refused_with_those_that_can(tmp_path):
    write_gguf(tmp_path / "a.gguf", arrays())
    data = (tmp_path / "a.gguf").read_bytes()
    at = data.index(text("output_norm.weight")) + len(text("output_norm.weight")) + 12
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<I", GGMLQuantizationType.I32) + data[at + 4 :])
    assert "output_norm.weight is I32; F32, F16, BF16, Q8_0" in refusal(tmp_path / "a.gguf")
