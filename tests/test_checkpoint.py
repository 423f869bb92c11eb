"""A converted folder: checked by name and reason before use, and read by any number of ranks bit for bit."""

from __future__ import annotations

import copyreg
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import CHANGES_A_CLASS, PARAMS, random_tensors, write_hf, write_meta, write_tokenizer
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import formats.dcp
from checkpoint_converter import convert
from engine.checkpoint import CheckpointError, open_checkpoint, read_tensors
from llama2 import ModelArgs, Transformer, parallelize, tensor_parallel_mesh_shape

MANY = ModelArgs(**PARAMS, vocab_size=96)
GROUPED = ModelArgs(**PARAMS, vocab_size=96, n_kv_heads=2)
# A vocabulary that no number of ranks divides, as some have.
ODD = ModelArgs(**PARAMS, vocab_size=97, n_kv_heads=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[..., Path]:
    """Converts a random model, in so small blocks that every matrix has several."""
    made: dict[Any, Path] = {}

    def make(args: ModelArgs = GROUPED, shards: int = 1) -> Path:
        if (args, shards) not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            params = PARAMS | {"vocab_size": -1, "n_kv_heads": args.n_kv_heads}
            write_meta(folder / "meta", random_tensors(args), params, tokenizer, shards)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(formats.dcp, "SMALLEST_BLOCK", 1024)
                patch.setattr(formats.dcp, "LARGEST_FILE", 200_000)
                made[args, shards] = convert(folder / "meta", folder / "converted", progress=False)
        return made[args, shards]

    return make


@pytest.fixture
def folder(make: Callable[..., Path], tmp_path: Path) -> Path:
    """A converted folder that a test may spoil."""
    return Path(shutil.copytree(make(), tmp_path / "checkpoint"))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def restamp(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed, as whoever made a hostile folder would."""
    content = (folder / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(folder / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    """This process as one rank of several, whose collectives go nowhere: whoever needs one would hear nonsense."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_model(args: ModelArgs, size: int) -> Transformer:
    parts, replicas = tensor_parallel_mesh_shape(args, size)
    # DTensor remembers layouts by mesh, of which a process has one in earnest; so each of our ranks names its own.
    rank = dist.get_rank()
    tp = kv = init_device_mesh("cpu", (size,), mesh_dim_names=(f"tp{rank}",))
    if replicas > 1:
        kv = init_device_mesh("cpu", (parts, replicas), mesh_dim_names=(f"kv{rank}", f"replica{rank}"))[f"kv{rank}"]
    with torch.device("meta"):
        model = Transformer(args)
    parallelize(model, tp, kv)
    model.to_empty(device="cpu")
    return model


def share(name: str, whole: torch.Tensor, args: ModelArgs, rank: int, size: int) -> torch.Tensor:
    """What a rank should hold of a tensor, told from the plan in words rather than from DTensor."""
    if whole.dim() == 1:
        return whole
    if ".wk." in name or ".wv." in name:
        parts = min(size, args.n_kv_heads)
        return whole.chunk(parts, 0)[rank // (size // parts)]
    return whole.chunk(size, 1 if ".wo." in name or ".w2." in name else 0)[rank]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("args", [MANY, GROUPED], ids=["8 KV heads", "2 KV heads"])
def test_any_number_of_shards_loads_on_any_number_of_ranks_bit_for_bit(make, args, shards, ranks):
    checkpoint, whole = open_checkpoint(make(args, shards)), random_tensors(args)
    for rank in range(ranks):
        with rank_of(rank, ranks):
            parameters = dict(sharded_model(checkpoint.args, ranks).named_parameters())
            for parameter in parameters.values():
                torch.nn.init.constant_(parameter.to_local() if isinstance(parameter, DTensor) else parameter, -1)
            read_tensors(checkpoint, parameters)
            for name, parameter in parameters.items():
                held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                assert torch.equal(held, share(name, whole[name], args, rank, ranks)), (name, rank)


def test_a_vocabulary_that_the_ranks_do_not_divide_loads_too(make):
    checkpoint, whole = open_checkpoint(make(ODD)), random_tensors(ODD)
    for rank in range(4):
        with rank_of(rank, 4):
            parameters = dict(sharded_model(checkpoint.args, 4).named_parameters())
            read_tensors(checkpoint, parameters)
            for name in ("tok_embeddings.weight", "output.weight"):
                assert torch.equal(parameters[name].to_local(), whole[name].chunk(4, 0)[rank]), rank


def test_a_rank_reads_only_the_blocks_that_its_shards_touch(make, monkeypatch):
    checkpoint, read, sizes = open_checkpoint(make(MANY)), FileSystemReader.read_data, []

    def spy(self: Any, plan: Any, planner: Any) -> Any:
        sizes.append(sum(self.storage_data[item.storage_index].length for item in plan.items if len(item.lengths) > 1))
        return read(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", spy)
    for size in (1, 2, 4):
        with rank_of(size - 1, size):
            read_tensors(checkpoint, dict(sharded_model(checkpoint.args, size).named_parameters()))
    alone, half, quarter = sizes
    assert half == pytest.approx(alone / 2, rel=0.01) and quarter == pytest.approx(alone / 4, rel=0.01)


def test_a_checkpoint_tells_its_model(make):
    checkpoint = open_checkpoint(make())
    assert checkpoint.args == GROUPED
    assert checkpoint.dtype == torch.float32
    assert checkpoint.tokenizer_path.read_bytes()
    assert len(list(checkpoint.folder.glob("*.distcp"))) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_converted_to_the_dtype_of_their_target(make, dtype):
    checkpoint, whole = open_checkpoint(make()), random_tensors(GROUPED)
    targets = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in whole.items()}
    read_tensors(checkpoint, targets)
    assert all(torch.equal(targets[name], whole[name].to(dtype)) for name in whole)


def test_some_of_the_tensors_can_be_read_alone(make):
    target = torch.zeros(64)
    read_tensors(open_checkpoint(make()), {"norm.weight": target})
    assert torch.equal(target, random_tensors(GROUPED)["norm.weight"])


def test_unknown_names_and_other_shapes_are_refused(make):
    checkpoint = open_checkpoint(make())
    with pytest.raises(CheckpointError, match="no tensor 'norm.bias'"):
        read_tensors(checkpoint, {"norm.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match="norm.weight is 64 in the checkpoint, 65 in the model"):
        read_tensors(checkpoint, {"norm.weight": torch.zeros(65)})


def test_what_is_no_converted_folder_is_told_what_to_do(tmp_path, tokenizer):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    assert "no manifest.json, so this is no converted checkpoint" in refusal(tmp_path)
    meta = write_meta(tmp_path / "meta", random_tensors(GROUPED), PARAMS, tokenizer)
    assert f"a Meta checkpoint, not a converted one; run: python checkpoint_converter.py {meta} OUT" in refusal(meta)
    hf = write_hf(tmp_path / "hf", random_tensors(GROUPED), {}, tokenizer)
    assert f"a Hugging Face checkpoint, not a converted one; run: python checkpoint_converter.py {hf}" in refusal(hf)


@pytest.mark.parametrize("name", [".metadata", "model_args.json", "tokenizer.model", "__0_0.distcp", "__0_1.distcp"])
def test_a_file_that_is_missing_cut_short_or_changed_is_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{name}: has {len(content) - 1} bytes, manifest.json says {len(content)}" in refusal(folder, verify=False)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert f"{name}: the content does not match its hash" in refusal(folder)
    path.unlink()
    assert f"{name}: missing, although manifest.json lists it" in refusal(folder, verify=False)
    path.symlink_to("/etc/passwd")
    assert f"{name}: is no regular file" in refusal(folder, verify=False)


def test_without_verification_a_changed_tensor_is_not_noticed_but_with_it_it_is(folder):
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    start = content.find(random_tensors(GROUPED)["tok_embeddings.weight"].numpy().tobytes()[:64])
    content[start] ^= 1
    path.write_bytes(content)
    open_checkpoint(folder, verify=False)
    assert "corrupt" in refusal(folder)


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda mapping: mapping.update({key: value})


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (change("format_version", 2), "format_version is 2"),
        (change("dtype", "int8"), "dtype is 'int8'; allowed: float32"),
        (change("files", []), "'files' is missing or is no dict"),
        (lambda m: m.pop("fingerprint"), "'fingerprint' is missing"),
        (lambda m: m["files"].pop(".metadata"), "'.metadata' is not listed"),
        (lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}), "'../x' is no plain file name"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "sha256": ""}}), "'/etc/passwd' is no plain file"),
        (lambda m: m["files"].update({"..": {"size": 0, "sha256": ""}}), "'..' is no plain file name"),
        (lambda m: m["files"].update({"x": {"size": "0"}}), "the entry of 'x' needs a size and a sha256"),
        (lambda m: m["files"].update({"x": {"size": 0, "sha256": ""}}), "x: missing, although"),
        (change("dtype", "bfloat16"), "tok_embeddings.weight is torch.float32, manifest.json says torch.bfloat16"),
    ],
)
def test_a_wrong_manifest_is_refused(folder, edit, expected):
    edit_json(folder / "manifest.json", edit)
    assert expected in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_broken_json_is_refused(folder, text):
    (folder / "model_args.json").write_text(text)
    restamp(folder, "model_args.json")
    assert "model_args.json: " in refusal(folder)
    (folder / "manifest.json").write_text(text)
    assert "manifest.json: " in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (change("n_kv_head", 2), "unknown key 'n_kv_head'; did you mean 'n_kv_heads'?"),
        (lambda m: m.pop("dim"), "missing key 'dim'"),
        (change("dim", 65), "tok_embeddings.weight is 96x64, model_args.json says 96x65"),
        (change("n_heads", 7), "n_heads is 7; it must be a multiple of n_kv_heads (2)"),
        (change("rope_scaling", {"factors": 8}), "rope_scaling: unknown key 'factors'; did you mean 'factor'?"),
        (change("rope_scaling", 8), "rope_scaling: a mapping of settings is needed"),
        (change("n_layers", 3), "tensor layers.2.attention.wq.weight of model_args.json is missing"),
        (change("n_layers", 1), "tensor 'layers.1.attention.wq.weight' does not belong to the model"),
        (change("n_layers", 10**12), "n_layers is 1000000000000"),
        (change("n_kv_heads", 4), "attention.wk.weight is 16x64, model_args.json says 32x64"),
        (change("tie_embeddings", True), "tensor 'output.weight' does not belong to the model"),
    ],
)
def test_model_args_that_do_not_fit_the_tensors_are_refused(folder, edit, expected):
    edit_json(folder / "model_args.json", edit)
    restamp(folder, "model_args.json")
    assert expected in refusal(folder)


def test_a_scaled_rope_comes_back_from_model_args(folder):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    edit_json(folder / "model_args.json", change("rope_scaling", scaling))
    restamp(folder, "model_args.json")
    assert open_checkpoint(folder).args.rope_scaling.factor == 32.0


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_metadata(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    restamp(folder, ".metadata")


@pytest.mark.parametrize(
    ("hostile", "expected"),
    [
        (Calls(os.system, "touch ran"), "asks for posix.system, which no checkpoint needs"),
        (Calls(eval, "1"), "asks for builtins.eval"),
        (Calls(torch.load, "x"), "asks for torch.serialization.load"),
        (b"cos.path\njoin\n.", "asks for os.path.join"),
        (Calls(getattr, Metadata, "__init__"), "asks for the attribute '__init__'"),
        (Calls(getattr, _MEM_FORMAT_ENCODING, "__class__"), "asks for the attribute '__class__'"),
        (CHANGES_A_CLASS, "no valid DCP metadata: the pickle changes MetadataIndex; refused"),
        (
            CHANGES_A_CLASS.replace(b"MetadataIndex", b"_MEM_FORMAT_ENCODING", 1),
            "the pickle changes _MEM_FORMAT_ENCODING",
        ),
        (b"", "no valid DCP metadata"),
        (b"nonsense", "no valid DCP metadata"),
        ({"a": 1}, "no DCP metadata but dict"),
    ],
)
def test_metadata_that_would_run_code_or_is_none_is_refused(folder, tmp_path, monkeypatch, hostile, expected):
    monkeypatch.chdir(tmp_path)
    write_metadata(folder, hostile)
    assert expected in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_block_of_compressed_records_is_refused(folder: Path) -> None:
    """A few bytes of it could take any memory."""
    metadata = FileSystemReader(folder).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == "output.weight")
    place = metadata.storage_data[index]
    block = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    with zipfile.ZipFile(io.BytesIO(block)) as stored, zipfile.ZipFile(folder / "small.distcp", "w") as small:
        for record in stored.infolist():
            small.writestr(record.filename, stored.read(record), zipfile.ZIP_DEFLATED)
    size = (folder / "small.distcp").stat().st_size
    metadata.storage_data[index] = dataclasses.replace(place, relative_path="small.distcp", offset=0, length=size)
    write_metadata(folder, metadata)
    restamp(folder, "small.distcp")
    checkpoint = open_checkpoint(folder)
    weight = torch.empty(checkpoint.args.tensor_shapes()["output.weight"])
    with pytest.raises(CheckpointError, match=r"small\.distcp: has compressed records"):
        read_tensors(checkpoint, {"output.weight": weight})


def test_metadata_pickled_by_an_early_python_3_11_is_read(folder, monkeypatch):
    metadata = FileSystemReader(folder).read_metadata()
    by_name = copyreg.dispatch_table | {_MEM_FORMAT_ENCODING: lambda member: (getattr, (type(member), member.name))}
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = by_name
    pickler.dump(metadata)
    assert b"getattr" in file.getvalue()
    write_metadata(folder, file.getvalue())
    open_checkpoint(folder)


def spoil_place(**changes: Any) -> Callable[[Any], None]:
    return lambda metadata: vars(next(iter(metadata.storage_data.values()))).update(changes)


def first_block(metadata: Any) -> Any:
    return metadata.state_dict_metadata["layers.0.attention.wq.weight"].chunks


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (spoil_place(relative_path="../../etc/passwd"), "lies outside the files that manifest.json lists"),
        (spoil_place(relative_path="/etc/passwd"), "lies outside the files"),
        (spoil_place(offset=10**9), "lies outside the files"),
        (spoil_place(offset=-1), "lies outside the files"),
        (spoil_place(transform_descriptors=["zstd"]), "is stored transformed"),
        (lambda m: m.storage_data.popitem(), "of them stored"),
        (lambda m: first_block(m).pop(), "the blocks of layers.0.attention.wq.weight do not add up to 64x64"),
        (lambda m: first_block(m).__setitem__(0, first_block(m)[1]), "do not add up"),
        (lambda m: setattr(m, "state_dict_metadata", None), "no valid DCP metadata"),
        (lambda m: m.state_dict_metadata.update({"norm.weight": 3}), "no valid DCP metadata"),
    ],
)
def test_metadata_that_points_elsewhere_or_does_not_add_up_is_refused(folder, edit, expected):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    write_metadata(folder, metadata)
    assert expected in refusal(folder)


def test_a_tensor_file_that_would_run_code_is_refused_while_reading(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(metadata.state_dict_metadata["norm.weight"], TensorStorageMetadata)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "norm.weight")
    torch.save(Calls(os.system, "touch ran"), folder / "hostile")
    place.offset, place.length = (folder / place.relative_path).stat().st_size, (folder / "hostile").stat().st_size
    with open(folder / place.relative_path, "ab") as file:
        file.write((folder / "hostile").read_bytes())
    write_metadata(folder, metadata)
    restamp(folder, place.relative_path)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cannot read the tensors"):
        read_tensors(checkpoint, {"norm.weight": torch.zeros(64)})
    assert not (tmp_path / "ran").exists()
