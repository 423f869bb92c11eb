"""Servers of files on this machine for tests: one like the Hugging Face hub, one like Meta's, both with moods."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret_that_nobody_else_may_see"
SIGNATURE = "a-signature-that-nobody-may-see"


@dataclass
class Mood:
    """How a server answers a number of requests other than it should."""

    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Callable[[bytes], bytes] | None = None
    cut: int | None = None
    before: Callable[[], object] | None = None


class Server(ThreadingHTTPServer):
    """Files in memory by their path; it remembers what it was asked, and has moods by a word in the path."""

    daemon_threads = True
    ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Message]] = []
        self.moods: dict[str, Mood] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""

    def answer(self, handler: Handler) -> None:
        raise NotImplementedError

    def of(self, word: str) -> list[Message]:
        """The headers of every request with this word in its path."""
        return [headers for _, path, headers in self.asked if word in path]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers))
        self.mood = Mood()
        for word, mood in self.server.moods.items():
            if word in self.path and mood.times:
                self.mood, mood.times = mood, mood.times - 1
        if self.mood.before:
            self.mood.before()
        if self.mood.status:
            self.send(self.mood.status, b"", **self.mood.headers)
        else:
            self.server.answer(self)

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.mood.cut])

    def send_file(self, content: bytes, **headers: str) -> None:
        """A file, or the range of it that was asked for."""
        if self.mood.body:
            content = self.mood.body(content)
        asked = self.headers.get("Range")
        if not asked or not self.server.ranges:
            return self.send(200, content, **headers | self.mood.headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if int(first) >= len(content):
            return self.send(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[int(first) : int(last) + 1 if last else None]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.send(206, part, **{"Content-Range": place} | headers | self.mood.headers)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Hub(Server):
    """One repository, "org/model": large files are elsewhere (the same server by another name), as at the real hub."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.gated = self.private = False
        self.refuses_tokens = False

    def is_large(self, path: str) -> bool:
        return path.endswith((".safetensors", ".bin", ".pth", ".gguf", "tokenizer.model"))

    def answer(self, handler: Handler) -> None:
        path, may = unquote(urlsplit(handler.path).path), handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/elsewhere/"):
            return handler.send_file(
                next(c for c in self.files.values() if path.endswith(hashlib.sha256(c).hexdigest()))
            )
        if self.refuses_tokens:
            return handler.send(401, b"", X_Error_Message="Invalid credentials in Authorization header")
        if "org/model" not in path or (self.private and not may):
            return handler.send(404 if may else 401, b"", X_Error_Code="RepoNotFound", X_Error_Message="not found")
        revision = re.split("/(?:resolve|revision|tree)/", path)[-1].split("/")[0]
        if path != "/api/models/org/model" and revision not in ("main", "v1", COMMIT):
            return handler.send(404, b"", X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            return handler.send(200, json.dumps(self.tree()).encode(), Content_Type="application/json")
        if path.startswith("/api/"):
            return handler.send(200, json.dumps(self.info()).encode(), Content_Type="application/json")
        name = path.split(f"/resolve/{revision}/", 1)[1]
        if name not in self.files:
            return handler.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if self.gated and not may:
            status = 403 if "Authorization" in handler.headers else 401
            return handler.send(status, b"", X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        content = self.files[name]
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(content)}"'}
        if not self.is_large(name):
            return handler.send_file(content, **about)
        sha256 = hashlib.sha256(content).hexdigest()
        about |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
        host = f"http://localhost:{self.server_port}"
        return handler.send(302, b"", Location=f"{host}/elsewhere/{name}/{sha256}?X-Amz-Signature=x", **about)

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if self.is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
            siblings.append(entry)
        return {"id": "org/model", "sha": COMMIT, "gated": "manual" if self.gated else False, "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        """The other form in which the hub lists files."""
        entries = []
        for each in self.info()["siblings"]:
            entry = {"type": "file", "path": each["rfilename"], "oid": each["blobId"], "size": each["size"]}
            if "lfs" in each:
                entry["lfs"] = {"oid": each["lfs"]["sha256"], "size": each["size"], "pointerSize": 130}
            entries.append(entry)
        return entries


class Bucket(Server):
    """Meta's server: it wants a signature and wget, does not answer HEAD, and says 403 for whatever is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.good = True

    def answer(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        good = self.good and parse_qs(parts.query).get("Signature") == [SIGNATURE]
        good = good and "wget" in handler.headers["User-Agent"].lower() and handler.command == "GET"
        if not good or parts.path.lstrip("/") not in self.files:
            return handler.send(403, b"<html>Forbidden</html>")
        return handler.send_file(self.files[parts.path.lstrip("/")])

    def link(self, ends: float | None = None) -> str:
        policy = {"Statement": [{"Condition": {"DateLessThan": {"AWS:EpochTime": ends or time.time() + 3600}}}]}
        coded = base64.b64encode(json.dumps(policy).encode()).decode().translate(str.maketrans("+=/", "-_~"))
        return f"{self.url}/*?Policy={coded}&Signature={SIGNATURE}&Key-Pair-Id=K15"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def running(server: Server) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
