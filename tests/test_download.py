"""Checkpoints brought from servers on this machine: one that is like the Hugging Face hub, one like Meta's."""

from __future__ import annotations

import _thread
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
from checkpoints import PARAMS, hf_config, hf_tensors, random_tensors, write_hf, write_meta, write_tokenizer
from download_servers import COMMIT, SIGNATURE, TOKEN, Bucket, Hub, Mood, running

from checkpoint_converter import convert
from llama2 import ModelArgs
from tools import download, download_http, download_hub, download_meta, download_transfer
from tools.download_http import Client, DownloadError

ARGS = ModelArgs(**PARAMS, vocab_size=96)


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield from running(Hub())


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    yield from running(Bucket())


@pytest.fixture(autouse=True)
def apart_from_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No login, proxy or setting of whoever runs the tests, small blocks, and no waiting."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download_http, "_BLOCK", 1 << 12)
    monkeypatch.setattr(download_http, "DELAYS", (0.0,) * 3)
    yield


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(ARGS)


@pytest.fixture(scope="module")
def hf_files(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A whole repository as transformers writes it, with what else may lie there."""
    folder = tmp_path_factory.mktemp("hf")
    write_hf(folder / "model", hf_tensors(tensors, ARGS), hf_config(ARGS), write_tokenizer(folder / "tokenizer.model"))
    files = read(folder / "model")
    extra = {
        "README.md": b"# read me",
        "pytorch_model.bin": b"the same again",
        "LICENSE.txt": b"licence",
        "a.png": b"a",
    }
    return files | extra | {"tokenizer_config.json": b"{}", ".gitattributes": b"*", "onnx/model.onnx": b"onnx"}


@pytest.fixture(scope="module")
def meta_files(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Two shards as Meta publishes them, with checklists."""
    folder = tmp_path_factory.mktemp("meta")
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    files = read(write_meta(folder / "model", tensors, PARAMS | {"vocab_size": -1}, tokenizer, count=2))
    sums = [f"{hashlib.md5(files[name]).hexdigest()}  {name}\n" for name in sorted(files) if name != "tokenizer.model"]
    tokenizer_sum = f"{hashlib.md5(files['tokenizer.model']).hexdigest()}  tokenizer.model \r\n"
    return files | {"checklist.chk": "".join(sums).encode(), "tokenizer_checklist.chk": tokenizer_sum.encode()}


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_bucket(files: dict[str, bytes], folder: str = "llama-2-13b-chat") -> dict[str, bytes]:
    """Where Meta's server has them."""
    shared = {name: content for name, content in files.items() if name.startswith("tokenizer")}
    inside = {f"{folder}/{name}": content for name, content in files.items() if name not in shared}
    return shared | inside | {"LICENSE": b"licence", "USE_POLICY.md": b"policy"}


def run(*words: object) -> int:
    return download.main([str(word) for word in words])


def from_hub(hub: Hub, *words: object) -> int:
    return run("org/model", "--endpoint", hub.url, *words)


def fails(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The error's one line, after making sure that nothing secret was printed."""
    printed = capsys.readouterr()
    assert status == 1, printed
    assert TOKEN not in printed.out + printed.err and SIGNATURE not in printed.out + printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("download: error: ")]
    return line.removeprefix("download: error: ")


# --- the hub ---


def test_the_server_of_these_tests_is_one_that_the_hubs_own_client_understands(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.files, hub.gated = hf_files, True
    brought = huggingface_hub.snapshot_download(
        "org/model", endpoint=hub.url, local_dir=tmp_path / "out", token=TOKEN, max_workers=2
    )
    for name, content in hf_files.items():
        assert (Path(brought) / name).read_bytes() == content
    with pytest.raises(huggingface_hub.errors.GatedRepoError):
        huggingface_hub.hf_hub_download("org/model", "config.json", endpoint=hub.url, local_dir=tmp_path, token="bad")
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        huggingface_hub.HfApi(endpoint=hub.url).model_info("org/model", revision="nowhere")


def test_a_hugging_face_model_is_brought_with_what_it_needs_and_converts(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, out = hf_files, tmp_path / "new" / "model"
    assert from_hub(hub, out) == 0
    needed = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "LICENSE.txt"}
    assert read(out) == {name: hf_files[name] for name in needed}
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    printed = capsys.readouterr().out
    assert f"python checkpoint_converter.py {out} converted/model" in printed
    assert f"make serve CHECKPOINT={out}" in printed
    assert (convert(out, tmp_path / "converted", progress=False) / "manifest.json").exists()


def test_a_sharded_model_is_brought_by_its_index(
    hub: Hub, tensors: dict[str, torch.Tensor], hf_files: dict[str, bytes], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(hf_files["tokenizer.model"])
    hub.files = read(write_hf(tmp_path / "model", hf_tensors(tensors, ARGS), hf_config(ARGS), tokenizer, count=3))
    expected = dict(hub.files)
    hub.files |= {"consolidated.safetensors": b"twice", "pytorch_model.bin": b"twice", "model-0.safetensors": b"old"}
    assert from_hub(hub, tmp_path / "out") == 0
    assert read(tmp_path / "out") == expected


@pytest.mark.parametrize("place", ["", "original/"])
def test_metas_own_files_in_a_repository_are_brought_to_one_folder_and_convert(
    hub: Hub, meta_files: dict[str, bytes], hf_files: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    hub.files = {f"{place}{name}": content for name, content in meta_files.items()}
    hub.files |= hf_files if place else {"README.md": b"# read me"}
    assert from_hub(hub, tmp_path / "out", "--format", "meta" if place else "auto") == 0
    licence = {"LICENSE.txt": b"licence"} if place else {}
    assert read(tmp_path / "out") == meta_files | licence
    convert(tmp_path / "out", tmp_path / "converted", progress=False)


def test_bin_files_are_brought_only_where_there_is_nothing_better(
    hub: Hub, meta_files: dict[str, bytes], tmp_path: Path
) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}).encode()
    hub.files = {"config.json": b"{}", "pytorch_model.bin.index.json": index, "tf_model.h5": b"no"}
    hub.files |= {"pytorch_model-1.bin": b"1", "pytorch_model-2.bin": b"2"}
    expected = {name: content for name, content in hub.files.items() if name != "tf_model.h5"}
    hub.files |= {"some.gguf": b"gguf"}
    assert from_hub(hub, tmp_path / "bin") == 0
    assert read(tmp_path / "bin") == expected
    hub.files |= {f"original/{name}": content for name, content in meta_files.items()}
    assert from_hub(hub, tmp_path / "meta") == 0
    assert "consolidated.00.pth" in read(tmp_path / "meta") and "config.json" not in read(tmp_path / "meta")
    hub.files |= {"model.safetensors": b"better"}
    assert from_hub(hub, tmp_path / "safetensors") == 0
    assert read(tmp_path / "safetensors") == {"config.json": b"{}", "model.safetensors": b"better"}


def test_one_gguf_is_brought_with_all_its_parts(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"m.Q4_0.gguf": b"4", "big/m.Q8_0-00001-of-00002.gguf": b"8", "big/m.Q8_0-00002-of-00002.gguf": b"88"}
    hub.files |= {"config.json": b"{}", "big/m.f16-00001-of-00002.gguf": b"16"}
    error = fails(capsys, from_hub(hub, tmp_path / "out"))
    assert "choose with --file" in error and "m.Q4_0.gguf" in error and "00002-of-00002" not in error
    assert from_hub(hub, tmp_path / "out", "--file", "m.Q4_0.gguf") == 0
    assert read(tmp_path / "out") == {"m.Q4_0.gguf": b"4"}
    assert from_hub(hub, tmp_path / "parts", "--format", "gguf", "--file", "big/m.Q8_0-00002-of-00002.gguf") == 0
    assert set(read(tmp_path / "parts")) == {"m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf"}
    assert "no checkpoint of format gguf at no.gguf" in fails(
        capsys, from_hub(hub, tmp_path / "x", "--file", "no.gguf")
    )
    assert "not for --format hf" in fails(
        capsys, from_hub(hub, tmp_path / "x", "--format", "hf", "--file", "m.Q4_0.gguf")
    )
    assert "no checkpoint of format meta" in fails(capsys, from_hub(hub, tmp_path / "x", "--format", "meta"))


def test_a_folder_of_metas_files_can_be_chosen(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {
        f"{place}/{name}": place.encode()
        for place in ("mp8", "mp16")
        for name in ("params.json", "consolidated.00.pth")
    }
    assert "choose with --file: mp16, mp8" in fails(capsys, from_hub(hub, tmp_path / "out"))
    assert from_hub(hub, tmp_path / "out", "--file", "mp8/") == 0
    assert read(tmp_path / "out") == {"params.json": b"mp8", "consolidated.00.pth": b"mp8"}
    hub.files |= {"original/params.json": b"usual", "original/consolidated.00.pth": b"usual"}
    assert from_hub(hub, tmp_path / "usual") == 0
    assert read(tmp_path / "usual") == {"params.json": b"usual", "consolidated.00.pth": b"usual"}


def test_a_list_shows_what_would_be_brought_and_brings_nothing(
    hub: Hub,
    hf_files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.files = hf_files | {"evil\x1b[31m.txt": b"x"}
    monkeypatch.chdir(tmp_path)
    assert from_hub(hub, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    marks = {line.split()[-1]: line[0] for line in lines[:-1]}
    assert marks["model.safetensors"] == "*" and marks["pytorch_model.bin"] == " "
    assert set(marks) == set(hf_files) | {"evil?[31m.txt"}
    assert lines[-1].startswith("* needed: 5 files, ")
    assert not list(tmp_path.iterdir()) and not hub.of("/resolve/")
    hub.files = {"a.gguf": b"1", "b.gguf": b"2"}
    assert from_hub(hub, "--list") == 1
    assert "a.gguf" in capsys.readouterr().out


def test_the_address_of_a_page_and_a_revision_name_a_commit_that_is_kept_to(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = hf_files
    assert run(f"{hub.url}/org/model/tree/v1", tmp_path / "page", "--endpoint", hub.url) == 0
    assert from_hub(hub, tmp_path / "revision", "--revision", "v1") == 0
    assert len([path for _, path, _ in hub.asked if "/api/models/org/model/revision/v1" in path]) == 2
    files = [path for _, path, _ in hub.asked if "/resolve/" in path]
    assert files and all(f"/resolve/{COMMIT}/" in path for path in files)
    assert "no revision nowhere" in fails(capsys, from_hub(hub, tmp_path / "x", "--revision", "nowhere"))


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: Hub,
    hf_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.files, hub.gated, hub.private = hf_files, True, True
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert from_hub(hub, tmp_path / "environment") == 0
    monkeypatch.delenv("HF_TOKEN")
    assert from_hub(hub, tmp_path / "flag", "--token", TOKEN) == 0
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert len(hub.of("/elsewhere/")) == 4 and not [each for each in hub.of("/elsewhere/") if "Authorization" in each]
    assert {each.get("Authorization") for each in hub.of("/resolve/")} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("change", "token", "message"),
    [
        ({"gated": True}, None, "is gated: accept its licence at http.*/org/model, then log in .*HF_TOKEN"),
        ({"gated": True}, "hf_other", "is gated, and your token's account may not read it: ask for access at http"),
        ({"private": True}, None, "no such repository at http.*or a private one.*log in .*HF_TOKEN"),
        ({"private": True}, "hf_other", "no such repository at http.*or a private one: check it"),
        ({"refuses_tokens": True}, "hf_old", "the token is not accepted; make a new one at http.*/settings/tokens"),
        ({"moods": {"/config.json": Mood(9, 403, {"X-Error-Message": "no\x1bt"})}}, None, "config.json: .* 403 .*no.t"),
        ({"moods": {"/config.json": Mood(9, 404, {"X-Error-Code": "EntryNotFound"})}}, None, "has no file config.json"),
        ({"moods": {"/api/": Mood(9, 500)}}, None, "org/model: 500 Internal Server Error, 4 times; run the same"),
        ({"moods": {"/config.json": Mood(9, 503)}}, None, "config.json: 503 Service Unavailable, 4 times; run"),
        ({"moods": {"/api/": Mood(9, 200, {"Content-Type": "text/html"})}}, None, "does not answer as a hub does"),
        ({"moods": {"/api/": Mood(9, 429, {"Retry-After": "3600"})}}, None, "429 Too Many .* come back in 3600 s"),
    ],
)  # fmt: skip
def test_each_refusal_is_explained_in_one_line_and_leaves_nothing(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: dict[str, Any], token: str | None, message: str,
) -> None:  # fmt: skip
    hub.files = hf_files
    for name, value in change.items():
        setattr(hub, name, value)
    line = fails(capsys, from_hub(hub, tmp_path / "out", *(["--token", token] if token else [])))
    assert re.search(message, line), line
    assert "\x1b" not in line
    assert not (tmp_path / "out").exists()


def test_what_may_pass_is_waited_for_as_long_as_the_server_says(
    hub: Hub,
    hf_files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.files, waits = hf_files, []
    monkeypatch.setattr(threading.Event, "wait", record_waits(waits))
    later = download_http.email.utils.formatdate(time.time() + 90, usegmt=True)
    hub.moods["/api/"] = Mood(1, 429, {"Retry-After": "7"})
    hub.moods["/config.json"] = Mood(2, 502)
    hub.moods["/elsewhere/model.safetensors"] = Mood(1, 503, {"Retry-After": later})
    assert from_hub(hub, tmp_path / "out") == 0
    assert sorted(round(wait, -1) for wait in waits if wait) == [10, 90] and waits.count(0) == 2
    notes = capsys.readouterr().err
    assert "org/model: 429 Too Many Requests; trying again in 7 s" in notes and "502 Bad Gateway" in notes


def record_waits(waits: list[float]) -> Callable[..., bool]:
    """In the place of Event.wait, where that is given a time by the client; other waits are as ever."""
    wait = threading.Event.wait

    def recorded(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is not threading.main_thread() or timeout is not None:
            caller = download_http.Client.wait.__code__
            if sys._getframe(1).f_code is caller:
                waits.append(timeout or 0)
                return False
        return wait(event, timeout)

    return recorded


def test_no_hub_at_all_is_explained(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = Hub()
    closed.server_close()
    assert "cannot reach 127.0.0.1 (connect error), 4 times" in fails(capsys, from_hub(closed, tmp_path / "out"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in fails(capsys, from_hub(hub, tmp_path / "out"))


def test_plain_http_is_refused_but_to_this_machine_or_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_hub.Repository, "_look_up", lambda self: (COMMIT, {}))
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    assert "http://hub.example is refused; https is needed" in fails(capsys, run("org/model", tmp_path / "out"))
    assert "holds no checkpoint" in fails(
        capsys, run("org/model", tmp_path / "out", "--endpoint", "http://hub.example")
    )
    assert "refused" in fails(
        capsys, run("http://files.example/*?Policy=x&Signature=y&Key-Pair-Id=z", tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("start", "target", "allowed"),
    [
        ("https://hub.example/a", "https://files.example/b", True),
        ("https://hub.example/a", "/b", True),
        ("https://hub.example/a", "http://hub.example/b", False),
        ("https://hub.example/a", "http://127.0.0.1/b", False),
        ("https://hub.example/a", "file:///etc/passwd", False),
        ("https://hub.example/a", "https://[/b", False),
        ("http://hub.example/a", "http://hub.example/b", True),
        ("http://hub.example/a", "http://127.0.0.1/b", False),
        ("http://127.0.0.1:1/a", "http://localhost:2/b", True),
        ("http://127.0.0.1:1/a", "http://files.example/b", False),
    ],
)
def test_a_redirect_never_leads_to_an_unencrypted_place_and_never_shows_the_token_there(
    start: str, target: str, allowed: bool
) -> None:
    asked = []

    def get(url: str, headers: dict[str, str], **settings: Any) -> SimpleNamespace:
        asked.append((url, headers.get("authorization")))
        end = len(asked) == 2
        return SimpleNamespace(status_code=200 if end else 302, headers={"Location": target}, close=lambda: None)

    client = Client({"authorization": TOKEN}, lambda *words: "refused", print)
    client._session.get = get
    if not allowed:
        with pytest.raises(DownloadError, match="redirects to|no address"):
            client.get("name", start)
        assert len(asked) == 1
    else:
        client.get("name", start)
        same = urlsplit(asked[1][0]).netloc == urlsplit(start).netloc
        assert [token for _, token in asked] == [TOKEN, TOKEN if same else None]


def test_redirects_in_circles_end(hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: Any) -> None:
    hub.files = hf_files
    hub.moods["/config.json"] = Mood(99, 302, {"Location": "config.json"})
    assert "redirects in circles" in fails(capsys, from_hub(hub, tmp_path / "out"))


# --- what goes wrong on the way ---


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.files = hf_files
    hub.moods["/elsewhere/model.safetensors"] = Mood(7, cut=50_000)  # more often than tries are made without success
    assert from_hub(hub, tmp_path / "out") == 0
    assert read(tmp_path / "out")["model.safetensors"] == hf_files["model.safetensors"]
    starts = [int(each["Range"][6:].split("-")[0]) for each in hub.of("/elsewhere/model") if "Range" in each]
    assert len(starts) == 7 and starts == sorted(set(starts)) and starts[-1] > 300_000


def test_an_interrupted_run_is_continued_by_the_same_command(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, out = hf_files, tmp_path / "out"
    at = len(hf_files["model.safetensors"]) // 2

    def interrupt() -> None:
        if len(hub.of("/elsewhere/model")) == 2:
            _thread.interrupt_main()
            time.sleep(0.3)

    hub.moods["/elsewhere/model"] = Mood(2, cut=at, before=interrupt)
    assert from_hub(hub, out) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not out.exists()
    there = (tmp_path / "out.partial" / "model.safetensors").stat().st_size
    assert 0 < there <= at
    hub.asked.clear()
    hub.moods.clear()
    assert from_hub(hub, out) == 0
    assert [each.get("Range") for each in hub.of("/elsewhere/model")] == [
        f"bytes={there}-{len(hf_files['model.safetensors']) - 1}"
    ]
    assert not hub.of("/elsewhere/tokenizer") and not hub.of("config.json")
    assert read(out)["model.safetensors"] == hf_files["model.safetensors"]


def test_a_server_without_ranges_is_asked_for_the_whole_again(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, hub.ranges = hf_files, False
    hub.moods["/elsewhere/model"] = Mood(2, cut=90_000)
    assert from_hub(hub, tmp_path / "out") == 0
    assert read(tmp_path / "out")["model.safetensors"] == hf_files["model.safetensors"]
    hub.moods["/elsewhere/model"] = Mood(99, cut=90_000)
    assert "4 times" in fails(capsys, from_hub(hub, tmp_path / "never"))


def test_a_large_file_is_asked_for_in_windows(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_transfer, "WINDOW", 100_000)
    hub.files, size = hf_files, len(hf_files["model.safetensors"])
    assert from_hub(hub, tmp_path / "out") == 0
    assert [each["Range"] for each in hub.of("/elsewhere/model")] == [
        f"bytes={first}-{min(first + 100_000, size) - 1}" for first in range(0, size, 100_000)
    ]
    assert read(tmp_path / "out")["model.safetensors"] == hf_files["model.safetensors"]


def test_small_files_come_first_since_they_show_early_whether_all_is_well(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_transfer, "AT_ONCE", 1)
    hub.files = hf_files
    assert from_hub(hub, tmp_path / "out") == 0
    names = [path.rpartition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path]
    assert names == sorted(names, key=lambda name: len(hf_files[name])) and len(names) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_content_with_a_wrong_hash_never_gets_to_the_output(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub.files = hf_files
    hub.moods[f"/{name}"] = Mood(1, body=lambda content: content[:-1] + b"!")
    if name == "model.safetensors":
        hub.moods["/elsewhere/model"] = hub.moods.pop(f"/{name}")
    algorithm = "sha256" if name == "model.safetensors" else "git"
    line = fails(capsys, from_hub(hub, tmp_path / "out"))
    assert line.startswith(f"{name}: the content does not match its published hash ({algorithm})")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / name).exists()
    assert from_hub(hub, tmp_path / "out") == 0


def test_a_damaged_start_from_an_earlier_run_is_not_built_on(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, partial = hf_files, tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".download").write_text(f"{hub.url}/org/model\n")
    (partial / "model.safetensors").write_bytes(b"damaged" * 1000)
    (partial / "config.json").write_bytes(b"much longer than it should be" * 1000)
    assert from_hub(hub, tmp_path / "out") == 0
    assert "model.safetensors: what an earlier run left does not fit" in capsys.readouterr().err
    assert "Range" not in hub.of("/elsewhere/model")[1] and len(hub.of("/elsewhere/model")) == 2
    assert read(tmp_path / "out")["model.safetensors"] == hf_files["model.safetensors"]


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        (Mood(9, body=lambda content: content[:-1000]), "sends a file of .* bytes, but announced"),
        (Mood(9, body=lambda content: content + b"more"), "sends a file of .* bytes, but announced"),
        (Mood(9, body=lambda content: content * 2, headers={"Content-Length": "x"}), "sends more than the .* bytes"),
        (Mood(9, 206), "a part of the file without saying which"),
        (Mood(9, 206, {"Content-Range": "bytes 5-9/SIZE"}), "another part of the file than"),
        (Mood(9, 416), "answers 416"),
    ],
)
def test_a_server_that_sends_something_else_than_it_announced_is_stopped(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], mood: Mood, message: str
) -> None:
    hub.files, size = hf_files, len(hf_files["model.safetensors"])
    headers = {key: value.replace("SIZE", str(size)) for key, value in mood.headers.items()}
    hub.moods["/elsewhere/model"] = dataclasses.replace(mood, headers=headers)
    line = fails(capsys, from_hub(hub, tmp_path / "out"))
    assert re.search(f"model.safetensors: .*{message}", line), line
    there = tmp_path / "out.partial" / "model.safetensors"
    assert not (tmp_path / "out").exists() and (not there.exists() or there.stat().st_size <= size)


# --- names and places ---


HOSTILE = ["../x", "/etc/x", "a/../../x", "a//x", "a\\x", "c:x", "x\n", ".x", "y" * 300]


@pytest.mark.parametrize("path", [f"{name}.gguf" for name in HOSTILE])
def test_a_hostile_name_is_refused(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    hub.files = {path: b"evil"}
    assert "has this name, which is refused" in fails(capsys, from_hub(hub, tmp_path / "a" / "out"))
    assert not hub.of("/resolve/") and not list(tmp_path.rglob("*"))


NO_INDEX = [
    b"",
    b"[]",
    b'{"weight_map": 1}',
    b'{"weight_map": {"a": [1]}}',
    b'{"weight_map": {"a": 1, "b": "x"}}',
    b"[" * 9999,
]


@pytest.mark.parametrize("index", NO_INDEX)
def test_an_index_that_is_none_is_an_error(hub: Hub, tmp_path: Path, capsys: Any, index: bytes) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index}
    assert "is no index of weights" in fails(capsys, from_hub(hub, tmp_path / "out"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "missing.safetensors"])
def test_an_index_cannot_name_what_the_repository_does_not_have(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index}
    assert f"index.json names {name}, which the repository does not have" in fails(
        capsys, from_hub(hub, tmp_path / "o")
    )


def test_two_files_that_would_get_one_name_are_refused(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    index = json.dumps({"weight_map": {"a": "a/x.safetensors", "b": "b/x.safetensors"}}).encode()
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index}
    hub.files |= {"a/x.safetensors": b"a", "b/x.safetensors": b"b"}
    assert "has x.safetensors twice" in fails(capsys, from_hub(hub, tmp_path / "out"))


def test_a_listing_that_lacks_sizes_or_hashes_is_no_hubs(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files, info = hf_files, hub.info
    for change in ({"size": None}, {"size": -1}, {"size": 1 << 60}, {"rfilename": 5}, {"lfs": None, "blobId": "../x"}):
        monkeypatch.setattr(hub, "info", lambda change=change: info() | {"siblings": [info()["siblings"][0] | change]})
        assert "does not answer as a hub does" in fails(capsys, from_hub(hub, tmp_path / "out")), change
    for sha in (None, 5, "main/../.."):
        monkeypatch.setattr(hub, "info", lambda sha=sha: info() | {"sha": sha})
        assert "does not answer as a hub does" in fails(capsys, from_hub(hub, tmp_path / "out")), sha


def test_a_link_in_the_way_is_not_followed(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, partial, outside = hf_files, tmp_path / "out.partial", tmp_path / "outside"
    partial.mkdir()
    (partial / ".download").write_text(f"{hub.url}/org/model\n")
    outside.write_text("mine")
    (partial / "config.json").symlink_to(outside)
    assert "config.json: cannot be written" in fails(capsys, from_hub(hub, tmp_path / "out"))
    assert outside.read_text() == "mine"


def test_what_is_there_already_is_checked_and_kept_and_never_overwritten(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, out = hf_files, tmp_path / "out"
    out.mkdir()  # an empty folder may be filled
    assert from_hub(hub, out) == 0
    hub.asked.clear()
    assert from_hub(hub, out) == 0
    assert "was already complete" in capsys.readouterr().out and not hub.of("/resolve/")
    content = hf_files["model.safetensors"]
    (out / "model.safetensors").write_bytes(content[:-1] + b"!")
    assert "is there already, without the right model.safetensors" in fails(capsys, from_hub(hub, out))
    (out / "model.safetensors").unlink()
    assert "is there already, without the right model.safetensors" in fails(capsys, from_hub(hub, out))
    (tmp_path / "file").write_text("mine")
    assert "is a file; a folder is needed" in fails(capsys, from_hub(hub, tmp_path / "file"))
    assert "cannot be made" in fails(capsys, from_hub(hub, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob("*.partial"))


def test_a_partial_folder_belongs_to_one_download_at_a_time(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files, partial = hf_files, tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").touch()
    assert "out.partial: is of no download; delete it" in fails(capsys, from_hub(hub, tmp_path / "out"))
    (partial / ".download").touch()
    assert "out.partial: is of no download; delete it" in fails(capsys, from_hub(hub, tmp_path / "out"))
    (partial / ".download").write_text("https://huggingface.co/org/other\n")
    assert "out.partial: is of https://huggingface.co/org/other" in fails(capsys, from_hub(hub, tmp_path / "out"))
    (partial / ".download").write_text(f"{hub.url}/org/model\n")
    assert "mine.txt: does not belong to this download" in fails(capsys, from_hub(hub, tmp_path / "out"))
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another download is at work there" in fails(capsys, from_hub(hub, tmp_path / "out"))
    assert (partial / "mine.txt").exists()
    os.close(lock)


def test_no_proxy_is_asked_for_this_machine(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    hub.files = hf_files
    assert from_hub(hub, tmp_path / "out") == 0


def test_a_download_that_was_given_up_before_it_had_begun_is_begun_again(
    hub: Hub, hf_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.files = hf_files
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".download").touch()
    assert from_hub(hub, tmp_path / "out") == 0 and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_disk_without_room_is_noticed_before_anything_is_brought(
    hub: Hub,
    hf_files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.files = hf_files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert "not enough disk space: 0.00 GB are still to come, 0.07 GB free" in fails(
        capsys, from_hub(hub, tmp_path / "out")
    )
    assert not hub.of("/resolve/") and not list(tmp_path.glob("out*"))


def test_what_makes_no_sense_is_refused_before_the_network_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("org/model")
    capsys.readouterr()
    for words, message in {
        ("../x",): "neither a link nor a repository",
        ("a/b/c",): "neither a link nor a repository",
        ("https://example.org/org/model",): "the link is neither Meta's",
        ("https://huggingface.co/datasets/a/b",): "the link is neither Meta's",
        ("https://[/x",): "is no address",
        ("a--b/c",): "neither a link nor a repository",
        ("a/b", "--model", "llama-2-7b"): "--model belongs to Meta's link",
        ("https://d.net/*?a=b", "--revision", "x"): "--revision belongs to a repository",
        ("https://d.net/*?a=b", "--format", "hf"): "--format hf: Meta's link leads to",
    }.items():
        assert message in fails(capsys, run(*words[:1], tmp_path / "out", *words[1:])), words


# --- Meta ---


def test_metas_link_brings_a_model_that_converts(
    bucket: Bucket, meta_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.files, out = in_bucket(meta_files), tmp_path / "out"
    link = bucket.link().replace("&", "&amp;")  # as some mail programs have it
    assert run(link, "--model", "Llama-2-13B-chat", "--list") == 0
    assert "* needed: 8 files" in capsys.readouterr().out and not list(tmp_path.glob("out*"))
    assert run(link, out, "--model", "Llama-2-13B-chat") == 0
    assert read(out) == meta_files | {"LICENSE": b"licence", "USE_POLICY.md": b"policy"}
    printed = capsys.readouterr()
    assert SIGNATURE not in printed.out + printed.err
    convert(out, tmp_path / "converted", progress=False)
    assert run(bucket.link(), out, "--model", "llama-2-13b-chat") == 0
    assert "was already complete" in capsys.readouterr().out


def test_a_model_with_its_own_tokenizer_and_without_licences_is_brought_from_its_folder(
    bucket: Bucket, meta_files: dict[str, bytes], tmp_path: Path
) -> None:
    names = ("params.json", "consolidated.00.pth", "checklist.chk", "tokenizer.model")
    bucket.files = {f"8b_instruction_tuned/{name}": meta_files[name] for name in names}
    assert run(bucket.link(), tmp_path / "out", "--model", "meta-llama-3-8b-instruct") == 0
    assert set(read(tmp_path / "out")) == set(names)


def test_what_the_link_of_an_interrupted_download_brought_is_continued_with_a_new_link(
    bucket: Bucket, meta_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.files, out = in_bucket(meta_files), tmp_path / "out"
    size = len(meta_files["consolidated.01.pth"])

    def expire() -> None:
        bucket.good = len(bucket.of("consolidated.01.pth")) < 3  # the first asks for the length, the next is cut

    bucket.moods["consolidated.01.pth"] = Mood(9, before=expire, cut=size // 3)
    line = fails(capsys, run(bucket.link(time.time() - 60), out, "--model", "llama-2-13b-chat"))
    assert re.search(r"refuses the link \(403\): it expired on 20.* UTC.*ask for a new one at https://.*is kept", line)
    assert not out.exists()
    there = (tmp_path / "out.partial" / "consolidated.01.pth").stat().st_size
    assert there > 0
    bucket.good = True
    bucket.moods.clear()
    bucket.asked.clear()
    (tmp_path / "out.partial" / "LICENSE").write_bytes(b"of ")  # without a hash, nothing is built on it
    assert run(bucket.link(), out, "--model", "llama-2-13b-chat") == 0
    assert [each["Range"] for each in bucket.of("consolidated.01.pth")] == ["bytes=0-0", f"bytes={there}-{size - 1}"]
    assert read(out) == meta_files | {"LICENSE": b"licence", "USE_POLICY.md": b"policy"}


def test_a_refused_link_says_so_before_anything_is_made(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, run(bucket.link(), tmp_path / "out", "--model", "llama-2-7b"))
    assert "Meta refuses the link (403): it is for other models, or was used too often" in line
    broken = re.sub("Policy=[^&]*", "Policy=nonsense", bucket.link())
    line = fails(capsys, run(broken, tmp_path / "out", "--model", "llama-2-7b"))
    assert "Meta refuses the link (403): it expired, it is for other models" in line and "24 hours" in line
    bucket.moods["/"] = Mood(9, 404)
    assert "127.0.0.1 answers 404 Not Found" in fails(
        capsys, run(bucket.link(), tmp_path / "out", "--model", "llama-2-7b")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["consolidated.01.pth", "tokenizer.model", "params.json"])
def test_a_file_that_differs_from_metas_checklist_never_gets_to_the_output(
    bucket: Bucket, meta_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bucket.files = in_bucket(meta_files)
    place = next(path for path in bucket.files if path.endswith(name))
    bucket.files[place] = bucket.files[place][:-1] + b"!"
    line = fails(capsys, run(bucket.link(), tmp_path / "out", "--model", "llama-2-13b-chat"))
    assert line.startswith(f"{name}: the content does not match its published hash (md5)")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_meta_does_not_have_is_not_passed_over(
    bucket: Bucket, meta_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.files = in_bucket(meta_files)
    del bucket.files["llama-2-13b-chat/consolidated.01.pth"]
    line = fails(capsys, run(bucket.link(), tmp_path / "out", "--model", "llama-2-13b-chat"))
    assert line.startswith("consolidated.01.pth: Meta refuses the link (403)")
    assert not list(tmp_path.glob("out*"))


def test_a_checklist_that_is_none_or_has_gaps_is_told(
    bucket: Bucket,
    meta_files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--model", "llama-2-13b-chat")
    bucket.files = in_bucket(meta_files | {"checklist.chk": b"<html>"})
    assert "checklist.chk: line 1 is no MD5" in fails(capsys, run(bucket.link(), tmp_path / "out", *words))
    monkeypatch.setattr(download_meta, "_LARGEST_CHECKLIST", 1000)
    bucket.files = in_bucket(meta_files | {"checklist.chk": b"\n" * 1001})
    assert "more than 1000 bytes" in fails(capsys, run(bucket.link(), tmp_path / "out", *words))
    bucket.files = in_bucket(meta_files | {"checklist.chk": b""})
    assert run(bucket.link(), tmp_path / "out", *words) == 0
    assert "consolidated.01.pth: no MD5 in checklist.chk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda link: link.replace("*", ""), "has no \\* before its"),
        (lambda link: link.partition("&")[0], "cut off .*single quotes"),
        (lambda link: "https://l.facebook.com/l.php?u=" + link, "copy its text"),
        (lambda link: link.replace("http://127.0.0.1", "http://download.llamameta.net"), "https is needed"),
    ],
)
def test_a_link_that_suffered_on_its_way_from_the_mail_is_explained(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[str], str], message: str
) -> None:
    link = damage(bucket.link().replace("127.0.0.1", "127.0.0.1"))
    if "*" not in link:
        link = link.replace(bucket.url, "https://download.llamameta.net")
    line = fails(capsys, run(link, tmp_path / "out", "--model", "llama-2-7b"))
    assert re.search(message, line), line
    assert not bucket.asked


def test_an_unknown_model_is_answered_with_those_that_are_near(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = "https://download.llamameta.net/*?Policy=p&Signature=s&Key-Pair-Id=k"
    assert "did you mean llama-2-7b" in fails(capsys, run(link, tmp_path / "out", "--model", "llama2-7b-chat"))
    assert "--model is needed with Meta's link: one of llama-2-7b, " in fails(capsys, run(link, tmp_path / "out"))
    assert "unknown; one of llama-2-7b, " in fails(capsys, run(link, tmp_path / "out", "--model", "gpt"))


LATER = {"LICENSE", "USE_POLICY.md"}
LLAMA_2 = LATER | {"tokenizer.model", "tokenizer_checklist.chk"}


@pytest.mark.parametrize(
    ("model", "folder", "shards", "beside"),
    [
        ("llama-2-7b", "llama-2-7b", 1, LLAMA_2),
        ("llama-2-13b-chat", "llama-2-13b-chat", 2, LLAMA_2),
        ("llama-2-70b-chat", "llama-2-70b-chat", 8, LLAMA_2),
        ("CodeLlama-34b-Python", "CodeLlama-34b-Python", 4, LATER),
        ("CodeLlama-70b-Instruct", "CodeLlama-70b-Instruct", 8, LATER),
        ("Meta-Llama-3-70B", "70b_pre_trained", 8, {"LICENSE", "USE_POLICY"}),
        ("Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct", 1, LATER),
    ],
)  # fmt: skip
def test_models_lie_where_metas_scripts_have_them(model: str, folder: str, shards: int, beside: set[str]) -> None:
    paths = download_meta.LAYOUTS[model].paths()
    inside = {f"consolidated.{shard:02d}.pth" for shard in range(shards)} | {"params.json", "checklist.chk"}
    inside |= {"tokenizer.model"} - beside
    assert paths == {name: name for name in beside} | {name: f"{folder}/{name}" for name in inside}


@pytest.mark.parametrize(
    ("endpoint", "given", "sent"),
    [
        ("https://mirror.example", None, TOKEN),
        ("http://localhost:1", None, TOKEN),
        ("http://mirror.example", None, None),
        ("http://mirror.example", "hf_given", "hf_given"),
    ],
)
def test_a_saved_token_is_not_sent_over_plain_http_to_another_machine(
    endpoint: str, given: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(download_hub.Repository, "_look_up", lambda _: (COMMIT, {}))
    made = download_hub.Repository("org/model", None, given, endpoint, print, plain_allowed=True)
    assert made._token == sent
