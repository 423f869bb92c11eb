"""Bring a Llama checkpoint: from the Hugging Face hub, or from Meta by the link of its e-mail.

python -m tools.download meta-llama/Llama-2-7b-chat-hf ~/llama-2-7b-chat
python -m tools.download 'https://download.llamameta.net/*?Policy=...' ~/llama-2-7b-chat --model llama-2-7b-chat
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from command_line import Parser
from formats.output import OutputError, put_in_place
from formats.source import byte_bar
from tools.download_http import Client, DownloadError, printable, split_url
from tools.download_hub import ENDPOINT, FORMATS, Repository
from tools.download_meta import LAYOUTS, MetaLink
from tools.download_transfer import RemoteFile, bring_all, is_right

MARKER = ".download"

# Left free on the disk: the file system needs some for itself.
_SPARE = 64 << 20


def download(client: Client, label: str, files: list[RemoteFile], target: Path) -> bool:
    """Bring the files to the folder `target`, which appears complete and checked; False if it was there already.

    Until then they grow in `target.partial`, from which the next run of the same download goes on.
    """
    if _is_there(target, files):
        return False
    with _partial(target, label, files) as folder:
        _check_folder(folder, files)
        bring_all(client, files, folder)
        put_in_place(folder, target)
    (target / MARKER).unlink()
    return True


def _is_there(target: Path, files: list[RemoteFile]) -> bool:
    """Whether the target is this very download; anything else that is there is an error."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not target.is_dir():
        raise DownloadError(f"{target}: is a file; a folder is needed")
    print(f"{target} is there already; checking it", file=sys.stderr)
    with byte_bar(sum(file.size for file in files), "checking", progress=True) as bar:
        for file in files:
            if not is_right(target / file.name, file, bar.update):
                raise DownloadError(f"{target}: is there already, without the right {file.name}: choose another folder")
    return True


@contextlib.contextmanager
def _partial(target: Path, label: str, files: list[RemoteFile]) -> Iterator[Path]:
    """The folder in which the download grows, ours alone; it stays if something was brought."""
    folder = target.with_name(f"{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{folder}: another download is at work there") from None
        except OSError:
            pass  # a file system without locks
        _claim(folder, label)
        try:
            yield folder
        finally:
            _tidy(folder, files)
    finally:
        os.close(lock)


def _claim(folder: Path, label: str) -> None:
    """Write down whose folder this is, or refuse one that is of something else."""
    marker = folder / MARKER
    whose = marker.read_text(errors="replace").strip() if marker.is_file() else ""
    if not whose and all(path == marker for path in folder.iterdir()):  # new, or given up before that was written
        marker.write_text(f"{label}\n")
    elif whose != label:
        found = printable(whose)[:200] or "no download"
        raise DownloadError(f"{folder}: is of {found}; delete it, or choose another output")


def _tidy(folder: Path, files: list[RemoteFile]) -> None:
    """Remove files that were not begun, and a folder in which nothing was."""
    with contextlib.suppress(OSError):  # most often since it was put in place
        for path in [folder / file.name for file in files]:
            if path.is_file() and not path.lstat().st_size:
                path.unlink()
        if [path.name for path in folder.iterdir()] == [MARKER]:
            (folder / MARKER).unlink()
            folder.rmdir()


def _check_folder(folder: Path, files: list[RemoteFile]) -> None:
    """Refuse a folder with what would not belong to the output, or without room for what is still to come."""
    needed, there, names = sum(file.size for file in files), 0, {file.name for file in files}
    for path in folder.iterdir():
        if path.name not in names | {MARKER}:
            raise DownloadError(f"{path}: does not belong to this download; delete it, or choose another output")
        there += path.lstat().st_size
    free = shutil.disk_usage(folder).free
    if free < needed - there + _SPARE:
        raise DownloadError(
            f"{folder.parent}: not enough disk space: {(needed - there) / 1e9:.2f} GB are still to come, "
            f"{free / 1e9:.2f} GB free"
        )


def _is_metas(source: str) -> bool:
    host = split_url(source).hostname or ""
    return "://" in source and ("*" in source or host.endswith(("llamameta.net", "facebook.com")))


def _from_meta(flags: argparse.Namespace) -> tuple[MetaLink, list[RemoteFile]]:
    """What Meta's link leads to."""
    for name in ("revision", "token", "endpoint", "file"):
        if getattr(flags, name) is not None:
            raise DownloadError(f"--{name} belongs to a repository, not to Meta's link")
    if flags.format not in ("auto", "meta"):
        raise DownloadError(f"--format {flags.format}: Meta's link leads to files of format meta only")
    link = MetaLink(flags.source, flags.model, _note)
    files = link.files()
    if flags.list:
        _list({file.name: file.size for file in files}, {file.name for file in files})
    return link, files


def _from_hub(flags: argparse.Namespace) -> tuple[Repository, list[RemoteFile]]:
    """What a repository has of the wanted format; it may be named by the address of its page, too."""
    if flags.model is not None:
        raise DownloadError("--model belongs to Meta's link; a repository holds one model")
    name, revision = flags.source, flags.revision
    endpoint = flags.endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT
    if "://" in name:
        parts = split_url(name)
        page = re.fullmatch(r"/([^/]+/[^/]+)(?:/tree/([^/]+))?/?", parts.path)
        if parts.hostname not in (split_url(endpoint).hostname, "huggingface.co", "hf.co") or not page:
            raise DownloadError("the link is neither Meta's (with a * and a signature) nor a repository of the hub")
        name, revision = page[1], revision or page[2]
    repository = Repository(name, revision, flags.token, endpoint, _note, plain_allowed=flags.endpoint is not None)
    paths: list[str] = []
    try:
        paths = repository.choose(flags.format, flags.file)
    finally:  # also where nothing can be chosen: the list shows why
        if flags.list:
            _list({path: entry.size for path, entry in repository.listing.items()}, set(paths))
    return repository, repository.files(paths)


def _list(sizes: dict[str, int], chosen: set[str]) -> None:
    for path in sorted(sizes):
        print(f"{'*' if path in chosen else ' '} {_size(sizes[path]):>7}  {printable(path)}")
    if chosen:
        print(f"* needed: {len(chosen)} files, {_size(sum(sizes[path] for path in chosen))}")


def _size(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


def _note(text: str) -> None:
    """A line on stderr in the place of the progress bar, which comes again below it."""
    clear = "\033[K" if sys.stderr.isatty() else ""
    print(f"\r{clear}{text}", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.download",
        description="Bring a Llama checkpoint from the Hugging Face hub, or from Meta by the link of its e-mail. "
        "OUT appears when all is there and checked; until then OUT.partial grows, and the same command continues it.",
        epilog=f"MODEL is one of: {', '.join(LAYOUTS)}.",
    )
    parser.add_argument(
        "source",
        metavar="REPOSITORY_OR_LINK",
        help="such as meta-llama/Llama-2-7b-chat-hf, or 'https://download.llamameta.net/*?Policy=...' in single quotes",
    )
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder to make")
    parser.add_argument("--list", action="store_true", help="show the files and their sizes, and download nothing")
    parser.add_argument("--model", metavar="MODEL", help="which model to bring by Meta's link")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="which files of a repository to bring (default: safetensors, else Meta's, else .bin, else .gguf)",
    )
    parser.add_argument("--file", metavar="PATH", help="which .gguf, or which folder of Meta's files")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--token", help="the hub's access token (default: HF_TOKEN, or the one of `hf auth login`)")
    parser.add_argument(
        "--endpoint", metavar="URL", help=f"another hub, also by plain http (default: HF_ENDPOINT, or {ENDPOINT})"
    )
    return parser


def _tell(out: str, files: list[RemoteFile], brought: bool) -> None:
    """Say what is there and what comes next."""
    state = "complete" if brought else "was already complete"
    print(f"{out}: {len(files)} files, {_size(sum(file.size for file in files))}, {state}. Next:")
    converted = os.path.join("converted", os.path.basename(os.path.realpath(out)))
    print(f"python checkpoint_converter.py {shlex.quote(out)} {shlex.quote(converted)}")
    print(f"make serve {shlex.quote(f'CHECKPOINT={out}')}")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = _parser()
    flags = parser.parse_intermixed_args(argv)  # OUT may come after options, too
    if flags.out is None and not flags.list:
        parser.error("OUT is needed, but for --list")
    try:
        origin, files = _from_meta(flags) if _is_metas(flags.source) else _from_hub(flags)
        if not flags.list:
            _tell(flags.out, files, download(origin.client, origin.label, files, Path(os.path.realpath(flags.out))))
    except (DownloadError, OutputError) as error:
        print(f"download: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"download: error: {error.filename or flags.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
