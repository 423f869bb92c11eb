"""A repository of the Hugging Face hub: which of its files are a checkpoint, and their hashes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from tools.download_http import (
    TRANSIENT,
    Client,
    DownloadError,
    Hiccup,
    check_scheme,
    is_local,
    printable,
    retry_after,
    split_url,
    status_text,
)
from tools.download_transfer import RemoteFile

ENDPOINT = "https://huggingface.co"
FORMATS = ("auto", "meta", "hf", "gguf")

# Beside the weights; licences travel with them.
_HF_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json"
    r"|tokenizer\.model|chat_template\.jinja"
)
_META_FILES = re.compile(r"consolidated\.\d+\.pth|params\.json|(tokenizer_)?checklist\.chk|tokenizer\.model")
_LICENCES = re.compile(r"(LICENSE|USE_POLICY)(\.\w+)?")
_GGUF_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
# Each whole, and in parts by an index; safetensors come first.
_WEIGHTS = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
_LARGEST_INDEX = 64 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Entry:
    """A file of the repository, as the hub lists it."""

    size: int
    algorithm: str
    digest: str


class Repository:
    """One repository at one commit."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | None,
        endpoint: str,
        note: Callable[[str], object],
        *,
        plain_allowed: bool = False,
    ) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise DownloadError(
                f"{printable(name)}: is neither a link nor a repository, such as meta-llama/Llama-2-7b-hf"
            ) from None
        self.endpoint = endpoint.rstrip("/")
        if not (plain_allowed and self.endpoint.startswith("http://")):
            check_scheme("the hub's endpoint", self.endpoint)
        self._name, self._revision = name, revision
        # One that was saved for the hub is not shown to whoever listens on the way to another place.
        where = split_url(self.endpoint)
        saved = get_token() if where.scheme == "https" or is_local(where.hostname) else None
        self._token = (token or "").strip() or saved
        self.label = f"{self.endpoint}/{name}"
        headers = build_hf_headers(token=self._token or False, library_name="llama-on-torchserve")
        self.client = Client(headers, self._explain, note)
        self._commit, self.listing = self._look_up()

    def choose(self, wanted: str, file: str | None) -> list[str]:
        """The paths of a checkpoint in the wanted format; see the function `choose`."""
        return choose(self.listing, wanted, file, self._indexed)

    def files(self, paths: list[str]) -> list[RemoteFile]:
        """The files at these paths, each to be brought under its plain name."""
        found: dict[str, RemoteFile] = {}
        for path in paths:
            entry, name = self.listing[path], plain_name(path)
            if name in found:
                raise DownloadError(f"{self._name}: has {name} twice")
            found[name] = RemoteFile(name, self._url(path), entry.size, entry.algorithm, entry.digest)
        return list(found.values())

    def _look_up(self) -> tuple[str, dict[str, Entry]]:
        """The commit that the revision means now, and its files."""
        api = HfApi(endpoint=self.endpoint, token=self._token or False)

        def attempt() -> tuple[str, dict[str, Entry]]:
            try:
                info = api.model_info(self._name, revision=self._revision, files_metadata=True, timeout=_TIMEOUT)
                return _commit(info.sha), {each.rfilename: _entry(each) for each in info.siblings or []}
            except OfflineModeIsEnabled:
                raise DownloadError("HF_HUB_OFFLINE is set; unset it to download") from None
            except HfHubHTTPError as error:
                status, headers = error.response.status_code, error.response.headers
                if status in TRANSIENT:
                    raise Hiccup(status_text(status), retry_after(headers)) from None
                raise DownloadError(self._explain(self._name, status, headers)) from None
            except HTTPError as error:  # the base of what its HTTP library raises, connections and time-outs
                kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
                raise Hiccup(f"cannot reach {split_url(self.endpoint).hostname} ({kind})") from None
            except (ValueError, TypeError, LookupError, AttributeError):
                raise DownloadError(f"{self.endpoint}: does not answer as a hub does; check the endpoint") from None

        return self.client.patiently(self._name, attempt)

    def _indexed(self, path: str) -> list[str]:
        """The files that an index of weights names."""
        content = self.client.read(path, self._url(path), _LARGEST_INDEX)
        try:
            names = set(json.loads(content)["weight_map"].values())
            return sorted(names)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise DownloadError(f"{path}: is no index of weights") from None

    def _url(self, path: str) -> str:
        return hf_hub_url(self._name, path, revision=self._commit, endpoint=self.endpoint)

    def _explain(self, name: str, status: int, headers: Mapping[str, str]) -> str:
        """An answer of the hub in one line that says what to do."""
        code, said = headers.get("X-Error-Code", ""), printable(headers.get("X-Error-Message", ""))[:200]
        page, known = f"{self.endpoint}/{self._name}", "" if self._token else " (`hf auth login`, or HF_TOKEN=...)"
        if code == "GatedRepo" and self._token:
            return (
                f"{self._name} is gated, and your token's account may not read it: ask for access at {page} and wait "
                "for the answer; a fine-grained token must also be allowed to read public gated repositories"
            )
        if code == "GatedRepo":
            return f"{self._name} is gated: accept its licence at {page}, then log in{known}"
        if code == "RevisionNotFound":
            return f"{self._name} has no revision {printable(self._revision)}; see {page}/refs"
        if code == "EntryNotFound":
            return f"{self._name} has no file {printable(name)} any more; run the same command again"
        if status == 401 and self._token and code != "RepoNotFound":
            return f"the token is not accepted; make a new one at {self.endpoint}/settings/tokens"
        if code == "RepoNotFound" or status in (401, 404):
            return f"{self._name}: no such repository at {self.endpoint}, or a private one: check it, or log in{known}"
        return f"{printable(name)}: {self.endpoint} answers {status_text(status)}{f': {said}' if said else ''}"


def choose(
    listing: Mapping[str, Entry], wanted: str, file: str | None, indexed: Callable[[str], list[str]]
) -> list[str]:
    """The paths of a checkpoint in the wanted format: no weights twice, and nothing that is not needed.

    `indexed` gives the files that an index in the repository names. With "auto", safetensors come before Meta's files,
    those before .bin, and GGUF is last; `file` says which GGUF, or which folder of Meta's files.
    """
    if file is not None and wanted == "auto":
        wanted = "gguf" if file.endswith(".gguf") else "meta"
    if file is not None and wanted == "hf":
        raise DownloadError("--file is for .gguf files and folders of Meta's, not for --format hf")
    kinds: list[tuple[str, Callable[[], list[str]]]] = [
        ("hf", lambda: _hf(listing, "model.safetensors", indexed)),
        ("meta", lambda: _meta(listing, file)),
        ("hf", lambda: _hf(listing, "pytorch_model.bin", indexed)),
        ("gguf", lambda: _gguf(listing, file)),
    ]
    for kind, find in kinds:
        if wanted in ("auto", kind) and (found := find()):
            return [*(path for path in listing if _LICENCES.fullmatch(path)), *found]
    what = "checkpoint" if wanted == "auto" else f"checkpoint of format {wanted}"
    raise DownloadError(f"the repository holds no {what}{f' at {printable(file)}' if file else ''}; see --list")


def _hf(listing: Mapping[str, Entry], whole: str, indexed: Callable[[str], list[str]]) -> list[str]:
    index = _WEIGHTS[whole]
    if "config.json" not in listing or not {whole, index} & set(listing):
        return []
    weights = [whole] if whole in listing else [index, *indexed(index)]
    for path in weights:
        if path not in listing:
            raise DownloadError(f"{index} names {printable(path)}, which the repository does not have")
    return [*(path for path in listing if _HF_FILES.fullmatch(path)), *weights]


def _meta(listing: Mapping[str, Entry], folder: str | None) -> list[str]:
    """Meta's files lie at the root of the older repositories, in original/ in the newer."""
    shards = {path.rpartition("/")[0] for path in listing if re.search(r"(^|/)consolidated\.\d+\.pth$", path)}
    folders = {each for each in shards if f"{each}/params.json".lstrip("/") in listing}
    if folder is not None:
        folders &= {folder.strip("/")}
    if len(folders) > 1 and not folders & {"", "original"}:
        raise DownloadError(f"several folders hold Meta's files; choose with --file: {_few(sorted(folders))}")
    if not folders:
        return []
    chosen = min(folders, key=lambda each: (each not in ("", "original"), each))
    parts = [path.rpartition("/") for path in listing]
    found = ["".join(part) for part in parts if part[0] == chosen and _META_FILES.fullmatch(part[2])]
    if chosen and f"{chosen}/tokenizer.model" not in found and "tokenizer.model" in listing:
        found.append("tokenizer.model")
    return found


def _gguf(listing: Mapping[str, Entry], file: str | None) -> list[str]:
    """One model: a single file, or all the parts that it was split into."""
    models: dict[str, list[str]] = {}
    for path in listing:
        if path.endswith(".gguf"):
            models.setdefault(_GGUF_PART.sub(r"\1-of-\2", path), []).append(path)
    if file is not None:
        return next((parts for parts in models.values() if file in parts), [])
    if len(models) > 1:
        names = _few(sorted(parts[0] for parts in models.values()))
        raise DownloadError(f"several .gguf files; choose with --file (--list has their sizes): {names}")
    return next(iter(models.values()), [])


def _few(names: list[str]) -> str:
    return ", ".join(map(printable, names[:20])) + (", ..." if len(names) > 20 else "")


def plain_name(path: str) -> str:
    """The last part of a path in a repository, which is the file's name here; refused if it could lead elsewhere."""
    parts = path.split("/")
    plain = path.isprintable() and not re.search(r"[\\:]", path) and len(parts[-1].encode(errors="replace")) <= 200
    if not plain or any(part in ("", ".", "..") for part in parts) or parts[-1].startswith("."):
        raise DownloadError(f"{printable(path)[:80]}: the repository has this name, which is refused for a file here")
    return parts[-1]


def _commit(sha: object) -> str:
    if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{40}", sha):
        raise ValueError("no commit")
    return sha


def _entry(sibling: RepoSibling) -> Entry:
    """What the hub says of a file, checked: the SHA-256 of a large one, git's own hash of a small one."""
    lfs, size = sibling.lfs, sibling.size
    algorithm, digest = ("sha256", lfs.sha256) if lfs else ("git", sibling.blob_id)
    if not isinstance(sibling.rfilename, str) or not isinstance(size, int) or not 0 <= size < 1 << 50:
        raise ValueError("no size")
    if not re.fullmatch("[0-9a-f]{64}" if lfs else "[0-9a-f]{40}", digest or ""):
        raise ValueError("no hash")
    return Entry(size, algorithm, digest)
