"""Sources: any layout gives the same canonical tensors, and a file that lies or breaks is named with its reason."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PARAMS, hf_config, hf_tensors, random_tensors, write_hf, write_meta, write_tokenizer

from formats import FormatError, open_source
from llama2 import ModelArgs, RopeScaling

ARGS = ModelArgs(**PARAMS, vocab_size=96)
GROUPED = ModelArgs(**PARAMS, vocab_size=96, n_kv_heads=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def params_of(args: ModelArgs, **changes: Any) -> dict[str, Any]:
    return PARAMS | {"vocab_size": -1, "n_kv_heads": args.n_kv_heads} | changes


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(FormatError) as caught:
        open_source(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_reads(folder: Path, tensors: dict[str, torch.Tensor], args: ModelArgs) -> None:
    with open_source(folder) as source:
        assert source.names == list(tensors)
        assert source.args.tensor_shapes() == args.tensor_shapes()
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor), name


# Meta


@pytest.mark.parametrize("embedding_dimension", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_metas_shards_of_any_number_give_the_whole_tensors(tmp_path, tokenizer, count, embedding_dimension):
    tensors = random_tensors(ARGS)
    write_meta(tmp_path, tensors, params_of(ARGS), tokenizer, count, embedding_dimension=embedding_dimension)
    assert_reads(tmp_path, tensors, ARGS)
    with open_source(tmp_path) as source:
        assert (source.shards, source.dtype) == (count, torch.float32)


def test_a_vocabulary_size_in_params_is_used_and_must_fit_the_embedding(tmp_path, tokenizer):
    write_meta(tmp_path / "good", random_tensors(ARGS), params_of(ARGS, vocab_size=96), tokenizer, 2)
    assert open_source(tmp_path / "good").args.vocab_size == 96
    write_meta(tmp_path / "bad", random_tensors(ARGS), params_of(ARGS, vocab_size=97), tokenizer)
    assert "tok_embeddings.weight is 96x64, but params.json means 97x64" in refusal(tmp_path / "bad")


def test_a_checkpoint_without_an_output_layer_has_tied_embeddings(tmp_path, tokenizer):
    args = ModelArgs(**PARAMS, vocab_size=96, tie_embeddings=True)
    write_meta(tmp_path, random_tensors(args), params_of(args), tokenizer, 2)
    assert_reads(tmp_path, random_tensors(args), args)
    assert open_source(tmp_path).args.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"use_scaled_rope": False}, None),
        ({"use_scaled_rope": True}, RopeScaling(factor=8.0)),
        ({"use_scaled_rope": True, "rope_scaling_factor": 16.0}, RopeScaling(factor=16.0)),
    ],
)
def test_llama_3_1s_scaled_rope_is_understood(tmp_path, tokenizer, changes, expected):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS, rope_theta=500000.0, **changes), tokenizer)
    args = open_source(tmp_path).args
    assert (args.rope_theta, args.rope_scaling) == (500000.0, expected)


def test_llama_3_2s_small_models_stretch_rope_by_32_which_their_params_do_not_say(tmp_path, tokenizer):
    params = {"dim": 2048, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "ffn_hidden_dim": 8}
    args = ModelArgs(**params, vocab_size=96)
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in args.tensor_shapes().items()}
    published = params | {"multiple_of": 8, "ffn_dim_multiplier": 0.001, "use_scaled_rope": True}
    del published["ffn_hidden_dim"]
    write_meta(tmp_path, tensors, published, tokenizer)
    assert open_source(tmp_path).args.rope_scaling == RopeScaling(factor=32.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_kv_head": 2}, "unknown key 'n_kv_head'; did you mean 'n_kv_heads'?"),
        ({"quantization_args": {"scheme": "int4"}}, "unknown key 'quantization_args'"),
        ({"dim": None}, "'dim' is missing"),
        ({"dim": "64"}, "dim is '64'; it must be a whole number"),
        ({"n_heads": 7}, "dim is 64; it must be a multiple of n_heads (7)"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": 1e999}, "rope_theta is inf"),
        ({"use_scaled_rope": True, "rope_scaling_factor": "8"}, "rope_scaling.factor is '8'"),
        ({"n_layers": 3}, "tensor layers.2.attention.wq.weight is missing"),
        ({"n_layers": 10**9}, "1000000000 layers are too many"),
        ({"n_layers": 1}, "tensor 'layers.1.attention.wq.weight' does not belong to the model"),
        ({"multiple_of": 256}, "feed_forward.w1.weight is 192x64, but params.json means 256x64"),
    ],
)
def test_a_wrong_params_json_is_refused_by_key(tmp_path, tokenizer, changes, expected):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS, **changes), tokenizer)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nonsense", "[" * 100_000, '{"dim": "\\ud800'])
def test_broken_json_is_refused(tmp_path, tokenizer, text):
    write_meta(tmp_path / "meta", random_tensors(ARGS), {}, tokenizer)
    (tmp_path / "meta" / "params.json").write_text(text)
    assert "params.json: " in refusal(tmp_path / "meta")
    write_hf(tmp_path / "hf", hf_tensors(random_tensors(ARGS), ARGS), {}, tokenizer)
    (tmp_path / "hf" / "config.json").write_bytes(text.encode() or b"\xff")
    assert "config.json: " in refusal(tmp_path / "hf")


def test_a_gap_in_the_shards_is_refused(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer, 4)
    (tmp_path / "consolidated.02.pth").unlink()
    assert "consolidated.02.pth: missing, although consolidated.03.pth is there" in refusal(tmp_path)
    (tmp_path / "consolidated.x.pth").write_bytes(b"")
    assert "consolidated.x.pth: is no shard name" in refusal(tmp_path)


def test_a_missing_last_shard_is_refused(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer, 4)
    (tmp_path / "consolidated.03.pth").unlink()
    assert "(shard of 3)" in refusal(tmp_path) or "does not divide into 3 shards" in refusal(tmp_path)


def test_norms_that_differ_between_shards_are_refused(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer, 2)
    shard = torch.load(tmp_path / "consolidated.01.pth")
    shard["norm.weight"][3] += 1
    torch.save(shard, tmp_path / "consolidated.01.pth")
    with open_source(tmp_path) as source, pytest.raises(FormatError, match="01.pth: norm.weight differs from"):
        source.read("norm.weight")


def test_metas_checklist_is_verified(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer)
    sums = [
        f"{hashlib.md5((tmp_path / n).read_bytes()).hexdigest()}  {n}" for n in ("consolidated.00.pth", "params.json")
    ]
    (tmp_path / "checklist.chk").write_text("\n".join(sums) + "\n")
    open_source(tmp_path).close()
    (tmp_path / "checklist.chk").write_text(sums[0].replace(sums[0][0], "0" if sums[0][0] != "0" else "1", 1))
    assert "consolidated.00.pth: the content does not match checklist.chk" in refusal(tmp_path)
    open_source(tmp_path, verify=False).close()
    (tmp_path / "checklist.chk").write_text(f"{'0' * 32}  consolidated.01.pth")
    assert "consolidated.01.pth: missing, although checklist.chk lists it" in refusal(tmp_path)
    (tmp_path / "checklist.chk").write_text(f"{'0' * 32}  ../../etc/passwd")
    assert "checklist.chk: line 1 is no MD5 and file name" in refusal(tmp_path)


def test_a_flipped_bit_is_found_by_the_archives_own_checksum(tmp_path, tokenizer):
    tensors = random_tensors(ARGS)
    write_meta(tmp_path, tensors, params_of(ARGS), tokenizer, 2)
    path = tmp_path / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    middle = content.find(tensors["layers.1.ffn_norm.weight"].numpy().tobytes())
    content[middle + 5] ^= 1
    path.write_bytes(content)
    assert "consolidated.01.pth: record" in refusal(tmp_path)
    open_source(tmp_path, verify=False).close()


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def quantized() -> torch.Tensor:
    with pytest.warns(UserWarning):
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: {"a": Calls(os.system, "touch ran")}, "asks for posix.system, which is code"),
        (lambda: {"a": Calls(eval, "1")}, "eval, which is code"),
        (lambda: torch.nn.Linear(1, 1), "Linear, which is code"),
        (lambda: [torch.ones(1)], "holds a list, not values by name"),
        (lambda: {"model": {"a": torch.ones(1)}}, "'model' holds a nested dict"),
        (lambda: {"step": 5}, "'step' is a int, not a plain tensor"),
        (lambda: {3: torch.ones(1)}, "the key 3 is no tensor name"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "'a' is sparse"),
        (lambda: {"a": quantized()}, "'a' is quantized"),
        (lambda: {"a": torch.ones(2, dtype=torch.complex64)}, "'a' is complex64"),
        (lambda: {"a": torch.ones(2, dtype=torch.int8)}, "'a' is int8"),
        (lambda: {"a": torch.ones(2, device="meta")}, "'a' has no data"),
        (lambda: {"a": torch.ones(1).expand(1000, 1000)}, "'a' is an expanded or overlapping view"),
        (lambda: {"a": torch.ones(9).as_strided((4, 4), (1, 1))}, "'a' is an expanded or overlapping view"),
    ],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(tmp_path, tokenizer, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer)
    torch.save(content(), tmp_path / "consolidated.00.pth")
    assert expected in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_parameters_views_and_ordered_dicts_are_plain_enough(tmp_path, tokenizer):
    tensors = random_tensors(ARGS)
    write_meta(tmp_path, tensors, params_of(ARGS), tokenizer)
    odd = collections.OrderedDict(tensors)
    odd["norm.weight"] = torch.nn.Parameter(tensors["norm.weight"])
    odd["output.weight"] = tensors["output.weight"].t().contiguous().t()
    torch.save(odd, tmp_path / "consolidated.00.pth")
    assert_reads(tmp_path, tensors, ARGS)


def rewrite(path: Path, edit: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Repack a .pth with its records changed and their checksums right."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, edit(name, content))


def test_a_pickle_that_claims_more_than_its_records_hold_is_refused(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer)
    rewrite(tmp_path / "consolidated.00.pth", lambda name, b: b[: len(b) // 2] if name.endswith("data/0") else b)
    assert "its tensors claim" in refusal(tmp_path)


def test_a_compressed_archive_is_refused_because_it_cannot_be_mapped(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer)
    rewrite(tmp_path / "consolidated.00.pth", lambda name, b: b, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(tmp_path)


def test_damaged_and_foreign_pth_files_are_each_refused_with_the_reason(tmp_path, tokenizer):
    write_meta(tmp_path, random_tensors(ARGS), params_of(ARGS), tokenizer)
    path = tmp_path / "consolidated.00.pth"
    good = path.read_bytes()
    for content, expected in (
        (b"", "is empty"),
        (good[: len(good) // 2], "cut short or corrupt"),
        (b"<html>404</html>", "is no PyTorch checkpoint file"),
        (b"PK\x03\x04" + b"\0" * 100, "cut short or corrupt"),
    ):
        path.write_bytes(content)
        assert "consolidated.00.pth: " in refusal(tmp_path) and expected in refusal(tmp_path)
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert "old file format; re-save it" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert "is no regular file" in refusal(tmp_path)
    path.rmdir()
    assert "consolidated.00.pth is missing" in refusal(tmp_path)


# Hugging Face


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("args", [ARGS, GROUPED, ModelArgs(dim=48, n_layers=1, n_heads=2, head_dim=32, vocab_size=96)])
def test_transformers_layout_gives_metas_tensors(tmp_path, tokenizer, args, count):
    tensors = random_tensors(args)
    config = hf_config(args, head_dim=args.head_dim)
    write_hf(tmp_path, hf_tensors(tensors, args), config, tokenizer, count)
    assert_reads(tmp_path, tensors, args)


def test_both_layouts_of_one_model_are_the_same_model(tmp_path, tokenizer):
    tensors = random_tensors(GROUPED)
    write_meta(tmp_path / "meta", tensors, params_of(GROUPED), tokenizer, 2)
    write_hf(tmp_path / "hf", hf_tensors(tensors, GROUPED), hf_config(GROUPED), tokenizer)
    with open_source(tmp_path / "meta") as meta, open_source(tmp_path / "hf") as hf:
        assert all(torch.equal(meta.read(name), hf.read(name)) for name in meta.names)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling(factor=32.0)),
        ({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, RopeScaling(factor=32.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, None),
        ({"rope_scaling": None}, 1e4, None),
    ],
)
def test_rope_settings_are_understood_in_their_older_and_newer_form(tmp_path, tokenizer, changes, theta, scaling):
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS, **changes), tokenizer)
    args = open_source(tmp_path).args
    assert (args.rope_theta, args.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(("longest", "expected"), [(512, 512), (131072, 4096), (None, 2048)])
def test_the_default_context_is_the_models_but_bounded(tmp_path, tokenizer, longest, expected):
    config = hf_config(ARGS, max_position_embeddings=longest)
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), config, tokenizer)
    assert open_source(tmp_path).args.max_seq_len == expected


def test_a_tied_models_copy_of_the_embedding_is_ignored_but_an_untied_model_needs_its_output(tmp_path, tokenizer):
    untied = hf_tensors(random_tensors(ARGS), ARGS)
    write_hf(tmp_path / "other", untied, hf_config(ARGS, tie_word_embeddings=True), tokenizer)
    assert "ties lm_head.weight to the embedding, but they differ" in refusal(tmp_path / "other")
    copy = untied | {"lm_head.weight": untied["model.embed_tokens.weight"].clone()}
    write_hf(tmp_path / "copy", copy, hf_config(ARGS, tie_word_embeddings=True), tokenizer)
    with open_source(tmp_path / "copy") as source:
        assert source.args.tie_embeddings and "output.weight" not in source.names
    tied = {name: tensor for name, tensor in untied.items() if name != "lm_head.weight"}
    write_hf(tmp_path / "tied", tied, hf_config(ARGS, tie_word_embeddings=True), tokenizer)
    assert open_source(tmp_path / "tied").args.tie_embeddings
    write_hf(tmp_path / "none", tied, hf_config(ARGS), tokenizer)
    assert "tensor lm_head.weight is missing" in refusal(tmp_path / "none")


def test_two_settings_of_rope_must_mean_the_same(tmp_path, tokenizer):
    tensors, linear = hf_tensors(random_tensors(ARGS), ARGS), {"rope_type": "linear", "factor": 4.0}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    write_hf(tmp_path / "a", tensors, hf_config(ARGS, rope_parameters=plain, rope_scaling=linear), tokenizer)
    assert "of type 'linear'" in refusal(tmp_path / "a")
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write_hf(tmp_path / "b", tensors, hf_config(ARGS, rope_parameters=plain, rope_scaling=llama3), tokenizer)
    assert "rope_parameters and rope_scaling mean different things" in refusal(tmp_path / "b")
    both = {"rope_parameters": llama3 | {"rope_theta": 5e5}, "rope_scaling": llama3}
    write_hf(tmp_path / "c", tensors, hf_config(ARGS, **both), tokenizer)
    assert "rope_parameters and rope_scaling mean different things" in refusal(tmp_path / "c")  # 5e5, and 1e4
    write_hf(tmp_path / "d", tensors, hf_config(ARGS, **both, rope_theta=5e5), tokenizer)
    assert open_source(tmp_path / "d").args.rope_theta == 5e5
    write_hf(
        tmp_path / "e", tensors, hf_config(ARGS, rope_parameters=plain, rope_theta=5e5, rope_scaling={}), tokenizer
    )
    assert open_source(tmp_path / "e").args.rope_theta == 10000.0
    longer = {"rope_scaling": llama3, "original_max_position_embeddings": 512}
    write_hf(tmp_path / "f", tensors, hf_config(ARGS, **longer), tokenizer)
    assert "original_max_position_embeddings is 512, but 8192 in rope_scaling" in refusal(tmp_path / "f")


def test_a_folder_of_hugging_faces_may_hold_metas_settings_too(tmp_path, tokenizer):
    write_hf(tmp_path / "hf", hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS), tokenizer)
    (tmp_path / "hf" / "params.json").write_text("{}")
    assert open_source(tmp_path / "hf").title == "Hugging Face"


def test_old_rotary_buffers_are_ignored_and_other_extra_tensors_are_not(tmp_path, tokenizer):
    tensors = hf_tensors(random_tensors(ARGS), ARGS)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_hf(tmp_path / "buffer", tensors | buffer, hf_config(ARGS), tokenizer)
    assert_reads(tmp_path / "buffer", random_tensors(ARGS), ARGS)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    write_hf(tmp_path / "bias", tensors | bias, hf_config(ARGS), tokenizer)
    assert "q_proj.bias' does not belong" in refusal(tmp_path / "bias")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only false is supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only none"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks 'low_freq_factor'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; an object is needed"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": 6.4}, "dim is 6.4"),
        ({"max_position_embeddings": "long"}, "max_seq_len is 'long'"),
        ({"vocab_size": 95}, "model.embed_tokens.weight is 96x64, but config.json means 95x64"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers are too many"),
    ],
)
def test_a_config_that_means_another_model_is_refused_by_key(tmp_path, tokenizer, changes, expected):
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS, **changes), tokenizer)
    assert expected in refusal(tmp_path)


LONG = ("x" * 100_000, "\ud800" * 300)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a\\b", 7, *LONG])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, tokenizer, name):
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS), tokenizer, 2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no plain file name" in refusal(tmp_path)


def test_an_index_whose_files_are_missing_or_incomplete_is_refused(tmp_path, tokenizer):
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS), tokenizer, 2)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "away")
    assert "00002-of-00002.safetensors: missing, although" in refusal(tmp_path)
    index.write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    assert "is missing" in refusal(tmp_path)
    index.write_text("{}")
    assert "'weight_map' is missing" in refusal(tmp_path)
    index.unlink()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, " in refusal(tmp_path)


def safetensors_bytes(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 60) + b"{}",
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}, b"\0" * 8),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        safetensors_bytes({"a": {"dtype": "NO", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, tokenizer, content):
    write_hf(tmp_path, hf_tensors(random_tensors(ARGS), ARGS), hf_config(ARGS), tokenizer)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: no valid safetensors file" in refusal(tmp_path)


def test_safetensors_of_the_wrong_dtype_or_cut_short_are_refused(tmp_path, tokenizer):
    tensors = hf_tensors(random_tensors(ARGS), ARGS)
    write_hf(tmp_path, tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}, hf_config(ARGS), tokenizer)
    assert "model.norm.weight is I32; F32, BF16, F16 can be converted" in refusal(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "no valid safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_pytorchs_own_files_are_read_where_there_are_no_safetensors(tmp_path, tokenizer, count):
    tensors = random_tensors(GROUPED, torch.bfloat16)
    theirs = hf_tensors(tensors, GROUPED) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_hf(tmp_path, theirs, hf_config(GROUPED), tokenizer, count, suffix="bin")
    assert_reads(tmp_path, tensors, GROUPED)
    norm = tensors["norm.weight"].view(torch.uint8).numpy().tobytes()
    path = next(path for path in tmp_path.glob("*.bin") if norm in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.find(norm) + 5] ^= 1
    path.write_bytes(content)
    assert f"{path.name}: record" in refusal(tmp_path)
    torch.save({"model.norm.weight": Calls(os.system, "touch ran")}, path)
    assert "asks for posix.system, which is code" in refusal(tmp_path)


def test_a_folder_of_gguf_files_with_a_config_is_not_taken_for_hugging_faces(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "config.json" not in refusal(tmp_path) and "model.gguf" in refusal(tmp_path)


# Any


def test_the_prevailing_dtype_is_reported(tmp_path, tokenizer):
    tensors = random_tensors(ARGS, torch.bfloat16)
    tensors["norm.weight"] = tensors["norm.weight"].float()
    write_meta(tmp_path, tensors, params_of(ARGS), tokenizer)
    source = open_source(tmp_path)
    assert (source.dtype, source.mixed_dtypes) == (torch.bfloat16, True)


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    said = refusal(tmp_path)
    assert "looked for: " in said
    assert "Meta (params.json and consolidated.00.pth); Hugging Face (config.json" in said


def test_the_tokenizer_is_the_given_one_or_the_nearest(tmp_path, tokenizer):
    folder = write_meta(tmp_path / "model", random_tensors(ARGS), params_of(ARGS), tokenizer)
    assert open_source(folder).tokenizer_path == folder / "tokenizer.model"
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert open_source(folder).tokenizer_path == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    assert open_source(folder).tokenizer_path is None
    assert open_source(folder, tokenizer_path=tokenizer).tokenizer_path == tokenizer
    assert "no such tokenizer file" in refusal(folder, tokenizer_path=tmp_path / "nowhere")
