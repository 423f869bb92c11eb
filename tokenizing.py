"""Text to token ids and back: what every tokenizer gives, whichever file it comes from, and streamed text."""

import codecs
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from chat_template import ChatTemplate

Message = dict[str, str]
Dialog = list[Message]

ROLES = ("system", "user", "assistant")
MAX_MODEL_BYTES = 100_000_000  # Llama 2's own file has 0.5 MB, Llama 3's tokenizer.json 17

_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")  # the first line of a tiktoken file
_JSON = re.compile(rb'\s*\{\s*"')


class TokenizerError(ValueError):
    """A model file, a text or a token id that the tokenizer cannot work with."""


class DialogError(ValueError):
    """A dialog that the chat format cannot express."""


class Tokenizer(ABC):
    """A vocabulary, and the chat format of the models that have it."""

    path: str
    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: frozenset[int]
    """Every token that ends an answer."""
    control_names: Mapping[int, str]
    """How to call control tokens where each token must be written; in texts they are nothing."""
    answer_begins_with_space: ClassVar[bool]
    """Whether the space between a chat prompt and its answer is the answer's."""

    template: "ChatTemplate | None" = None
    """The model's own chat format, if that is not Llama's."""

    _bytes_by_id: list[bytes]

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text; nothing in it, "<s>" included, becomes a control token."""
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a string, not {type(text).__name__}")
        if problem := surrogate_in(text):
            raise TokenizerError(f"text {problem}")
        return [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens have none, and bytes that are no UTF-8 become U+FFFD."""
        return self._joined(ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a token adds to the text, none for a control token."""
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside this vocabulary: allowed are 0 to {self.vocab_size - 1}")
        return self._bytes_by_id[id]

    def encode_dialog(self, dialog: Dialog) -> list[int]:
        """The chat prompt of a dialog, in which no client text can command what only the chat format may."""
        if self.template is None:
            check_dialog(dialog)
            return self._encode_dialog(dialog)
        check_messages(dialog)
        control = self._control_ids
        bos, eos = (next(name for name, id in control.items() if id == end) for end in (self.bos_id, self.eos_id))
        ids: list[int] = []
        for part in self.template.split(dialog, control, bos, eos):
            ids += [part] if isinstance(part, int) else self._encode_behind(part) if ids else self._encode(part)
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    @abstractmethod
    def _encode_dialog(self, dialog: Dialog) -> list[int]:
        """The same in Llama's own format."""

    @property
    @abstractmethod
    def _control_ids(self) -> Mapping[str, int]:
        """All tokens that are no text, by name."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text that is one."""

    def _encode_behind(self, text: str) -> list[int]:
        """The same of a text with a control token in front."""
        return self._encode(text)

    def _joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file, known by its content: SentencePiece's or tiktoken's tokenizer.model, or tokenizer.json.

    The packages that only one kind needs are imported only for that kind.
    """
    from chat_template import template_beside

    tokenizer = _load(path)
    tokenizer.template = template_beside(path)
    return tokenizer


def _load(path: str | os.PathLike[str]) -> Tokenizer:
    opening = read_file(path)[:4096]
    if _JSON.match(opening):
        import tokenizer_json

        return tokenizer_json.load(path)
    if _RANKS.match(opening):
        import llama3_tokenizer

        return llama3_tokenizer.Tokenizer(path, stop_ids=stop_ids_beside(path))
    import llama2_tokenizer

    return llama2_tokenizer.Tokenizer(path, stop_ids=stop_ids_beside(path))


def stop_ids_beside(path: str | os.PathLike[str]) -> frozenset[int]:
    """The tokens that end an answer by the generation_config.json beside a tokenizer's file, if there is one."""
    settings = Path(path).with_name("generation_config.json")
    value = read_json(settings).get("eos_token_id") if settings.is_file() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int or id < 0:
            raise TokenizerError(f"{settings}: eos_token_id is {short_repr(value)}, but must be token ids")
    return frozenset(ids)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file of settings holds, which may come from anywhere."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: no valid JSON ({str(error)[:200]}); fetch or copy the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds {short_repr(value)}, but must be a JSON object")
    return value


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a tokenizer's file, which may come from anywhere."""
    path = os.fspath(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise TokenizerError(f"{path}: is not a file; give the path of a tokenizer.model or tokenizer.json")
        if status.st_size > MAX_MODEL_BYTES:
            raise TokenizerError(
                f"{path}: {status.st_size} bytes are too many for a tokenizer (at most {MAX_MODEL_BYTES}); "
                "give the path of a tokenizer.model or tokenizer.json"
            )
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error.strerror}); give the path of a tokenizer.model or tokenizer.json"
        ) from error
    if not content:
        raise TokenizerError(f"{path}: is empty; fetch or copy the file again")
    return content


def check_dialog(dialog: object) -> None:
    """Raise DialogError unless this is [system,] user, assistant, user, ... ending with user."""
    for index, message in enumerate(check_messages(dialog)):
        role = message["role"]
        if role == "system":
            if index > 0:
                raise DialogError(f"dialog[{index}]: role 'system' is allowed only for the first message")
            continue
        turn = index - (dialog[0]["role"] == "system")
        expected = ("user", "assistant")[turn % 2]
        if role != expected:
            raise DialogError(
                f"dialog[{index}]: role {role!r} where {expected!r} is due; after an optional 'system' message "
                "the roles alternate 'user', 'assistant', 'user', ..."
            )


def check_messages(dialog: object) -> Dialog:
    """Raise DialogError unless these are messages, the last of them from the user."""
    if not isinstance(dialog, list):
        raise DialogError(f"a dialog is a list of messages, not {type(dialog).__name__}")
    if not dialog:
        raise DialogError("the dialog is empty: give at least one message with the role 'user'")
    for index, message in enumerate(dialog):
        _check_message(index, message)
    if message["role"] != "user":
        raise DialogError(
            f"dialog[{index}]: the last message is from {message['role']!r}; end with one from 'user' to be answered"
        )
    return dialog


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, dict):
        raise DialogError(
            f"dialog[{index}]: a message is an object with 'role' and 'content', not {type(message).__name__}"
        )
    if message.get("role") not in ROLES:
        raise DialogError(
            f"dialog[{index}]: role {short_repr(message.get('role'))} is unknown; allowed are {', '.join(ROLES)}"
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise DialogError(f"dialog[{index}]: 'content' must be a string, not {type(content).__name__}")
    if problem := surrogate_in(content):
        raise DialogError(f"dialog[{index}]: 'content' {problem}")


class StreamDecoder:
    """Token ids to text as they come, cut before the first stop string.

    push() gives out text as soon as nothing that may follow can change it: half a character, and text that may be
    the beginning of a stop string, wait. Its cost does not depend on how much text came before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, strip_leading_space: bool) -> None:
        if isinstance(stop, str) or not all(text and isinstance(text, str) for text in stop):
            raise TokenizerError(f"stop must be a list of strings that are not empty, not {short_repr(stop)}")
        self.stopped = False
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # the longest end of the text so far that may be the beginning of a stop string
        self._strips = strip_leading_space

    def push(self, id: int) -> str:
        """Take one more token and return the text that it makes certain, "" once stopped.

        A model's vocabulary may be padded beyond the tokenizer's; those tokens have no text.
        """
        if self.stopped or id >= self._tokenizer.vocab_size:
            return ""
        return self._advance(self._utf8.decode(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """Return what was still held back, where half a character is U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, new: str) -> str:
        if self._strips and new:
            new = new.removeprefix(" ")
            self._strips = False
        text = self._held + new
        ends = [(stop, stop.find_end(new)) for stop in self._stops]
        starts = [len(self._held) + end - len(stop.text) for stop, end in ends if end is not None]
        if starts:
            self.stopped = True
            self._held = ""
            return text[: min(starts)]
        certain = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


class _StopString:
    """One stop string and how many of its characters the text so far ends with (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # For each length of a matched beginning, the length of the next shorter one that ends the same text.
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._extend(self._shorter[-1], character))

    def find_end(self, new: str) -> int | None:
        """Take more text and return the offset in it at which the stop string is first complete."""
        for offset, character in enumerate(new, start=1):
            self.matched = self._extend(self.matched, character)
            if self.matched == len(self.text):
                return offset
        return None

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + 1 if self.text[matched] == character else 0


def surrogate_in(text: str) -> str | None:
    """What is wrong with a text that cannot be written as UTF-8, None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has the lone surrogate {text[error.start]!r} at character {error.start}, which is no text; remove it"
    return None
