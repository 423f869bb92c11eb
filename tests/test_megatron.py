"""Megatron's ranks: any number of them and any layout are read as one model, or refused by name and reason."""

from __future__ import annotations

import enum
import io
import pickle
import random
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_tensors, write_tokenizer
from megatron_checks import GROUPED, MHA, RANK, SIZES, TIED, WIDE_HEADS, Poison, assert_reads, read_all, refusal
from megatron_layout import rank_model, write_ranks

from formats.megatron import MegatronSource
from llama2 import ModelArgs, RopeScaling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a rank's file holds."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


# Reading ranks


@pytest.mark.parametrize("layout", ["core", "local", "legacy", "old"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_ranks_and_stages_of_every_layout_give_the_whole_tensors(tmp_path, ranks, stages, layout):
    args = MHA if ranks == 3 else GROUPED
    write_ranks(tmp_path, random_tensors(args), args, ranks, stages, layout=layout)
    assert_reads(tmp_path, args, random_tensors(args))
    assert MegatronSource(tmp_path).shards == ranks * stages


@pytest.mark.parametrize("layout", ["core", "legacy"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_tied_model_is_read_and_its_copy_on_the_last_stage_must_be_one(tmp_path, stages, layout):
    write_ranks(tmp_path, random_tensors(TIED), TIED, 2, stages, layout=layout)
    assert_reads(tmp_path, TIED, random_tensors(TIED))
    if stages == 2:
        path = tmp_path / "release/mp_rank_01_001/model_optim_rng.pt"

        def spoil(content: dict[str, Any]) -> None:
            model = content["model"]
            copy = model["word_embeddings_for_head"]["weight"] if layout == "legacy" else model["output_layer.weight"]
            copy[3, 5] += 1

        edit(path, spoil)
        said = refusal(tmp_path, read_all)
        assert f"{path}: the output layer differs from the embedding that it is tied to" in said


def test_more_ranks_than_groups_share_a_group_in_even_pieces(tmp_path):
    args = ModelArgs(**SIZES, n_kv_heads=2)
    write_ranks(tmp_path, random_tensors(args), args, 4)
    assert_reads(tmp_path, args, random_tensors(args))


def test_heads_need_not_add_up_to_the_models_width(tmp_path):
    write_ranks(tmp_path, random_tensors(WIDE_HEADS), WIDE_HEADS, 2)
    assert_reads(tmp_path, WIDE_HEADS, random_tensors(WIDE_HEADS))


def test_interleaved_rotation_is_metas_own_order(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, 2, how={"interleaved": True}, rotary_interleaved=True)
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED))


def test_stages_may_have_different_numbers_of_layers(tmp_path):
    args = ModelArgs(**(SIZES | {"n_layers": 5}), n_kv_heads=4)
    write_ranks(tmp_path, random_tensors(args), args, 2, 3, stages=[range(0, 1), range(1, 4), range(4, 5)])
    assert_reads(tmp_path, args, random_tensors(args))


def test_virtual_stages_are_taken_round_by_round(tmp_path):
    args = ModelArgs(**(SIZES | {"n_layers": 4}), n_kv_heads=4)
    tensors = random_tensors(args)
    write_ranks(tmp_path, tensors, args, 2, 2)
    for stage in range(2):
        for rank in range(2):

            def split(content: dict[str, Any], stage: int = stage, rank: int = rank) -> None:
                del content["model"]
                for number in range(2):  # layers 0 and 2 are on the first stage, 1 and 3 on the second
                    layer = 2 * number + stage
                    content[f"model{number}"] = rank_model(tensors, args, rank, 2, range(layer, layer + 1))

            edit(tmp_path / f"release/mp_rank_{rank:02d}_{stage:03d}/model_optim_rng.pt", split)
    assert_reads(tmp_path, args, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_told(tmp_path, dtype):
    write_ranks(tmp_path, random_tensors(GROUPED, dtype), GROUPED, 2)
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED, dtype))
    with MegatronSource(tmp_path) as source:
        assert (source.dtype, source.mixed_dtypes) == (dtype, False)


def test_the_tracker_says_which_iteration_is_the_latest(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED, seed=1), GROUPED, iteration="iter_0000005")
    write_ranks(tmp_path, random_tensors(GROUPED, seed=2), GROUPED, iteration="iter_0000070")
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED, seed=2))
    assert_reads(tmp_path / "iter_0000005", GROUPED, random_tensors(GROUPED, seed=1))
    with MegatronSource(tmp_path) as source:
        assert [str(path.relative_to(tmp_path)) for path in source.files] == [
            "latest_checkpointed_iteration.txt",
            "iter_0000070/mp_rank_00/model_optim_rng.pt",
        ]


def test_a_folder_is_recognized_by_its_tracker_or_its_ranks(tmp_path):
    write_ranks(tmp_path / "run", random_tensors(GROUPED), GROUPED)
    (tmp_path / "empty").mkdir()
    assert MegatronSource.recognizes(tmp_path / "run")
    assert MegatronSource.recognizes(tmp_path / "run" / "release")
    assert not MegatronSource.recognizes(tmp_path / "empty")
    assert not MegatronSource.recognizes(tmp_path / "run" / RANK)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rotary_base": 500000}, {"rope_theta": 500000}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, {"rope_scaling": RopeScaling(factor=32.0)}),
        ({"use_rope_scaling": True}, {"rope_scaling": RopeScaling()}),
        ({"rope_scaling_factor": 32.0}, {"rope_scaling": None}),
        ({"max_position_embeddings": 131072}, {"max_seq_len": 4096}),
        ({"norm_epsilon": None, "layernorm_epsilon": 1e-6}, {"norm_eps": 1e-6}),
        ({"position_embedding_type": None, "use_rotary_position_embeddings": True}, {}),
        ({"num_experts": None, "add_bias_linear": None, "kv_channels": 4}, {}),
    ],
)
def test_the_architecture_follows_from_the_arguments(tmp_path, changes, expected):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, **changes)
    with MegatronSource(tmp_path) as source:
        for name, value in expected.items():
            assert getattr(source.args, name) == value
        assert source.context_length == changes.get("max_position_embeddings", 2048)


@pytest.mark.parametrize(
    ("changes", "with_tokenizer", "rows"),
    [
        ({"vocab_size": 96}, False, 96),
        ({"vocab_size": 90}, True, 90),
        ({"vocab_size": None}, True, 96),
        ({"vocab_size": None}, False, 256),
        ({"vocab_size": 95, "tokenizer_type": "NullTokenizer"}, False, 256),
        ({"vocab_size": None, "make_vocab_size_divisible_by": 64}, True, 256),  # 96 would have been padded to 128
    ],
)
def test_padding_of_the_vocabulary_is_cut_off_where_it_is_known(tmp_path, tokenizer, changes, with_tokenizer, rows):
    tensors = random_tensors(GROUPED)
    write_ranks(tmp_path, tensors, GROUPED, 2, **changes)
    if with_tokenizer:
        shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    with MegatronSource(tmp_path) as source:
        assert source.args.vocab_size == rows
        for name in ("tok_embeddings.weight", "output.weight"):
            assert source.read(name).shape == (rows, GROUPED.dim)
            assert torch.equal(source.read(name)[:90], tensors[name][:90])


# What real runs save beside the weights


@pytest.fixture
def megatrons_enums(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of Megatron's that its arguments name, while it is there."""
    module = types.ModuleType("megatron.core.enums")
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.ModelType = enum.Enum("ModelType", ["encoder_or_decoder"], module=module.__name__)
    return module


def test_what_a_run_saves_beside_its_weights_is_left_out_and_makes_no_object(tmp_path, megatrons_enums, monkeypatch):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, model_type=megatrons_enums.ModelType.encoder_or_decoder)

    def add(content: dict[str, Any]) -> None:
        content["args"].backend = Poison(getattr, megatrons_enums.ModelType, "encoder_or_decoder")
        content["args"].state = types.SimpleNamespace(step=1)
        content["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ]
        content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(7)}}, "param_groups": [{"lr": 1e-4}]}
        content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"scales")
        content["model"]["decoder.layers.1.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        content["model"]["rotary_pos_emb.inv_freq"] = torch.ones(2)

    edit(tmp_path / RANK, add)
    raw = zipfile.ZipFile(tmp_path / RANK).read("model_optim_rng/data.pkl")
    assert b"megatron.core.enums" in raw and b"BytesIO" in raw and b"_reconstruct" in raw  # they are really there
    monkeypatch.delitem(sys.modules, "megatron.core.enums")
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED))


@pytest.mark.parametrize("place", ["args", "model", "optimizer", "top"])
@pytest.mark.parametrize(
    ("function", "named"), [(eval, "eval"), (shutil.rmtree, "shutil.rmtree"), (pickle.loads, "pickle.loads")]
)
def test_a_pickle_that_calls_anything_is_refused_by_name_and_nothing_is_called(tmp_path, place, function, named):
    write_ranks(tmp_path / "run", random_tensors(GROUPED), GROUPED)
    victim = tmp_path / "victim"
    victim.mkdir()
    given = {eval: f"__import__('os').rmdir({str(victim)!r})", shutil.rmtree: str(victim), pickle.loads: b"."}
    poison = Poison(function, given[function])

    def put(content: dict[str, Any]) -> None:
        if place == "args":
            content["args"].hook = poison
        elif place == "model":
            content["model"]["decoder.layers.0._extra_state"] = poison
        else:
            content["optimizer" if place == "optimizer" else "hook"] = poison

    edit(tmp_path / "run" / RANK, put)
    said = refusal(tmp_path / "run")
    assert f"{tmp_path / 'run' / RANK}: the pickle asks for {named}, which no weights need; refused" in said
    assert "torch.save them anew" in said
    assert victim.is_dir()


def test_what_takes_the_place_of_megatrons_objects_cannot_be_called_for_anything(tmp_path, megatrons_enums):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    victim = tmp_path / "victim"
    victim.mkdir()
    # getattr is among what is left out; what it would return is a nothing, and calling that is refused.
    remove = f"cbuiltins\ngetattr\n(cmegatron.core\nos\nVrmdir\ntRp0\n(V{victim}\ntR."
    with zipfile.ZipFile(tmp_path / RANK) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records["model_optim_rng/data.pkl"] = b"\x80\x02" + remove.encode()
    with zipfile.ZipFile(tmp_path / RANK, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert str(tmp_path / RANK) in refusal(tmp_path)
    assert victim.is_dir()


# Refusals


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"swiglu": False}, "args.swiglu is False; only True can be converted"),
        ({"normalization": "LayerNorm"}, "args.normalization is 'LayerNorm'; only 'RMSNorm' can be converted"),
        ({"position_embedding_type": "learned_absolute"}, "args.position_embedding_type is 'learned_absolute'"),
        ({"add_bias_linear": True}, "args.add_bias_linear is True; only False can be converted"),
        ({"add_qkv_bias": True}, "args.add_qkv_bias is True"),
        ({"qk_layernorm": True}, "args.qk_layernorm is True"),
        ({"apply_layernorm_1p": True}, "args.apply_layernorm_1p is True"),
        ({"num_experts": 8}, "args.num_experts is 8"),
        ({"multi_latent_attention": True}, "args.multi_latent_attention is True"),
        ({"rotary_percent": 0.5}, "args.rotary_percent is 0.5; only 1.0 can be converted"),
        ({"rotary_seq_len_interpolation_factor": 4}, "args.rotary_seq_len_interpolation_factor is 4"),
        ({"window_size": [128, 0]}, "args.window_size is [128, 0]; only None can be converted"),
        ({"hidden_size": None}, "args.hidden_size is missing"),
        ({"hidden_size": "48"}, "args.hidden_size is '48'; it must be a whole number"),
        ({"hidden_size": torch.ones(3)}, "args.hidden_size is Tensor; it must be a whole number"),
        ({"num_layers": 10**12}, "layers are too many"),
        ({"num_layers": 3}, "args.num_layers is 3, but 2 are stored"),
        ({"num_query_groups": 5}, "n_heads is 12; it must be a multiple of n_kv_heads (5)"),
        ({"num_query_groups": 2}, "qkv of layer 0 is 80x48, but the arguments mean 64x48"),
        ({"kv_channels": 8}, "qkv of layer 0 is 80x48, but the arguments mean 160x48"),
        ({"ffn_hidden_size": 100}, "fc1 of layer 0 is 192x48, but the arguments mean 200x48"),
        ({"norm_epsilon": float("inf")}, "norm_eps is inf"),
        ({"rotary_base": "big"}, "rope_theta is 'big'"),
        ({"use_rope_scaling": 1}, "args.use_rope_scaling is 1; it must be True or False"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 0.0}, "rope_scaling.factor is 0.0"),
        ({"vocab_size": 300}, "args.vocab_size is 300, but the embedding has 128 rows"),
        ({"tensor_model_parallel_size": 2}, "args.tensor_model_parallel_size is 2, but there are 1 such ranks"),
        ({"pipeline_model_parallel_size": 2}, "args.pipeline_model_parallel_size is 2, but there are 1 such ranks"),
        ({"untie_embeddings_and_output_weights": "no"}, "args.untie_embeddings_and_output_weights is 'no'"),
    ],
)
def test_arguments_of_another_model_are_refused(tmp_path, changes, complaint):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, **changes)
    said = refusal(tmp_path)
    assert said.startswith(str(tmp_path / RANK)) and complaint in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("args"), "'args' is None; Megatron's argparse.Namespace is needed"),
        (lambda c: c.update(args={"num_layers": 2}), "'args' is dict"),
        (lambda c: c.pop("model"), "'model' is missing"),
        (lambda c: c.update(model=[1]), "'model' is missing or is no dict"),
        (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version is 1.0; 2.0 or later is needed"),
        (lambda c: c.pop("checkpoint_version"), "checkpoint_version is 0"),
        (lambda c: c["model"].pop("embedding.word_embeddings.weight"), "the embedding is missing"),
        (lambda c: c["model"].pop("output_layer.weight"), "output is missing"),
        (lambda c: c["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"), "fc2 of layer 1 is missing"),
        (
            lambda c: c["model"].update({"decoder.layers.0.mlp.linear_fc1.bias": torch.ones(3)}),
            "parameter 'decoder.layers.0.mlp.linear_fc1.bias' does not belong to a Llama",
        ),
        (
            lambda c: c["model"].update({"decoder.layers.7.mlp.linear_fc2.weight": torch.ones(48, 96)}),
            "layer 2 of this stage is missing",
        ),
        (
            lambda c: c["model"].update({"decoder.layers.0.input_layernorm.weight": torch.ones(48)}),
            "decoder.layers.0.input_layernorm.weight is there twice",
        ),
        (lambda c: c["model"].update({"output_layer.weight": torch.ones(128, 7)}), "output is 128x7, but the"),
        (
            lambda c: c["model"].update({"output_layer.weight": torch.ones(128, 48, dtype=torch.int8)}),
            "'output_layer.weight' is int8",
        ),
        (lambda c: c["model"].update({"output_layer.weight": torch.ones(1, 1).expand(128, 48)}), "is an expanded"),
        (lambda c: c["model"].update({"output_layer.weight": None}), "'output_layer.weight' is a NoneType"),
        (lambda c: c["model"].update({5: torch.ones(3)}), "the key 5 is no parameter name"),
    ],
)
def test_a_rank_that_holds_something_else_is_refused(tmp_path, change, complaint):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    edit(tmp_path / RANK, change)
    said = refusal(tmp_path)
    assert said.startswith(str(tmp_path / RANK)) and complaint in said


def test_a_tied_model_has_no_output_layer_of_another_size(tmp_path):
    write_ranks(tmp_path, random_tensors(TIED), TIED)
    edit(tmp_path / RANK, lambda content: content["model"].update({"output_layer.weight": torch.ones(99, 48)}))
    assert "output is 99x48, but the arguments mean 128x48" in refusal(tmp_path)


def test_nesting_without_end_is_refused(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    deep: dict[str, Any] = {}
    deep["x"] = deep
    edit(tmp_path / RANK, lambda content: content["model"].update(deep=deep))
    assert "nested too deep" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["model"].pop("output_layer.weight"), "output_layer.weight is missing, although mp_rank_00 has it"),
        (
            lambda c: c["model"].update({"decoder.final_layernorm.bias": torch.ones(48)}),
            "decoder.final_layernorm.bias is not in mp_rank_00",
        ),
        (lambda c: setattr(c["args"], "rotary_base", 77), "args are of another model than mp_rank_00's"),
        (
            lambda c: c["model"].update({"output_layer.weight": torch.ones(96, 48)}),
            "output is 96x48, but the arguments mean 128x48 (shard of 2)",
        ),
        (
            lambda c: c["model"].update({"output_layer.weight": torch.ones(128, 48).half()}),
            "output is torch.float16, but torch.float32 elsewhere",
        ),
        (
            lambda c: c["model"]["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"].mul_(2),
            "ffn_norm of layer 1 differs from mp_rank_00's; every rank must hold the same",
        ),
        (lambda c: c["model"]["decoder.final_layernorm.weight"].mul_(2), "norm differs from mp_rank_00's"),
    ],
)
def test_ranks_that_do_not_belong_together_are_refused(tmp_path, change, complaint):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, 2)
    path = tmp_path / "release/mp_rank_01/model_optim_rng.pt"
    edit(path, change)
    said = refusal(tmp_path, read_all)
    assert said.startswith(str(path)) and complaint in said


@pytest.mark.parametrize(
    ("ranks", "stages", "removed", "complaint"),
    [
        (2, 1, "mp_rank_00", "mp_rank_00: missing, although there are 1 ranks of 2x1"),
        (4, 1, "mp_rank_02", "mp_rank_02: missing, although there are 3 ranks of 4x1"),
        (2, 2, "mp_rank_01_000", "mp_rank_01_000: missing, although there are 3 ranks of 2x2"),
        (2, 1, "mp_rank_01", "args.tensor_model_parallel_size is 2, but there are 1 such ranks"),
        (1, 2, "mp_rank_00_001", "args.pipeline_model_parallel_size is 2, but there are 1 such ranks"),
        (1, 1, "mp_rank_00/model_optim_rng.pt", "mp_rank_00/model_optim_rng.pt: No such file"),
    ],
)
def test_a_missing_rank_is_named(tmp_path, ranks, stages, removed, complaint):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, ranks, stages)
    path = tmp_path / "release" / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert complaint in refusal(tmp_path)


def test_folders_that_are_no_ranks_are_refused(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    (tmp_path / "release/mp_rank_00_000_001").mkdir()
    assert "mp_rank_00_000_001: is no rank's folder" in refusal(tmp_path)
    (tmp_path / "release/mp_rank_00_000_001").rename(tmp_path / "release/mp_rank_00_001")
    assert "some ranks' folders name a pipeline stage and some do not" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "says ''; an iteration's number or 'release' is needed"),
        ("../../etc", "says '../../etc'"),
        ("-1", "says '-1'"),
        ("7", "iter_0000007: missing, although latest_checkpointed_iteration.txt names it"),
    ],
)
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path, text, complaint):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert complaint in refusal(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    whole = (tmp_path / RANK).read_bytes()
    (tmp_path / RANK).write_bytes(whole[: len(whole) // 2])
    assert f"{tmp_path / RANK}: the archive's directory is unreadable" in refusal(tmp_path)


def test_a_flipped_bit_is_found_by_the_checksums(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED, 2)
    path = tmp_path / "release/mp_rank_01/model_optim_rng.pt"
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("model_optim_rng/data/3").header_offset
    content = bytearray(path.read_bytes())
    content[place + 200] ^= 1
    path.write_bytes(content)
    assert "does not match its checksum" in refusal(tmp_path, MegatronSource.verify)


def test_tensors_that_claim_more_than_their_records_hold_are_refused(tmp_path):
    write_ranks(tmp_path, random_tensors(GROUPED), GROUPED)
    with zipfile.ZipFile(tmp_path / RANK) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    last = max((name for name in records if "/data/" in name), key=lambda name: int(name.rpartition("/")[2]))
    records[last] = records[last][:-4]
    with zipfile.ZipFile(tmp_path / RANK, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert "bytes, its records hold" in refusal(tmp_path)


def test_formats_that_are_not_read_are_named_with_advice(tmp_path):
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert "neither mp_rank_00 nor common.pt is there" in refusal(tmp_path)
    (tmp_path / "iter_0000003" / ".metadata").write_bytes(b"x")
    assert "torch_dcp or fsdp_dtensor" in refusal(tmp_path)
