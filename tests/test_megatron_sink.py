"""Writing Megatron's ranks: bit by bit what its own rules give them, or a refusal that says what would fit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, write_tokenizer
from megatron_checks import GROUPED, MHA, RANK, SIZES, TIED, assert_reads, load
from megatron_layout import logits, write_ranks
from tiny_models import model_of, random_weights
from torch import Tensor

from formats import FormatError
from formats.megatron import MegatronSource
from formats.megatron_sink import MegatronSink
from formats.output import HashedFile
from formats.source import Source
from llama2 import ModelArgs, RopeScaling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


class TensorSource(Source):
    """A model in memory, which counts how often each tensor is read."""

    name, title, needs = "memory", "memory", "nothing"

    def __init__(self, args: ModelArgs, tensors: dict[str, Tensor], tokenizer: Path | None) -> None:
        self.args, self.tensors, self.tokenizer_path = args, tensors, tokenizer
        self.dtype, self.files, self.reads = next(iter(tensors.values())).dtype, [], []
        self.context_length = 2048

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return False

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]

    def close(self) -> None:
        pass


def write(folder: Path, source: Source, *settings: Any, **options: Any) -> MegatronSink:
    folder.mkdir()
    sink, told = MegatronSink(source, *settings, **options), []
    entries = sink.write(folder, told.append)
    assert sum(told) == sink.tensor_bytes()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= sink.size_bound()
    assert all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    return sink


@pytest.mark.parametrize("layout", ["core", "local", "legacy"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("args", [MHA, GROUPED, TIED], ids=["multi-head", "grouped", "tied"])
def test_the_ranks_hold_what_megatrons_rules_give_them_bit_by_bit(tmp_path, tokenizer, args, ranks, stages, layout):
    tensors = random_tensors(args)
    options = {"tensor_parallel": ranks, "pipeline_parallel": stages, "layout": layout}
    write(tmp_path / "ours", TensorSource(args, tensors, tokenizer), **options)
    write_ranks(tmp_path / "theirs", tensors, args, ranks, stages, layout=layout)
    theirs = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.*"))
    ours = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.*"))
    assert ours == sorted([*theirs, Path("tokenizer.model")])
    for path in theirs:
        if path.name == "latest_checkpointed_iteration.txt":
            assert (tmp_path / "ours" / path).read_text() == (tmp_path / "theirs" / path).read_text() == "release"
            continue
        made, wanted = load(tmp_path / "ours" / path), load(tmp_path / "theirs" / path)
        assert_same(made["model"], wanted["model"])
        assert (made["checkpoint_version"], made["iteration"]) == (3.0, 0)
        for name, value in vars(wanted["args"]).items():
            assert getattr(made["args"], name) == value, name
    assert_reads(tmp_path / "ours", args, tensors)


def assert_same(made: dict[str, Any], wanted: dict[str, Any], path: str = "") -> None:
    assert made.keys() == wanted.keys(), path
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_same(made[name], value, f"{path}{name}/")
        else:
            assert made[name].dtype == value.dtype and torch.equal(made[name], value), f"{path}{name}"


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("args", [MHA, GROUPED, TIED], ids=["multi-head", "grouped", "tied"])
def test_megatrons_arithmetic_on_the_ranks_gives_the_models_logits(tmp_path, tokenizer, args, ranks, stages):
    weights, tokens = random_weights(args), [1, 5, 90, 17, 3, 44]
    source = TensorSource(args, weights, tokenizer)
    write(tmp_path / "out", source, tensor_parallel=ranks, pipeline_parallel=stages)
    files = [
        [
            load(
                tmp_path / "out/release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")) / RANK[19:]
            )
            for rank in range(ranks)
        ]
        for stage in range(stages)
    ]
    theirs = logits(files, tokens)[:, : args.vocab_size]
    assert torch.allclose(theirs, our_logits(args, weights, tokens), atol=1e-4, rtol=1e-4)


def our_logits(args: ModelArgs, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """The model's own answer to a whole prompt, at every position."""

    class Alone:
        """Attention over one sequence, from its start."""

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            made = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
            )
            return made.transpose(0, 1)

    count = len(tokens)
    return model_of(args, weights)(torch.tensor(tokens), torch.arange(count), Alone(), torch.arange(count))


def test_each_tensor_is_read_once_and_in_the_order_of_the_layers(tmp_path, tokenizer):
    source = TensorSource(GROUPED, random_tensors(GROUPED), tokenizer)
    write(tmp_path / "out", source, tensor_parallel=4, pipeline_parallel=2)
    assert sorted(source.reads) == sorted(source.names)


def test_the_dtype_is_converted_and_numbers_that_float16_cannot_hold_are_refused(tmp_path, tokenizer):
    tensors = random_tensors(GROUPED)
    source = TensorSource(GROUPED, tensors, tokenizer)
    write(tmp_path / "out", source, torch.bfloat16, tensor_parallel=2)
    assert load(tmp_path / "out" / RANK)["args"].params_dtype == torch.bfloat16
    assert load(tmp_path / "out" / RANK)["args"].bf16 is True
    assert_reads(tmp_path / "out", GROUPED, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    tensors["layers.1.attention.wv.weight"][3, 3] = 1e6
    with pytest.raises(FormatError, match=r"layers\.1\.attention\.wv\.weight has numbers that float16 cannot hold"):
        write(tmp_path / "half", source, torch.float16)


def test_more_ranks_than_groups_are_written_in_even_pieces_for_megatron_core(tmp_path, tokenizer):
    args = ModelArgs(**SIZES, n_kv_heads=2)
    source = TensorSource(args, random_tensors(args), tokenizer)
    write(tmp_path / "out", source, tensor_parallel=4)
    write_ranks(tmp_path / "theirs", random_tensors(args), args, 4)
    for rank in range(4):
        name = f"release/mp_rank_{rank:02d}/model_optim_rng.pt"
        assert_same(load(tmp_path / "out" / name)["model"], load(tmp_path / "theirs" / name)["model"])
    with pytest.raises(FormatError, match="can be split over 1, 2$"):
        MegatronSink(source, tensor_parallel=4, layout="legacy")


def test_settings_of_rope_are_written(tmp_path, tokenizer):
    args = ModelArgs(**SIZES, rope_theta=500000.0, rope_scaling=RopeScaling(factor=32.0))
    write(tmp_path / "out", TensorSource(args, random_tensors(args), tokenizer))
    given = load(tmp_path / "out" / RANK)["args"]
    assert (given.rotary_base, given.use_rope_scaling, given.rope_scaling_factor) == (500000, True, 32.0)
    assert type(given.rotary_base) is int
    with MegatronSource(tmp_path / "out") as source:
        assert (source.args.rope_theta, source.args.rope_scaling) == (args.rope_theta, args.rope_scaling)


# From Megatron's load_args_from_checkpoint and its converters' check_for_arg, as of 2026.
TAKEN_FROM_CHECKPOINTS = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention
    kv_channels max_position_embeddings position_embedding_type add_position_embedding use_rotary_position_embeddings
    rotary_base rotary_percent rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
    untie_embeddings_and_output_weights apply_layernorm_1p normalization apply_query_key_layer_scaling attention_dropout
    hidden_dropout padded_vocab_size ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
    expert_model_parallel_size tokenizer_type iteration bert_binary_head params_dtype fp16 bf16 sequence_parallel
    make_vocab_size_divisible_by
"""


def test_every_argument_that_megatron_takes_from_a_checkpoint_is_there(tmp_path, tokenizer):
    write(tmp_path / "out", TensorSource(GROUPED, random_tensors(GROUPED), tokenizer), tensor_parallel=2)
    given = vars(load(tmp_path / "out" / RANK)["args"])
    for name in TAKEN_FROM_CHECKPOINTS.split():
        assert given[name] is not None, name
    assert given["padded_vocab_size"] == 256
    assert given["tokenizer_type"] == "Llama2Tokenizer"


@pytest.mark.parametrize(
    ("args", "options", "complaint"),
    [
        (
            GROUPED,
            {"tensor_parallel": 3},
            "in 4 groups and a feed-forward width of 96 can be split over 1, 2, 4",
        ),
        (GROUPED, {"tensor_parallel": 8}, "--tensor_parallel is 8"),
        (MHA, {"tensor_parallel": 24}, "can be split over 1, 2, 3, 4, 6, 12"),
        (
            ModelArgs(**(SIZES | {"ffn_hidden_dim": 90})),
            {"tensor_parallel": 4},
            "a feed-forward width of 90 can be split over 1, 2, 3, 6",
        ),
        (MHA, {"pipeline_parallel": -1}, "--pipeline_parallel is -1; 2 layers can be split over 1, 2"),
        (MHA, {"pipeline_parallel": 3}, "--pipeline_parallel is 3; 2 layers can be split over 1, 2"),
        (ModelArgs(**SIZES, rope_theta=5e5), {"layout": "legacy"}, "rotates with base 10000 and no scaling"),
        (ModelArgs(**SIZES, rope_scaling=RopeScaling()), {"layout": "legacy"}, "and scaling: use --layout core"),
        (
            ModelArgs(**SIZES, rope_scaling=RopeScaling(original_max_seq_len=4096)),
            {},
            "Megatron knows no RoPE scaling but Llama 3.1's",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_with_those_that_do(args, options, complaint, tokenizer):
    with pytest.raises(FormatError) as caught:
        MegatronSink(TensorSource(args, random_tensors(args), tokenizer), **options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_the_layout_is_one_of_three(tokenizer):
    source = TensorSource(MHA, random_tensors(MHA), tokenizer)
    with pytest.raises(FormatError, match="'new' is no layout; allowed: core, local, legacy"):
        MegatronSink(source, layout="new")
    settings = MegatronSink(source, tensor_parallel=2).settings
    assert settings == {"tensor_parallel": 2, "pipeline_parallel": 1, "layout": "core"}


@pytest.mark.parametrize("room", [0, 100, 5000, 100_000, 200_000])
def test_a_full_disk_is_told_as_such(tmp_path, tokenizer, monkeypatch, room):
    """And ends nothing but the conversion: PyTorch's writer would like to complete its archive even then."""
    left, write_block = room, HashedFile._write

    def full(file: HashedFile, view: memoryview) -> None:
        nonlocal left
        left -= len(view)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_block(file, view)

    monkeypatch.setattr(HashedFile, "_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "out", TensorSource(GROUPED, random_tensors(GROUPED), tokenizer), tensor_parallel=2)
