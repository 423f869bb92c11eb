"""Megatron's distributed checkpoints: their blocks are read as one model, or refused by name and reason."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import CHANGES_A_CLASS, random_tensors
from megatron_checks import GROUPED, MHA, MODELS, TIED, WIDE_HEADS, Poison, assert_reads, read_all, refusal
from megatron_layout import write_distributed

from formats.megatron import MegatronSource


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("args", [MHA, GROUPED, TIED, WIDE_HEADS], ids=list(MODELS))
def test_distributed_checkpoints_are_read_block_by_block(tmp_path, args, ranks):
    write_distributed(tmp_path, random_tensors(args), args, ranks)
    assert_reads(tmp_path, args, random_tensors(args))
    with MegatronSource(tmp_path) as source:
        assert source.shards is None
        assert [path.name for path in source.files] == [
            "latest_checkpointed_iteration.txt", ".metadata", "metadata.json", "common.pt", "__0_0.distcp"
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distributed_checkpoints_of_half_precision_are_read(tmp_path, dtype):
    write_distributed(tmp_path, random_tensors(GROUPED, dtype), GROUPED, 2)
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED, dtype))


def merged(whole: dict[str, Any]) -> None:
    """All layers of a parameter in one block, as a writer without ranks would have them."""
    for name, (shape, blocks) in whole.items():
        table = torch.zeros(shape)
        for offsets, piece in blocks.items():
            table[tuple(slice(o, o + s) for o, s in zip(offsets, piece.shape, strict=True))] = piece
        whole[name] = (shape, {(0,) * len(shape): table})


def by_layer(whole: dict[str, Any]) -> None:
    """Every layer's parameters under names of their own, as Megatron has them for layers that differ."""
    for name in [name for name in whole if name.startswith("decoder.layers.")]:
        shape, blocks = whole.pop(name)
        for layer in range(shape[0]):
            own = {offsets[1:]: piece[0] for offsets, piece in blocks.items() if offsets[0] == layer}
            whole[name.replace("layers.", f"layers.{layer}.", 1)] = (shape[1:], own)


def gates_apart(whole: dict[str, Any]) -> None:
    """Gates and ups as two tensors, as Megatron-core 0.15 has them."""
    by_layer(whole)
    for name in [name for name in whole if name.endswith("linear_fc1.weight")]:
        (rows, columns), blocks = whole.pop(name)
        for part, start in (("_w", 0), ("_v", rows // 2)):
            own = {(row - start, 0): piece for (row, _), piece in blocks.items() if start <= row < start + rows // 2}
            whole[name + part] = ((rows // 2, columns), own)


def under_module(whole: dict[str, Any]) -> None:
    """Every name below the wrapper that some runs save."""
    for name in [name for name in whole if not name.startswith("optimizer")]:
        whole[f"module.{name}"] = whole.pop(name)


@pytest.mark.parametrize("rearrange", [merged, by_layer, gates_apart, under_module])
def test_blocks_and_names_may_be_arranged_in_other_ways(tmp_path, rearrange):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 2, rearrange)
    assert_reads(tmp_path, GROUPED, random_tensors(GROUPED))


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda whole: whole.pop(name)


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, Any]], object]:
    return lambda whole: whole.update({name: (shape, {(0,) * len(shape): torch.ones(shape)})})


FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without(FC2), "fc2 of layer 0 is missing"),
        (without("embedding.word_embeddings.weight"), "the embedding is missing"),
        (with_tensor(FC2, 2, 48, 95), "fc2 of layer 0 is 48x95, but the arguments mean 48x96"),
        (with_tensor(FC2, 3, 48, 96), "args.num_layers is 2, but 3 are stored"),
        (with_tensor(FC2, 2, 48), "fc2 of layer 0 is 48, but the arguments mean 48x96"),
        (with_tensor(FC2, 48), "decoder.layers.mlp.linear_fc2.weight is 48"),
        (
            with_tensor("decoder.layers.0.mlp.linear_fc2.weight", 48, 96),
            "blocks of fc2 of layer 0 do not add up",
        ),
        (
            with_tensor("decoder.layers.mlp.linear_fc1.weight_w", 2, 9, 48),
            "2x9x48 of torch.float32, unlike what",
        ),
        (with_tensor("decoder.layers.mlp.router.weight", 2, 8, 48), "does not belong to a Llama"),
        (with_tensor("decoder.layers.mlp.linear_fc1.bias", 2, 192), "does not belong to a Llama"),
    ],
)
def test_a_distributed_checkpoint_of_another_model_is_refused(tmp_path, change, complaint):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 1, change)
    assert complaint in refusal(tmp_path)


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "__0_0.distcp"])
def test_a_file_that_is_gone_is_named(tmp_path, name):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 1)
    (tmp_path / "iter_0000020" / name).unlink()
    assert f"{tmp_path / 'iter_0000020' / name}: " in refusal(tmp_path)


def test_blocks_that_leave_a_hole_are_refused(tmp_path):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 2)
    path = tmp_path / "iter_0000020/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata[FC2].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    assert f"{path}: the blocks of fc2 of layer 1 do not add up to 48x96" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"relative_path": "../../secret"}, "is said to be in '../../secret', which is no file name"),
        ({"relative_path": "absent.distcp"}, "absent.distcp: No such file"),
        ({"offset": 1 << 40}, "lies outside the file (cut short?)"),
        ({"offset": -1}, "lies outside the file"),
        ({"length": 8}, "has a block of"),
        ({"transform_descriptors": ["zstd"]}, "is stored transformed"),
    ],
)
def test_blocks_that_lie_elsewhere_are_refused(tmp_path, change, complaint):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED)
    path = tmp_path / "iter_0000020/.metadata"
    metadata = pickle.loads(path.read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == FC2)
    for name, value in change.items():
        setattr(place, name, value)
    path.write_bytes(pickle.dumps(metadata))
    assert complaint in refusal(tmp_path)


def test_a_damaged_block_is_refused_when_it_is_verified_or_read(tmp_path):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 2)
    folder = tmp_path / "iter_0000020"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == FC2)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    middle = place.offset + place.length // 2
    content[middle] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    for use in (MegatronSource.verify, read_all):
        said = refusal(tmp_path, use)
        assert f"__0_0.distcp: the block at byte {place.offset} is corrupt: Bad CRC-32" in said


@pytest.mark.parametrize(
    ("claim", "complaint"),
    [
        ({"size": (48, 96, 2)}, "holds another tensor"),
        ({"offset": 96}, "a view of a tensor"),
        ({"stride": (1, 2, 96)}, "a view of a tensor"),
        ({"size": (3, 48, 96)}, "is invalid for input of size"),
        ({"count": 1 << 30}, None),  # it is not believed: the record says how many there are
    ],
)
def test_a_block_whose_pickle_lies_is_not_believed(tmp_path, claim, complaint):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED, 1, merged)
    folder = tmp_path / "iter_0000020"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == FC2)
    data = folder / "__0_0.distcp"
    content = data.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content[place.offset : place.offset + place.length])) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, record in records.items():
            if name.endswith("data.pkl"):
                record = lying_pickle(**claim)
            archive.writestr(name, record)
    place.offset, place.length = len(content), len(made.getvalue())
    data.write_bytes(content + made.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    if complaint is None:
        assert_reads(tmp_path, GROUPED, random_tensors(GROUPED))
    else:
        assert complaint in refusal(tmp_path, read_all)


def lying_pickle(
    size: tuple[int, ...] = (2, 48, 96),
    count: int = 2 * 48 * 96,
    offset: int = 0,
    stride: tuple[int, ...] | None = None,
) -> bytes:
    """The pickle of a tensor that says of itself what it is told to."""
    reference = ("storage", torch.FloatStorage, "0", "cpu", count)

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple[Any, ...] | None:
            return reference if isinstance(value, Reference) else None

    stride = stride or torch.empty(size, device="meta").stride()
    made = io.BytesIO()
    Pickler(made, 2).dump(Poison(torch._utils._rebuild_tensor_v2, Reference(), offset, size, stride, False, {}))
    return made.getvalue()


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_distributed_checkpoint_that_calls_anything_is_refused(tmp_path, name):
    write_distributed(tmp_path / "run", random_tensors(GROUPED), GROUPED)
    victim = tmp_path / "victim"
    victim.mkdir()
    path = tmp_path / "run/iter_0000020" / name
    poison = Poison(shutil.rmtree, str(victim))
    path.write_bytes(pickle.dumps(poison)) if name == ".metadata" else torch.save({"args": poison}, path)
    said = refusal(tmp_path / "run")
    assert f"{path}: the pickle asks for shutil.rmtree" in said
    assert victim.is_dir()


def test_a_block_that_calls_anything_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    write_distributed(tmp_path / "run", random_tensors(GROUPED), GROUPED)
    folder = tmp_path / "run/iter_0000020"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == FC2)
    made = io.BytesIO()
    torch.save([Poison(shutil.rmtree, str(victim)), torch.zeros(48, 96)], made)
    data = folder / "__0_0.distcp"
    place.offset, place.length = data.stat().st_size, len(made.getvalue())
    data.write_bytes(data.read_bytes() + made.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "the pickle asks for shutil.rmtree, which no tensor needs; refused" in refusal(tmp_path / "run", read_all)
    assert victim.is_dir()


def test_distributed_checkpoints_of_other_backends_are_refused(tmp_path):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED)
    config = tmp_path / "iter_0000020/metadata.json"
    config.write_text(json.dumps({"sharded_backend": "zarr"}))
    assert f"{config}: sharded_backend is 'zarr'; only 'torch_dist' can be read" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1]), pickle.dumps({"a": 1}), CHANGES_A_CLASS])
def test_metadata_that_is_none_is_refused(tmp_path, content):
    write_distributed(tmp_path, random_tensors(GROUPED), GROUPED)
    (tmp_path / "iter_0000020/.metadata").write_bytes(content)
    assert "iter_0000020/.metadata: no" in refusal(tmp_path)
