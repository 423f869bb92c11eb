"""How llama.cpp is set up and run, and that its check sees what is wrong; nothing is fetched and nothing compiled."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import random_tensors
from gguf import GGMLQuantizationType
from gguf_files import ARGS, llama_cpp_tensors, write_gguf

from formats.gguf import GGUFSource
from formats.meta import MetaSource
from tools import llamacpp_check, peers
from tools.peers import LlamaServer, PeerError

Q5_1 = GGMLQuantizationType.Q5_1


def refuse(*_: object) -> None:
    raise AssertionError("nothing is to be done")


def put_programs(folder: Path, names: tuple[str, ...] = peers.PROGRAMS) -> None:
    binaries = peers.sources(folder).parent / "build" / "bin"
    binaries.mkdir(parents=True)
    for name in names:
        (binaries / name).touch()


def script(path: Path, text: str) -> Path:
    """A program in Python."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


# --- setting up ---


def test_programs_that_are_there_are_neither_fetched_nor_compiled_again(tmp_path, monkeypatch, capsys):
    for name in ("_fetch", "_compile", "_run", "find_compiler"):
        monkeypatch.setattr(peers, name, refuse)
    put_programs(tmp_path)
    assert peers.main(["setup", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(peers.PROGRAMS)
    assert all(Path(line.split()[1]).is_file() for line in lines)


def test_one_missing_program_is_compiled(tmp_path, monkeypatch):
    put_programs(tmp_path, peers.PROGRAMS[1:])
    done, missing = [], peers.sources(tmp_path).parent / "build" / "bin" / peers.PROGRAMS[0]
    monkeypatch.setattr(peers, "find_compiler", lambda environment: "c++")
    monkeypatch.setattr(peers, "_build_tools", lambda folder: tmp_path)
    monkeypatch.setattr(peers, "_fetch", lambda folder: done.append("fetch"))
    monkeypatch.setattr(peers, "_compile", lambda *_: missing.touch())
    assert set(peers.setup(tmp_path)) == set(peers.PROGRAMS)
    assert done == ["fetch"]


def test_what_is_not_set_up_says_how_to_set_it_up(tmp_path, capsys):
    put_programs(tmp_path, peers.PROGRAMS[1:])
    assert peers.main(["where", "--folder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert (
        f"no {peers.PROGRAMS[0]};" in error
        and "python -m tools.peers setup" in error
        and peers.PROGRAMS[1] not in error
    )


def test_without_a_compiler_nothing_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(peers, "_run", refuse)
    assert peers.main(["setup", "--folder", str(tmp_path / "peers")]) == 1
    assert "no C++ compiler was found: install one" in capsys.readouterr().err
    assert not (tmp_path / "peers").exists()


def test_the_compiler_is_the_one_that_cxx_names_else_the_first_that_is_there(tmp_path):
    script(tmp_path / "g++", "")
    script(tmp_path / "mine", "")
    assert peers.find_compiler({"PATH": str(tmp_path)}) == "g++"
    assert peers.find_compiler({"PATH": str(tmp_path), "CXX": "mine -O1"}) == "mine -O1"
    with pytest.raises(PeerError, match="CXX names 'theirs', which was not found"):
        peers.find_compiler({"PATH": str(tmp_path), "CXX": "theirs"})


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_compiler", lambda environment: "c++")
    monkeypatch.setattr(peers, "_run", refuse)
    monkeypatch.setattr(peers, "SPACE_NEEDED", 1 << 80)
    assert peers.main(["setup", "--folder", str(tmp_path)]) == 1
    assert "are needed" in capsys.readouterr().err


def test_a_step_that_fails_is_one_line_and_a_status(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers, "find_compiler", lambda environment: "c++")
    script(tmp_path / "python", "import sys; print('no network'); sys.exit(1)")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "python").rename(tmp_path / "venv" / "bin" / "python")
    assert peers.main(["setup", "--folder", str(tmp_path)]) == 1
    out, error = capfd.readouterr()
    assert out == "" and error.splitlines()[0] == "no network"
    assert "peers: error: pip failed; see above" in error.splitlines()[-1]


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_only_the_one_folder_of_an_archive_is_unpacked(tmp_path):
    files = {"a/b/c.txt": b"c", "a/b/d/e.txt": b"e", "a/other.txt": b"o", "a/bc/x.txt": b"x"}
    peers.unpack(archive(tmp_path / "a.tar.gz", files), "a/b", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.txt")}
    assert found == {"c.txt": b"c", "d/e.txt": b"e"}
    with pytest.raises(PeerError, match=r"a\.tar\.gz: holds no b"):
        peers.unpack(tmp_path / "a.tar.gz", "b", tmp_path / "none")


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    path = archive(tmp_path / "a.tar.gz", {"a/b/../../../outside.txt": b""})
    with pytest.raises(PeerError, match="would lie outside its folder"):
        peers.unpack(path, "a/b", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("outside.txt"))


# --- the server ---

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.send(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send(400 if body.get("bad") else 200, {"path": self.path, "body": body, "arguments": sys.argv[1:]})
    def send(self, status, answer):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_the_server_is_asked_while_its_block_lasts(tmp_path):
    program = script(tmp_path / "server", SERVER)
    with LlamaServer(program, tmp_path / "m.gguf", "--more", slots=3, context=100) as server:
        answer = server.ask("/x", {"text": "é"})
        assert answer["path"] == "/x" and answer["body"] == {"text": "é"}
        words = " ".join(answer["arguments"])
        assert f"--model {tmp_path / 'm.gguf'} " in words and words.endswith(" --more")
        assert "--parallel 3 --ctx-size 300 " in words
        with pytest.raises(PeerError, match=r"refused /y \(400\)"):
            server.ask("/y", {"bad": True})
    with pytest.raises(ConnectionRefusedError):
        server.ask("/x", {})


def test_a_server_that_ends_at_once_says_why(tmp_path):
    program = script(tmp_path / "server", "import sys; sys.exit('unknown model architecture')")
    with pytest.raises(PeerError, match="ended at once:\nunknown model architecture"):
        with LlamaServer(program, tmp_path / "m.gguf"):
            pass


# --- the check ---


def test_a_share_is_right_from_what_is_needed_on():
    assert llamacpp_check.share("x", [True] * 49 + [False], 0.98).right is True
    assert llamacpp_check.share("x", [True] * 48 + [False] * 2, 0.98).right is False
    assert llamacpp_check.share("x", [False], None).right is None
    assert llamacpp_check.share("x", [], 0.98).right is False


def test_metadata_must_hold_theirs_and_may_hold_more():
    same = llamacpp_check.differences("x", {"a": 1, "b": 2}, {"a": 1})
    assert same.right and same.found == "1 of 1; and b"
    for ours in ({"a": 2, "b": 2}, {"b": 2}):
        assert not llamacpp_check.differences("x", ours, {"a": 1, "b": 2}).right
    assert "a (missing)" in llamacpp_check.differences("x", {}, {"a": None}).found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "a.gguf", llama_cpp_tensors(random_tensors(ARGS), ARGS), kind=Q5_1)
    return tmp_path / "a.gguf"


def test_a_file_that_is_read_as_the_package_reads_it_is_right(file):
    row = llamacpp_check.compare_tensors("x", file)
    assert row.right and row.found == "12 of 12 tensors equal (Q5_1)"
    assert llamacpp_check.compare_dequantized("x", file, file).right


@pytest.mark.parametrize("fault", ["one bit", "another tensor", "not a number"])
def test_a_fault_in_the_reader_shows(file, fault, monkeypatch):
    read, kept = GGUFSource.read, {}

    def faulty(self: GGUFSource, name: str) -> torch.Tensor:
        tensor = read(self, name).clone()
        if fault == "one bit" and name == "layers.0.attention.wv.weight":
            tensor.view(torch.int32)[1, 7] ^= 1
        if fault == "another tensor" and name.endswith(("wk.weight", "wv.weight")):
            return kept.setdefault("first", tensor)
        if fault == "not a number" and name == "output.weight":
            tensor[0, 0] = np.nan
        return tensor

    monkeypatch.setattr(GGUFSource, "read", faulty)
    row = llamacpp_check.compare_tensors("x", file)
    assert not row.right and row.found.startswith("11 of 12")
    assert llamacpp_check.compare_dequantized("x", file, file).right == (fault == "one bit")


def test_a_tensor_that_is_not_in_the_file_is_not_right(file, monkeypatch):
    theirs = llamacpp_check.package_tensors
    monkeypatch.setattr(llamacpp_check, "package_tensors", lambda *given: list(theirs(*given))[1:])
    assert not llamacpp_check.compare_tensors("x", file).right


def test_the_random_llama_3_is_one(tmp_path):
    tokens = llamacpp_check.write_llama3(tmp_path / "llama3")
    with MetaSource(tmp_path / "llama3") as source:
        assert source.args.rope_scaling is not None and source.args.rope_theta == 500000.0
        assert source.args.vocab_size == tokens + 256
        vocabulary = source.vocabulary()
        assert vocabulary.kind == "bpe" and len(vocabulary.tokens) == tokens + 256 and len(vocabulary.merges) > 500


def test_an_unknown_check_is_refused(capsys):
    with pytest.raises(SystemExit):
        llamacpp_check.main(["answer"])
    assert "'answer' is no check; allowed: answers, llama3" in capsys.readouterr().err
