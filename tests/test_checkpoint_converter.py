"""The converter: complete output or none, the same flags as ever, and one clear line for whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    PARAMS,
    hf_config,
    hf_tensors,
    random_tensors,
    write_hf,
    write_meta,
    write_ranks,
    write_tokenizer,
)

import checkpoint_converter
import formats.dcp
import formats.output
from checkpoint_converter import convert, main
from engine.checkpoint import open_checkpoint, read_tensors
from formats import FormatError, open_source
from formats.dcp import DCPSink
from formats.meta import MetaSource
from formats.output import HashedFile
from llama2 import ModelArgs
from tools import random_checkpoint

ARGS = ModelArgs(**PARAMS, vocab_size=96, n_kv_heads=2)
ROOT = Path(checkpoint_converter.__file__).parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def meta(tmp_path: Path, tokenizer: Path) -> Path:
    params = PARAMS | {"vocab_size": -1, "n_kv_heads": 2}
    return write_meta(tmp_path / "meta", random_tensors(ARGS, torch.bfloat16), params, tokenizer, 2)


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == dtype
    found = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in tensors.items()}
    read_tensors(checkpoint, found)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors.items())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:  # a wrong command line
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, "")
    assert len(err.splitlines()) == 1 and err.startswith("checkpoint_converter.py: error: "), err
    return err.removeprefix("checkpoint_converter.py: error: ")


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What it writes


def test_in_and_out_are_enough(meta, tmp_path, capsys):
    status, out, err = run(capsys, meta, tmp_path / "out")
    assert (status, err) == (0, "")
    assert f"{tmp_path / 'out'}: {ARGS.parameter_count():,} parameters in bfloat16 converted" in out
    assert_holds(tmp_path / "out", random_tensors(ARGS, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("separator", ["_", "-"])
def test_the_older_flags_work_in_both_spellings(meta, tmp_path, capsys, separator):
    (meta / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    flags = {
        "original_ckpt_dir": meta,
        "tokenizer_path": tmp_path / "elsewhere.model",
        "model_parallel_size": 2,
        "save_checkpoint_dir": tmp_path / "out",
        "max_seq_len": 77,
        "max_batch_size": 3,
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name.replace('_', separator)}", value)]
    assert run(capsys, *arguments)[::2] == (0, "")
    args = open_checkpoint(tmp_path / "out").args
    assert (args.max_seq_len, args.max_batch_size) == (77, 3)


def test_the_model_parallel_size_only_gives_a_warning_when_it_differs(meta, tmp_path, capsys):
    status, _, err = run(capsys, meta, tmp_path / "out", "--model_parallel_size", 8)
    assert status == 0
    assert err == f"checkpoint_converter.py: warning: --model_parallel_size is 8, but {meta} has 2 shards\n"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_can_be_chosen(meta, tmp_path, capsys, name):
    assert run(capsys, meta, tmp_path / "out", "--dtype", name)[0] == 0
    assert_holds(tmp_path / "out", random_tensors(ARGS, torch.bfloat16), getattr(torch, name))


def test_both_formats_of_one_model_give_the_same_tensor_files(meta, tmp_path, tokenizer):
    hf = write_hf(
        tmp_path / "hf", hf_tensors(random_tensors(ARGS, torch.bfloat16), ARGS), hf_config(ARGS), tokenizer, 2
    )
    one, other = convert(meta, tmp_path / "one"), convert(hf, tmp_path / "other")
    for name in ("__0_0.distcp", ".metadata", "tokenizer.model"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert open_checkpoint(other).args.max_seq_len == 512


def test_the_manifest_tells_what_was_written(meta, tmp_path):
    folder = convert(meta, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["source_format"], manifest["dtype"]) == (1, "meta", "bfloat16")
    assert manifest["parameters"] == sum(tensor.numel() for tensor in random_tensors(ARGS).values())
    assert sorted([*manifest["files"], "manifest.json"]) == only(folder)
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["fingerprint"]["files"]["params.json"][0] == (meta / "params.json").stat().st_size
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()


def test_files_are_cut_at_their_limit_and_every_block_at_its_own(meta, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.dcp, "LARGEST_FILE", 60_000)
    monkeypatch.setattr(formats.dcp, "SMALLEST_BLOCK", 1000)
    folder = convert(meta, tmp_path / "out")
    assert len(list(folder.glob("*.distcp"))) == 4
    assert_holds(folder, random_tensors(ARGS, torch.bfloat16), torch.bfloat16)


def test_only_one_tensor_is_in_memory_at_a_time(meta, tmp_path, monkeypatch):
    read, alive, most = MetaSource.read, [], 0

    def counting(self: MetaSource, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name).clone()
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
        return tensor

    resolve, buffers = formats.dcp._Planner.resolve_data, set()

    def watched(self: Any, item: Any) -> torch.Tensor:
        tensor = resolve(self, item)
        buffers.add((tensor.data_ptr(), tensor.nbytes))
        return tensor

    monkeypatch.setattr(MetaSource, "read", counting)
    monkeypatch.setattr(formats.dcp._Planner, "resolve_data", watched)
    convert(meta, tmp_path / "out")
    sizes = {tensor.nbytes for tensor in random_tensors(ARGS, torch.bfloat16).values()}
    assert most == 1
    assert sorted(size for _, size in buffers) == sorted(sizes)  # blocks of one size share one buffer


def test_the_input_is_verified_while_the_output_is_written(meta, tmp_path, monkeypatch):
    write, begun, verified = DCPSink.write, threading.Event(), threading.Event()

    def verify(self: MetaSource) -> None:
        assert begun.wait(20)
        verified.set()

    def writing(*arguments: Any) -> Any:
        begun.set()
        assert verified.wait(20)
        return write(*arguments)

    monkeypatch.setattr(MetaSource, "verify", verify)
    monkeypatch.setattr(DCPSink, "write", writing)
    convert(meta, tmp_path / "out")
    open_checkpoint(tmp_path / "out")


def test_torchs_other_threads_rest_while_the_output_is_written(meta, tmp_path, monkeypatch):
    write, used, before = DCPSink.write, [], torch.get_num_threads()

    def counting(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return write(*arguments)

    monkeypatch.setattr(DCPSink, "write", counting)
    torch.set_num_threads(3)
    try:
        convert(meta, tmp_path / "out")
        assert (used, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("early", [True, False])
def test_a_damaged_input_ends_the_writing_and_is_what_is_told(meta, tmp_path, capsys, monkeypatch, early):
    failed, written = threading.Event(), 0

    def verify(self: MetaSource) -> None:
        assert early or failed.wait(20)
        raise FormatError("consolidated.00.pth: is corrupt")

    def read(self: MetaSource, name: str) -> torch.Tensor:
        nonlocal written
        written += 1
        if early:
            time.sleep(0.01)
            return torch.zeros(self.args.tensor_shapes()[name])
        failed.set()
        raise FormatError("a tensor is strange")

    monkeypatch.setattr(MetaSource, "verify", verify)
    monkeypatch.setattr(MetaSource, "read", read)
    assert "consolidated.00.pth: is corrupt" in error_line(capsys, meta, tmp_path / "out")
    assert written < 10 and only(tmp_path) == ["meta"]


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path, tokenizer, capsys):
    tensors = random_tensors(ARGS, torch.bfloat16)
    tensors["output.weight"][5, 5] = 1e6
    write_meta(tmp_path / "meta", tensors, PARAMS | {"n_kv_heads": 2}, tokenizer)
    line = error_line(capsys, tmp_path / "meta", tmp_path / "out", "--dtype", "float16")
    assert "output.weight has numbers that float16 cannot hold" in line
    assert only(tmp_path) == ["meta"]


# When there is an output already


def test_the_same_conversion_again_changes_nothing(meta, tmp_path, capsys, monkeypatch):
    convert(meta, tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    monkeypatch.setattr(MetaSource, "verify", lambda *_: pytest.fail("a finished conversion needs no verification"))
    for flags in ([], ["--force"]):
        status, out, err = run(capsys, meta, tmp_path / "out", *flags)
        assert (status, err) == (0, "") and "were already converted" in out
    assert (tmp_path / "out").stat().st_ino == before


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, out: ["--dtype", "float32"],
        lambda meta, out: ["--max_seq_len", "5"],
        lambda meta, out: os.utime(meta / "params.json", ns=(1, 1)),
        lambda meta, out: (out / "__0_0.distcp").write_bytes(b""),
        lambda meta, out: (out / "model_args.json").unlink(),
    ],
    ids=["other dtype", "other limit", "other source", "damaged", "incomplete"],
)
def test_another_or_damaged_output_is_only_replaced_by_force(meta, tmp_path, capsys, change):
    out = convert(meta, tmp_path / "out")
    flags = change(meta, out)
    flags = flags if isinstance(flags, list) else []
    assert "--force replaces it" in error_line(capsys, meta, out, *flags)
    assert run(capsys, meta, out, *flags, "--force")[0] == 0
    open_checkpoint(out)
    assert only(tmp_path) == ["meta", "out"]


def test_force_replaces_an_output_of_the_right_size_whose_content_is_wrong(meta, tmp_path, capsys):
    out = convert(meta, tmp_path / "out")
    content = bytearray((out / "__0_0.distcp").read_bytes())
    content[5000] ^= 1
    (out / "__0_0.distcp").write_bytes(content)
    assert "converted" in run(capsys, meta, out, "--force")[1]
    open_checkpoint(out)


def test_force_never_removes_what_the_converter_did_not_make(meta, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    assert "is a folder with other files" in error_line(capsys, meta, tmp_path / "home", "--force")
    assert "holds the checkpoint to convert" in error_line(capsys, meta, meta, "--force")
    assert "holds the checkpoint to convert" in error_line(capsys, meta, tmp_path, "--force")
    assert only(tmp_path / "home") == ["thesis.txt"]


def test_an_empty_folder_and_a_link_to_one_are_good_outputs(meta, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(meta, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    open_checkpoint(tmp_path / "empty")


def test_several_at_once_all_succeed_and_leave_one_output(meta, tmp_path, monkeypatch):
    together, write = threading.Barrier(3), DCPSink.write

    def wait_then_write(*arguments: Any) -> Any:
        together.wait(20)
        return write(*arguments)

    monkeypatch.setattr(DCPSink, "write", wait_then_write)
    errors: list[BaseException] = []

    def work(force: bool) -> None:
        try:
            convert(meta, tmp_path / "out", progress=False, force=force)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(force,)) for force in (False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert only(tmp_path) == ["meta", "out"]
    open_checkpoint(tmp_path / "out")


def test_whoever_comes_second_with_another_conversion_is_told(meta, tmp_path, capsys, monkeypatch):
    write = DCPSink.write

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(DCPSink, "write", write)
        convert(meta, tmp_path / "out", dtype=torch.float32)
        return write(*arguments)

    monkeypatch.setattr(DCPSink, "write", overtaken)
    assert "cannot be put in place" in error_line(capsys, meta, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").dtype == torch.float32


# When it fails half-way


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out: cannot be written: No space left on device"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_failure_half_way_leaves_nothing_behind(meta, tmp_path, capsys, monkeypatch, failure, expected):
    write, count = HashedFile.write, 0

    def failing(self: Any, data: Any) -> int:
        nonlocal count
        count += 1
        if count > 50:
            raise failure
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", failing)
    assert expected in error_line(capsys, meta, tmp_path / "deep" / "out")
    assert only(tmp_path / "deep") == []


def test_too_little_disk_is_noticed_before_anything_is_written(meta, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    monkeypatch.setattr(formats.dcp, "BLOCK_OVERHEAD", 10_000_000)
    line = error_line(capsys, meta, tmp_path / "new" / "out")
    assert "not enough disk space: " in line and "GB needed, 0.0100 GB free" in line
    assert only(tmp_path) == ["meta"]


def test_what_a_killed_conversion_left_is_removed_but_not_what_a_living_one_uses(meta, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    gone, living = tmp_path / f".out.partial-{dead.pid}-0123abcd", tmp_path / f".out.partial-{os.getpid()}-0123abcd"
    other = tmp_path / f".other.partial-{dead.pid}-0123abcd"
    for folder in (gone, living, other):
        folder.mkdir()
    convert(meta, tmp_path / "out")
    assert (gone.exists(), living.exists(), other.exists()) == (False, True, True)


def test_what_a_process_of_an_id_that_lives_again_left_is_removed_after_a_while(meta, tmp_path):
    folder = tmp_path / f".out.partial-{os.getpid()}-0123abcd"  # as in a container, where all are process 1
    folder.mkdir()
    os.utime(folder, (time.time() - 3600,) * 2)
    convert(meta, tmp_path / "out")
    assert not folder.exists()


def test_a_locked_partial_folder_is_somebodys_whatever_its_process_id(meta, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = tmp_path / f".out.partial-{dead.pid}-0123abcd"
    folder.mkdir()
    os.utime(folder, (time.time() - 3600,) * 2)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    convert(meta, tmp_path / "out")
    os.close(lock)
    assert folder.exists()


def test_a_conversion_that_nobody_hears_of_is_done(meta, tmp_path):
    command = [sys.executable, "checkpoint_converter.py", str(meta), str(tmp_path / "OUT.GGUF")]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert open_source(tmp_path / "OUT.GGUF").title == "GGUF" and (tmp_path / "OUT.GGUF").is_file()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_without_a_trace(meta, tmp_path, sent):
    slow = (
        "import sys, time, checkpoint_converter as c\n"
        "from formats.output import HashedFile\n"
        "write = HashedFile.write\n"
        "def slowly(self, data):\n    time.sleep(0.05)\n    return write(self, data)\n"
        "HashedFile.write = slowly\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, str(meta), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        try:
            while not list(tmp_path.glob(".out.partial-*/*")) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(sent)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # else leaving the block waits for it without end
    assert process.returncode == 128 + sent
    assert err == f"checkpoint_converter.py: error: stopped by {sent.name}; nothing was changed\n"
    assert only(tmp_path) == ["meta"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_file_that_hangs_the_unpickler_does_not_keep_a_signal_from_ending_it(meta, tmp_path, sent):
    # The key of a dictionary is a tuple of the one before, twice, 60 times over: nobody lives to see its hash.
    tuples = b"".join(b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) for number in range(60))
    shard = next(meta.glob("*.pth"))
    with zipfile.ZipFile(shard) as whole:
        records = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(shard, "w") as hostile:
        for name, content in records.items():
            pickled = b"\x80\x02}K\x01\x85q\x00" + tuples + b"K\x01s."
            hostile.writestr(name, pickled if name.endswith("data.pkl") else content)
    telling = (
        "import sys, torch, checkpoint_converter as c\n"
        "load = torch.load\n"
        "def told(*arguments, **options):\n    print('loads', flush=True)\n    return load(*arguments, **options)\n"
        "torch.load = told\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", telling, str(meta), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "loads\n"
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(sent)
            assert process.wait(30) == -sent
        finally:
            process.kill()
    assert only(tmp_path) == ["meta"]


def test_a_signal_in_the_instant_when_a_file_was_begun_ends_it_too(meta, tmp_path):
    begun = (
        "import os, signal, sys, checkpoint_converter as c\n"
        "from formats.output import HashedFile\n"
        "init = HashedFile.__init__\n"
        "def interrupted(self, *arguments):\n"
        "    init(self, *arguments)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "HashedFile.__init__ = interrupted\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", begun, str(meta), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "checkpoint_converter.py: error: stopped by SIGTERM; nothing was changed\n"
    assert only(tmp_path) == ["meta"]


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_a_signal_while_all_is_put_in_place_comes_too_late(meta, tmp_path, output, monkeypatch):
    handler, sync, seen = signal.getsignal(signal.SIGINT), formats.output.sync_folder, []

    def interrupted(folder: Path) -> None:
        seen.append(folder)
        os.kill(os.getpid(), signal.SIGINT)
        sync(folder)

    monkeypatch.setattr(formats.output, "sync_folder", interrupted)
    for dtype in ("bfloat16", "float32"):
        assert main([str(meta), str(tmp_path / output), "--dtype", dtype, "--force"]) == 0
    assert seen and signal.getsignal(signal.SIGINT) is handler
    manifest = tmp_path / (output + ".manifest.json" if output.endswith("f") else f"{output}/manifest.json")
    assert json.loads(manifest.read_text())["fingerprint"]["dtype"].lower() in ("float32", "f32")
    assert not list(tmp_path.glob(".*"))


def test_what_was_to_be_replaced_is_back_if_its_successor_cannot_take_its_place(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("as before")
    with pytest.raises(formats.output.OutputError, match="cannot be put in place"):
        formats.output.put_in_place(tmp_path / "gone", tmp_path / "out", replace=True)
    assert only(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "as before"


def test_what_could_not_be_served_is_not_converted_for_a_server(meta, tmp_path, capsys):
    assert main([str(meta), str(tmp_path / "hf"), "--to", "hf"]) == 0
    (tmp_path / "hf" / "tokenizer.model").unlink(missing_ok=True)
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "Digits"}}))
    capsys.readouterr()
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert "cannot be served: " in capsys.readouterr().err and not (tmp_path / "out").exists()


# What it is given


def test_under_torchrun_only_the_first_rank_converts(meta, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, meta, tmp_path / "out") == (0, "", "")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(capsys, meta, tmp_path / "out")[0] == 0
    open_checkpoint(tmp_path / "out")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # somebody else's RANK
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, meta, tmp_path / "other")[0] == 0
    open_checkpoint(tmp_path / "other")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--original_ckpt_dir",
        "--save_checkpoint_dir",
        "--tokenizer_path",
        "--dtype",
        "--force",
        "--no_verify",
    ):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "IN (or --original_ckpt_dir) is needed"),
        (["", "out"], "IN (or --original_ckpt_dir) is needed"),
        (["in"], "OUT (or --save_checkpoint_dir) is needed"),
        (["in", "out", "--original_ckpt_dir", "other"], "IN and --original_ckpt_dir name different folders"),
        (["in", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["in", "out", "--max_seq_len", "0"], "'0' is no whole number of at least 1"),
        (["in", "out", "--max_batch_size", "many"], "'many' is no whole number of at least 1"),
        (["in", "out", "--model_parallel_size", "-1"], "--model_parallel_size"),
        (["in", "out", "--max_seq_length", "5"], "unrecognized arguments: --max_seq_length"),
        (["in", "out", "--tokenizer_path"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, expected):
    assert expected in error_line(capsys, *arguments, status=2)


def spoil_magic(meta: Path, tmp_path: Path) -> list[object]:
    (meta / "consolidated.01.pth").write_bytes(b"<html>")
    return []


def spoil_bit(meta: Path, tmp_path: Path) -> list[object]:
    content = bytearray((meta / "consolidated.01.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (meta / "consolidated.01.pth").write_bytes(content)
    return []


def spoil_code(meta: Path, tmp_path: Path) -> list[object]:
    torch.save(torch.nn.Linear(1, 1), meta / "consolidated.01.pth")
    return []


def spoil_small_tokenizer(meta: Path, tmp_path: Path) -> list[object]:
    write_tokenizer(meta / "tokenizer.model", 97)
    return []


def spoil_ranks(meta: Path, tmp_path: Path) -> list[object]:
    write_ranks(meta / "tokenizer.model")
    return []


def spoil_out_file(meta: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "out").write_text("")
    return []


def spoil_out_parent(meta: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "file").write_text("")
    return ["--save_checkpoint_dir", tmp_path / "file" / "out"]


def spoil_by(name: str, content: bytes | None) -> Callable[[Path, Path], list[object]]:
    def spoil(meta: Path, tmp_path: Path) -> list[object]:
        (meta / name).unlink()
        if content is not None:
            (meta / name).write_bytes(content)
        return []

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_magic, "consolidated.01.pth: is no PyTorch checkpoint file"),
        (spoil_bit, "the file is corrupt"),
        (spoil_code, "asks for torch.nn.modules.linear.Linear, which is code"),
        (spoil_by("consolidated.00.pth", None), "consolidated.00.pth: missing, although consolidated.01.pth is there"),
        (spoil_by("consolidated.01.pth", b""), "consolidated.01.pth: is empty"),
        (spoil_by("params.json", None), "params.json: No such file or directory"),
        (spoil_by("params.json", b"{"), "params.json: no valid JSON"),
        (spoil_by("params.json", b'{"dim": 64, "layers": 2}'), "unknown key 'layers'; did you mean 'n_layers'?"),
        (spoil_by("tokenizer.model", None), "no tokenizer.model or tokenizer.json beside"),
        (spoil_by("tokenizer.model", b""), "tokenizer.model: is neither a SentencePiece model nor a tiktoken file"),
        (spoil_by("tokenizer.model", b"hello"), "tokenizer.model: is neither a SentencePiece model nor"),
        (spoil_small_tokenizer, "has 97 tokens, the model only 96: it belongs to another model"),
        (spoil_ranks, "has 516 tokens, the model only 96"),
        (spoil_out_file, "out: is a file; a folder is needed"),
        (spoil_out_parent, "file: is a file; the output cannot be made there"),
        (lambda meta, tmp_path: ["--tokenizer_path", tmp_path / "nowhere"], "nowhere: no such tokenizer file"),
        (lambda meta, tmp_path: shutil.rmtree(meta), "meta: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file_and_leaves_nothing(meta, tmp_path, capsys, spoil, expected):
    arguments: list[object] = ["--original_ckpt_dir", meta]
    extra = spoil(meta, tmp_path) or []
    if "--save_checkpoint_dir" not in extra:
        extra += ["--save_checkpoint_dir", tmp_path / "out"]
    assert expected in error_line(capsys, *arguments, *extra)
    assert not (tmp_path / "out").is_dir() and not list(tmp_path.glob(".out*"))


def test_a_smaller_tokenizer_is_a_warning_since_models_are_padded(meta, tmp_path, tokenizer, capsys):
    write_tokenizer(meta / "tokenizer.model", 90)
    status, _, err = run(capsys, meta, tmp_path / "out")
    assert status == 0
    assert len(err.splitlines()) == 1 and "has 90 tokens, the model 96" in err


def test_llama_3s_tokenizer_is_counted_with_its_special_tokens_and_kept_as_it_is(tmp_path, tokenizer, capsys):
    args = ModelArgs(**PARAMS, vocab_size=520)
    write_meta(tmp_path / "meta", random_tensors(args, torch.bfloat16), PARAMS, tokenizer)
    ranks = write_ranks(tmp_path / "meta" / "tokenizer.model")
    status, _, err = run(capsys, tmp_path / "meta", tmp_path / "out")
    assert status == 0 and "tokenizer.model has 516 tokens, the model 520 (padded?)" in err
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == ranks.read_bytes()


@pytest.mark.parametrize("form", ["meta", "hf"])
def test_the_random_checkpoints_for_measurements_convert(tmp_path, tokenizer, capsys, form):
    flags = ["--shape", "tiny", "--format", form, "--shards", "2", "--dtype", "bfloat16", "--tokenizer", str(tokenizer)]
    assert random_checkpoint.main([str(tmp_path / "random"), *flags]) == 0
    assert only(tmp_path / "random") == sorted(
        ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
        if form == "meta"
        else [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        + ["config.json", "model.safetensors.index.json", "tokenizer.model"]
    )
    assert run(capsys, tmp_path / "random", tmp_path / "out")[0] == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    weights = torch.zeros(64, 64)
    read_tensors(checkpoint, {"layers.1.attention.wo.weight": weights})
    assert checkpoint.dtype == torch.bfloat16 and 0.01 < weights.std() < 0.03


def test_a_real_process_says_one_line_and_no_traceback(meta, tmp_path):
    (meta / "consolidated.01.pth").write_bytes(b"x")
    command = [sys.executable, "checkpoint_converter.py", str(meta), str(tmp_path / "out")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.splitlines() == [
        f"checkpoint_converter.py: error: {meta / 'consolidated.01.pth'}: is no PyTorch checkpoint file"
    ]
