"""Meta's own files, by the presigned link of its e-mail."""

from __future__ import annotations

import base64
import binascii
import difflib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qs

from tools.download_http import Client, DownloadError, Refused, check_scheme, printable, split_url, status_text
from tools.download_transfer import RemoteFile

ASK_AGAIN = "https://www.llama.com/llama-downloads/"

# Meta's servers turned away what did not call itself wget, which its own download.sh uses.
_HEADERS = {"User-Agent": "Wget/1.21.4"}
_LARGEST_CHECKLIST = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Where the server has a model: its folder there, its shards, and what lies beside the folder."""

    folder: str
    shards: int
    shared_tokenizer: bool = False
    policy: str = "USE_POLICY.md"

    def paths(self) -> dict[str, str]:
        """Every file's place on the server, by its name here."""
        names = [f"consolidated.{shard:02d}.pth" for shard in range(self.shards)] + ["params.json", "checklist.chk"]
        tokenizer = ["tokenizer.model", "tokenizer_checklist.chk"] if self.shared_tokenizer else []
        inside = names if self.shared_tokenizer else [*names, "tokenizer.model"]
        return {name: name for name in ("LICENSE", self.policy, *tokenizer)} | {
            name: f"{self.folder}/{name}" for name in inside
        }


def _layouts() -> dict[str, Layout]:
    """What Meta publishes: Llama 2, Code Llama and 3 as in their download.sh, 3.1 and later as in llama-models."""
    found = {}
    for size, shards in {"7b": 1, "13b": 2, "70b": 8}.items():
        for kind in ("", "-chat"):
            found[f"llama-2-{size}{kind}"] = Layout(f"llama-2-{size}{kind}", shards, shared_tokenizer=True)
    for size, shards in {"7b": 1, "13b": 2, "34b": 4, "70b": 8}.items():
        for kind in ("", "-Python", "-Instruct"):
            found[f"CodeLlama-{size}{kind}"] = Layout(f"CodeLlama-{size}{kind}", shards)
    for size, shards in {"8b": 1, "70b": 8}.items():
        for kind, folder in {"": "pre_trained", "-Instruct": "instruction_tuned"}.items():
            found[f"Meta-Llama-3-{size.upper()}{kind}"] = Layout(f"{size}_{folder}", shards, policy="USE_POLICY")
    for size, shards in {"3.1-8B": 1, "3.1-70B": 8, "3.2-1B": 1, "3.2-3B": 1}.items():
        for kind in ("", "-Instruct"):
            found[f"Llama-{size}{kind}"] = Layout(f"Llama-{size}{kind}", shards)
    return found | {"Llama-3.3-70B-Instruct": Layout("Llama-3.3-70B-Instruct", 8)}


LAYOUTS = _layouts()


class MetaLink:
    """One model behind one link."""

    def __init__(self, link: str, model: str | None, note: Callable[[str], object]) -> None:
        self._link = _checked_link(link)
        self._name, self._layout = _find_layout(model)
        self.label = f"Meta's {self._name}"
        self.client = Client(_HEADERS, self._explain, note)
        self._note = note

    def files(self) -> list[RemoteFile]:
        """The model's files, with the lengths and the MD5s that Meta states."""
        found, paths = [], self._layout.paths()
        sums: dict[str, str] = {}
        for name in (name for name in paths if name.endswith(".chk")):
            sums |= _md5s(name, self.client.read(name, self._url(paths[name]), _LARGEST_CHECKLIST))
        for name, path in paths.items():
            try:
                size = self.client.size(name, self._url(path))
            except Refused as refused:
                # Not every link has these two; where they lack, the server does not tell 404 from 403.
                if name in ("LICENSE", self._layout.policy) and refused.status in (403, 404):
                    continue
                raise
            if name.endswith(".pth") and name not in sums:
                self._note(f"{name}: no MD5 in checklist.chk, so it cannot be checked or continued later")
            found.append(RemoteFile(name, self._url(path), size, "md5" if name in sums else "", sums.get(name, "")))
        return found

    def _url(self, path: str) -> str:
        return self._link.replace("*", path, 1)

    def _explain(self, name: str, status: int, headers: Mapping[str, str]) -> str:
        if status == 403:
            ended = _expiry(self._link)
            why = "it is for other models, or was used too often"
            if ended is not None and ended < datetime.now(UTC):
                why = f"it expired on {ended:%Y-%m-%d at %H:%M} UTC"
            elif ended is None:
                why = f"it expired, {why}"
            return (
                f"{name}: Meta refuses the link (403): {why}. Links last 24 hours and a few downloads: ask for a new "
                f"one at {ASK_AGAIN} and run the same command with it; what was brought is kept"
            )
        return f"{name}: {split_url(self._link).hostname} answers {status_text(status)}"


def _find_layout(model: str | None) -> tuple[str, Layout]:
    names = {name.lower(): name for name in LAYOUTS}
    if model is None:
        raise DownloadError(f"--model is needed with Meta's link: one of {', '.join(LAYOUTS)}")
    if model.lower() not in names:
        close = difflib.get_close_matches(model.lower(), names, n=3)
        known = f"one of {', '.join(LAYOUTS)}"
        hint = f"did you mean {' or '.join(names[name] for name in close)}?" if close else known
        raise DownloadError(f"--model {printable(model)}: unknown; {hint}")
    return names[model.lower()], LAYOUTS[names[model.lower()]]


def _checked_link(link: str) -> str:
    """The link as Meta meant it, or what went wrong on its way from the e-mail."""
    link = html.unescape(link.strip())
    parts = split_url(link)
    if (parts.hostname or "").endswith("facebook.com"):
        raise DownloadError(
            "the link leads over facebook.com: copy its text, not its target; it begins with https://download"
        )
    check_scheme("the link", link)
    if parts.path.count("*") != 1:
        raise DownloadError("the link has no * before its ?; put it in single quotes, as it stands in the e-mail")
    query = parse_qs(parts.query)
    if not {"Policy", "Signature", "Key-Pair-Id"} <= set(query):
        raise DownloadError("the link is cut off (Policy, Signature and Key-Pair-Id); put it in single quotes")
    return link


def _expiry(link: str) -> datetime | None:
    """When the link ends, which its policy says; None if that cannot be read."""
    policy = parse_qs(split_url(link).query)["Policy"][0]
    try:
        statement = json.loads(base64.b64decode(policy.translate(str.maketrans("-_~", "+=/")), validate=True))
        moment = statement["Statement"][0]["Condition"]["DateLessThan"]["AWS:EpochTime"]
        return datetime.fromtimestamp(moment, UTC)
    except (ValueError, TypeError, LookupError, OverflowError, OSError, RecursionError, binascii.Error):
        return None


def _md5s(name: str, content: bytes) -> dict[str, str]:
    """A checklist as md5sum writes it."""
    sums = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](?:\./)?([^/\\]+)", line.strip())
        if found:
            sums[found[2]] = found[1].lower()
        elif line.strip():
            raise DownloadError(f"{name}: line {number} is no MD5 and file name; the server sent something else")
    return sums
