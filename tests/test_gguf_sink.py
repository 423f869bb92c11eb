"""Writing GGUF, against the quantizers and the reader of the package of llama.cpp's authors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import random_tensors, write_tokenizer
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from gguf_files import ARGS, llama_cpp_tensors, llama_cpps_factors
from tiny_models import limits, model_of, random_weights
from torch import Tensor

from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from formats.gguf import GGUFSink, GGUFSource
from formats.gguf_blocks import WRITABLE, stored_blocks
from formats.gguf_model import gguf_name
from formats.source import FormatError, Source
from formats.vocabulary import TokenType, Vocabulary
from llama2 import ModelArgs, RopeScaling

F32, F16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
LEGACY = [kind for name, kind in WRITABLE.items() if name.startswith("q")]

VOCABULARY = Vocabulary(
    kind="sentencepiece",
    tokens=("<unk>", "<s>", "</s>", "▁", "a", "▁a"),
    types=tuple(map(TokenType, (2, 3, 3, 1, 1, 1))),
    scores=(0.0, 0.0, 0.0, -1.0, -2.0, -0.5),
    bos_id=1,
    eos_id=2,
    unk_id=0,
    stop_ids=(2,),
)


class Held(Source):
    """A model in memory."""

    name = title = needs = "held"
    files: list[Path] = []
    tokenizer_path = None

    def __init__(self, args: ModelArgs = ARGS, dtype: torch.dtype = torch.float32) -> None:
        self.args, self.dtype, self.tensors = args, dtype, random_tensors(args, dtype)

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return False

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def vocabulary(self) -> Vocabulary:
        return VOCABULARY

    def close(self) -> None:
        pass


def write(source: Source, folder: Path, **settings: Any) -> tuple[gguf.GGUFReader, GGUFSink]:
    """The written file in the package's reader, and the sink."""
    sink, told = GGUFSink(source, **settings), []
    hashed = sink.write(folder, told.append)
    assert sum(told) == sink.tensor_bytes()
    assert sink.size_bound() == hashed["model.gguf"]["size"] == (folder / "model.gguf").stat().st_size
    return gguf.GGUFReader(folder / "model.gguf"), sink


@pytest.mark.parametrize("name", WRITABLE)
def test_every_kind_is_written_as_the_reference_writes_it(tmp_path, name):
    source = Held(dataclasses.replace(ARGS, vocab_size=1101), torch.bfloat16)
    reader, sink = write(source, tmp_path, type=name.upper())
    kind, expected = WRITABLE[name], llama_cpp_tensors(source.tensors, source.args)
    assert {each.name for each in reader.tensors} == set(expected)
    for each in reader.tensors:
        array = expected[each.name]
        own = kind if array.ndim > 1 else F32
        assert each.tensor_type == own and tuple(each.shape) == array.shape[::-1]
        assert each.data.tobytes() == quantize(array, own).tobytes(), each.name
    file_type = LlamaFileType.ALL_F32 if name == "f32" else LlamaFileType[f"MOSTLY_{name.upper()}"]
    assert reader.fields["general.file_type"].contents() == file_type
    assert sink.stored_as == name and sink.settings == {"type": name}
    with GGUFSource(tmp_path / "model.gguf") as read:
        assert read.args == dataclasses.replace(source.args, max_seq_len=4096)
        for canonical, values in source.tensors.items():
            theirs = reader.get_tensor(next(n for n, e in enumerate(reader.tensors) if e.name == gguf_name(canonical)))
            assert torch.equal(read.read(canonical).float(), torch.tensor(dequantize(theirs.data, theirs.tensor_type)))
            if name in ("f32", "bf16"):
                assert torch.equal(read.read(canonical).float(), values.float())


def test_metadata_have_the_keys_and_types_that_llama_cpp_asks_for(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 256)
    args = dataclasses.replace(ARGS, head_dim=64, rope_scaling=scaling, rope_theta=500000, norm_eps=1e-6)
    reader, _ = write(Held(args), tmp_path)
    found = {key: (each.contents(), each.types[-1].name) for key, each in reader.fields.items()}
    expected = {
        "general.architecture": ("llama", "STRING"),
        "general.type": ("model", "STRING"),
        "general.quantization_version": (2, "UINT32"),
        "general.alignment": (32, "UINT32"),
        "llama.vocab_size": (40, "UINT32"),
        "llama.context_length": (131072, "UINT32"),
        "llama.embedding_length": (256, "UINT32"),
        "llama.block_count": (1, "UINT32"),
        "llama.feed_forward_length": (512, "UINT32"),
        "llama.attention.head_count": (8, "UINT32"),
        "llama.attention.head_count_kv": (2, "UINT32"),
        "llama.attention.key_length": (64, "UINT32"),
        "llama.attention.value_length": (64, "UINT32"),
        "llama.attention.layer_norm_rms_epsilon": (pytest.approx(1e-6), "FLOAT32"),
        "llama.rope.dimension_count": (64, "UINT32"),
        "llama.rope.freq_base": (500000.0, "FLOAT32"),
        "tokenizer.ggml.model": ("llama", "STRING"),
        "tokenizer.ggml.bos_token_id": (1, "UINT32"),
        "tokenizer.ggml.eos_token_id": (2, "UINT32"),
        "tokenizer.ggml.add_bos_token": (True, "BOOL"),
    }
    assert {key: found[key] for key in expected} == expected
    assert {key for key in found if key.startswith("llama.")} == {key for key in expected if key.startswith("llama.")}
    kinds = {"tokens": "STRING", "scores": "FLOAT32", "token_type": "INT32"}
    for key, kind in kinds.items():
        values, own = found[f"tokenizer.ggml.{key}"]
        assert own == kind and len(values) == args.vocab_size
        assert values[:6] == list(getattr(VOCABULARY, {"token_type": "types"}.get(key, key)))
    first = reader.get_tensor(0)
    assert first.name == "rope_freqs.weight" and first.tensor_type == F32
    np.testing.assert_allclose(first.data, llama_cpps_factors(args, scaling), rtol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"n_layers": 2}, {"n_kv_heads": 8, "head_dim": 64, "tie_embeddings": True}], ids=str
)
def test_transformers_reads_the_file_as_a_model_of_the_same_logits(tmp_path, changes):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = Held(dataclasses.replace(ARGS, rope_theta=20000.0, **changes))
    source.tensors = random_weights(source.args)
    write(source, tmp_path, type="f32")
    path, tokens = str(tmp_path / "model.gguf"), list(range(35))
    theirs = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    theirs.load_state_dict(
        load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"], strict=False
    )
    theirs.tie_weights()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    with GGUFSource(tmp_path / "model.gguf") as read:
        model = model_of(read.args, {name: read.read(name) for name in read.names})
    runner = Runner(model, limits(max_tokens_per_step=64), "cpu", 1)
    found = runner.run(StepPlan((Segment(0, 0, tuple(tokens), len(tokens)),)))
    assert (found - expected).abs().max() < 1e-3 < 0.3 < expected.std()


def test_the_tokenizer_inside_is_the_one_that_was_written_unless_another_is_named(tmp_path):
    write(Held(), tmp_path)
    named = write_tokenizer(tmp_path / "tokenizer.model")
    with GGUFSource(tmp_path / "model.gguf") as source:
        found = source.vocabulary()
        assert source.tokenizer_path is None and (found.tokens, found.bos_id) == (VOCABULARY.tokens, 1)
        assert str(tmp_path / "model.gguf") in found.origin
    with GGUFSource(tmp_path / "model.gguf", named) as source:
        assert source.tokenizer_path == named and len(source.vocabulary().tokens) == 96


def test_every_tensor_begins_at_a_multiple_of_the_alignment(tmp_path):
    args = ModelArgs(dim=36, n_layers=1, n_heads=3, vocab_size=7, ffn_hidden_dim=5)
    reader, _ = write(Held(args, torch.float16), tmp_path)
    assert all(each.data_offset % 32 == 0 for each in reader.tensors)
    for each, values in zip(reader.tensors, Held(args, torch.float16).tensors.values(), strict=True):
        assert np.array_equal(each.data.astype(np.float32), values.float().numpy())


def test_rows_that_are_no_whole_blocks_are_kept_in_half_precision_and_that_is_told(tmp_path):
    args = dataclasses.replace(ARGS, ffn_hidden_dim=520)
    reader, sink = write(Held(args), tmp_path, type="q8_0")
    kinds = {each.name: each.tensor_type for each in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == F16 and kinds["blk.0.ffn_up.weight"] == Q8_0
    assert sink.stored_as == "q8_0 (1 of 9 matrices in f16, since their rows are no whole blocks)"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16")])
def test_the_type_is_the_sources_dtype_or_the_given_one_unless_it_is_named(dtype, expected):
    dtype = getattr(torch, dtype)
    assert GGUFSink(Held(dtype=dtype)).settings == {"type": expected}
    assert GGUFSink(Held(), dtype).settings == {"type": expected}
    assert GGUFSink(Held(dtype=dtype), type="Q5_1").settings == {"type": "q5_1"}
    with pytest.raises(FormatError, match=f"type q8_0 and dtype {str(dtype)[6:]} are given; one of them decides"):
        GGUFSink(Held(), dtype, type="q8_0")


@pytest.mark.parametrize("name", ["q4_k", "Q4_K_M", "q6_K", "iq4_xs", "q", "", "f64", "q4_0_4_4"])
def test_types_that_cannot_be_made_are_refused_with_those_that_can(name):
    with pytest.raises(FormatError) as caught:
        GGUFSink(Held(), type=name)
    message = str(caught.value)
    assert repr(name) in message and "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1 can be written" in message
    assert ("llama-quantize" in message) == name.lower().startswith(("q4_k", "q6_k", "iq"))


@pytest.mark.parametrize(
    ("name", "number"), [("f16", 7e4), ("q8_0", 1e7), ("q4_0", 1e6), ("q4_1", -7e4), ("q5_1", 3e6)]
)
def test_numbers_that_a_type_cannot_hold_are_an_error_that_names_the_tensor(tmp_path, name, number):
    source = Held()
    # float16 has numbers that are none, and they are kept; blocks have none.
    for place, wrong in enumerate((number, math.nan) if name.startswith("q") else (number,)):
        source.tensors["output.weight"][3, 5] = wrong
        (tmp_path / str(place)).mkdir()
        with pytest.raises(FormatError, match=r"output.weight has numbers that \w+ cannot hold"):
            GGUFSink(source, type=name).write(tmp_path / str(place), lambda size: None)


def difficult() -> dict[str, Tensor]:
    """Rows in which a quantizer may round or choose otherwise."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 512, generator=generator)
    halves = torch.randint(-254, 255, (256, 32), generator=generator) / 2
    halves[:, 7] = 127  # so that the scale is 1
    near = torch.tensor([0.49999997, 0.5, 0.50000006, 1.4999999, 1.5, 2.4999998, 2.5, 63.499996, 126.49999, -0.0])
    edges = torch.zeros(2, 32)
    edges[0, :10], edges[1, :10], edges[:, 31] = near, -near, 127
    small = torch.randint(-3, 4, (256, 64), generator=generator).float()
    zeros = torch.zeros(4, 32)
    zeros[1], zeros[2, 9] = -0.0, -1.0
    return {
        "normal": normal,
        "bfloat16": normal.bfloat16(),
        "float16": (normal * 0.02).half(),
        "halves": halves,
        "edges": edges,
        "two extremes": small,
        "two extremes in bfloat16": (small / 7).bfloat16(),
        "zeros": zeros,
        "tiny": normal * 1e-9,
        "large": normal * 1e4,
    }


@pytest.mark.parametrize("kind", LEGACY, ids=lambda kind: kind.name)
@pytest.mark.parametrize("values", difficult().values(), ids=difficult())
def test_quantized_blocks_are_the_references_bit_by_bit(kind, values):
    made = b"".join(block.tobytes() for block in stored_blocks(values, kind, "a"))
    assert made == quantize(values.float().numpy(), kind).tobytes()


@pytest.mark.parametrize("kind", WRITABLE.values(), ids=WRITABLE)
def test_a_tensor_is_written_in_order_in_blocks_that_are_small_beside_it(kind):
    values = torch.randn(1500, 1024, generator=torch.Generator().manual_seed(2))
    blocks = list(stored_blocks(values, kind, "a"))
    assert len(blocks) == 24 and max(block.nbytes for block in blocks) <= 1 << 20
    assert b"".join(block.tobytes() for block in blocks) == quantize(values.numpy(), kind).tobytes()
