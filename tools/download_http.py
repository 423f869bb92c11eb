"""Ask a server of files: patiently where a failure may pass, and without showing a secret to another server."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import requests

# The seconds between tries; a failure after the last one is final, unless something new had arrived meanwhile.
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
LONGEST_WAIT = 600.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

_BLOCK = 1 << 18
_TIMEOUT = (15, 60)
_MOST_REDIRECTS = 8
_REDIRECTS = {301, 302, 303, 307, 308}

T = TypeVar("T")


class DownloadError(Exception):
    """A download that cannot go on; the message says what to do, and holds no secret."""


class Refused(DownloadError):
    """The server's answer is an error that will not pass."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Hiccup(Exception):
    """A failure that may pass by itself, after `delay` seconds if the server said so."""

    def __init__(self, message: str, delay: float | None = None) -> None:
        super().__init__(message)
        self.delay = delay


class Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C: what is under way ends."""


class Client:
    """One server, for any number of threads; `explain(name, status, headers)` makes the message for a refusal.

    `stop` ends all that is under way; `note` is told what goes wrong but may pass.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        explain: Callable[[str, int, Mapping[str, str]], str],
        note: Callable[[str], object],
    ) -> None:
        self.stop, self.note = threading.Event(), note
        self._headers, self._explain = dict(headers), explain
        self._session = requests.Session()
        self._session.auth = lambda request: request  # or a .netrc would take the token's place

    def get(self, name: str, url: str, part: tuple[int, int] | None = None) -> requests.Response:
        """Ask once for a file, or for the bytes from the first to the last of a part; the body is still to be read."""
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if part is not None:
            headers["Range"] = f"bytes={part[0]}-{part[1]}"
        began = split_url(url)
        for _ in range(_MOST_REDIRECTS):
            if self.stop.is_set():
                raise Stopped
            host = split_url(url).hostname
            direct = {"no_proxy": host} if is_local(host) else None  # a proxy is no way to this machine
            with _troubles(name, url):
                response = self._session.get(
                    url, headers=headers, stream=True, allow_redirects=False, timeout=_TIMEOUT, proxies=direct
                )
            if response.status_code not in _REDIRECTS:
                return self._checked(name, response)
            response.close()
            before, url = url, _joined(name, url, response.headers.get("Location", ""))
            _check_redirect(name, began, split_url(url))
            if _origin(split_url(url)) != _origin(split_url(before)):
                headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
        raise DownloadError(f"{name}: the server redirects in circles")

    def chunks(self, name: str, response: requests.Response) -> Iterator[bytes]:
        """The body, piece by piece."""
        with _troubles(name, response.url):
            for chunk in response.iter_content(_BLOCK):
                if self.stop.is_set():
                    raise Stopped
                yield chunk

    def read(self, name: str, url: str, limit: int) -> bytes:
        """A small file's content."""

        def attempt() -> bytes:
            content = bytearray()
            with self.get(name, url) as response:
                for chunk in self.chunks(name, response):
                    content += chunk
                    if len(content) > limit:
                        raise DownloadError(f"{name}: more than {limit} bytes, too many for this file")
            return bytes(content)

        return self.patiently(name, attempt)

    def size(self, name: str, url: str) -> int:
        """How long a file is, by asking for its first byte: not every server answers HEAD."""

        def attempt() -> int:
            try:
                with self.get(name, url, (0, 0)) as response:
                    size = announced(name, response)
            except Refused as refused:
                if refused.status == 416:
                    return 0  # no first byte
                raise
            if size is None:
                raise DownloadError(f"{name}: the server does not say how long the file is")
            return size

        return self.patiently(name, attempt)

    def patiently(self, name: str, attempt: Callable[[], T]) -> T:
        """The result of an attempt, repeated while it fails with what may pass."""
        failures = 0
        while True:
            try:
                return attempt()
            except Hiccup as hiccup:
                failures += 1
                self.wait(name, hiccup, failures)

    def wait(self, name: str, hiccup: Hiccup, failures: int) -> None:
        """Wait before the next try, or give up."""
        if failures > len(DELAYS):
            raise DownloadError(
                f"{name}: {hiccup}, {failures} times; run the same command again later: it continues where it stopped"
            )
        delay = DELAYS[failures - 1] if hiccup.delay is None else hiccup.delay
        if delay > LONGEST_WAIT:
            raise DownloadError(f"{name}: {hiccup}; the server asks to come back in {delay:.0f} s: run it again then")
        self.note(f"{name}: {hiccup}; trying again in {delay:.0f} s")
        if self.stop.wait(delay):
            raise Stopped

    def _checked(self, name: str, response: requests.Response) -> requests.Response:
        status = response.status_code
        if status in (200, 206):
            return response
        response.close()
        if status in TRANSIENT:
            raise Hiccup(status_text(status), retry_after(response.headers))
        raise Refused(self._explain(name, status, response.headers), status)


def announced(name: str, response: requests.Response) -> int | None:
    """The whole file's length, as the answer has it."""
    if response.status_code == 206:
        return content_range(name, response)[1]
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"\d{1,18}", length) else None


def content_range(name: str, response: requests.Response) -> tuple[int, int]:
    """The first byte of the part that was sent, and the whole file's length."""
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range", ""))
    if not found:
        raise DownloadError(f"{name}: the server sent a part of the file without saying which")
    return int(found[1]), int(found[2])


def split_url(url: str) -> SplitResult:
    """The parts of an address, or an error if it is none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - only when it is asked for is it checked
        return parts
    except ValueError:
        raise DownloadError(f"{printable(url.partition('?')[0])}: is no address") from None


def check_scheme(what: str, url: str) -> None:
    """Refuse an unencrypted connection to anything but this machine."""
    parts = split_url(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and is_local(parts.hostname))):
        return
    raise DownloadError(f"{what}: {printable(url.partition('?')[0])} is refused; https is needed")


def printable(text: object) -> str:
    """Text from a server without what could drive a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def status_text(status: int) -> str:
    """An HTTP status as people know it: 404 Not Found."""
    return f"{status} {http.client.responses.get(status, '')}".strip()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that the server asks to wait, be it said as a number or as a date."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


@contextlib.contextmanager
def _troubles(name: str, url: str) -> Iterator[None]:
    """Turn the HTTP library's errors, which quote whole URLs, into ours."""
    host = split_url(url).hostname
    try:
        yield
    except requests.exceptions.SSLError:
        raise DownloadError(f"{host}: its certificate is not accepted; check this machine's clock and proxy") from None
    except requests.exceptions.ProxyError:
        raise Hiccup(f"the proxy (HTTPS_PROXY) does not let through to {host}") from None
    except requests.exceptions.Timeout:
        raise Hiccup(f"no answer from {host} in time") from None
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
        raise Hiccup(f"the connection to {host} broke") from None
    except requests.exceptions.ConnectionError:
        raise Hiccup(f"no connection to {host}") from None
    except requests.exceptions.RequestException as error:
        raise DownloadError(f"{name}: cannot be asked for at {host}: {type(error).__name__}") from None


def _joined(name: str, url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise DownloadError(f"{name}: the server redirects to what is no address") from None


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_local(host: str | None) -> bool:
    """Whether a host is this machine by its name."""
    return host in ("localhost", "::1") or bool(host and re.fullmatch(r"127(\.\d{1,3}){3}", host))


def _check_redirect(name: str, began: SplitResult, target: SplitResult) -> None:
    """A server may send us on, but not from an encrypted connection to a plain one, nor from a plain one anywhere."""
    near = target.hostname == began.hostname or (is_local(began.hostname) and is_local(target.hostname))
    if target.scheme != "https" and not (target.scheme == began.scheme == "http" and near):
        where = printable(f"{target.scheme}://{target.netloc}")
        raise DownloadError(f"{name}: the server redirects to {where}, which is refused; https is needed")
