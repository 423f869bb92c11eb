"""Text to token ids and back for Llama 3: byte-level BPE and the Llama-3 chat format, which speaks in control tokens.

Words used below:
    ranks   the tokens of a tiktoken file as bytes, each with its id; lower ones merge first
    header  what opens a message: who speaks, between two control tokens
"""

import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import tokenizing
from tokenizing import Dialog, TokenizerError, read_file

# How Llama 3 cuts text into words, within which bytes merge. As published, for tiktoken and in tokenizer.json.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_MESSAGE = "<|eom_id|>"  # of a message that calls a tool
END_OF_TURN = "<|eot_id|>"
CONTROL_TOKENS = 256

_RESERVED = "<|reserved_special_token_{}|>"
# Those with a purpose, since Llama 3.1; Llama 3 had reserved ones at 4, 5, 8 and 10, and the same vocabulary otherwise.
_NAMED = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    _RESERVED.format(0),
    _RESERVED.format(1),
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    START_HEADER,
    END_HEADER,
    END_OF_MESSAGE,
    END_OF_TURN,
    "<|python_tag|>",
    "<|image|>",
)

# Meta's code cuts text after so many characters, and within a run of so many with or without spaces: regular
# expressions give up on longer ones. Ids are the same only if the cuts are.
_MOST_CHARACTERS = 400_000
_LONGEST_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


def control_tokens() -> list[str]:
    """The control tokens in the order of their ids, which follow those of the ranks."""
    reserved = range(2, 2 + CONTROL_TOKENS - len(_NAMED))
    return [*_NAMED, *map(_RESERVED.format, reserved)]


@dataclass(frozen=True)
class ByteLevelModel:
    """A vocabulary whose text tokens are bytes; `encode` knows nothing of control tokens."""

    encode: Callable[[str], list[int]]
    bytes_by_id: list[bytes]
    control: Mapping[str, int]
    bos_id: int
    eos_id: int


class Tokenizer(tokenizing.Tokenizer):
    """A Llama 3 vocabulary, tiktoken's file unless given, with the Llama-3 chat format over it."""

    answer_begins_with_space = False

    def __init__(
        self, path: str | os.PathLike[str], model: ByteLevelModel | None = None, stop_ids: Iterable[int] = ()
    ) -> None:
        self.path = os.fspath(path)
        model = _load_ranks(self.path) if model is None else model
        self._model = model
        self._bytes_by_id = model.bytes_by_id
        self.vocab_size = len(model.bytes_by_id)
        self.bos_id, self.eos_id = model.bos_id, model.eos_id
        self.control_names = {id: name for name, id in model.control.items()}
        ends = {model.control[name] for name in (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN) if name in model.control}
        self.stop_ids = frozenset({self.eos_id, *ends, *stop_ids})

    def _encode_dialog(self, dialog: Dialog) -> list[int]:
        """The Llama-3 chat prompt, with Meta's ids; it has control tokens where the format puts them only.

        There is no system message but the client's: Meta's code adds none, unlike the template of Llama 3.1.
        """
        control = self._model.control
        if not control.keys() >= {START_HEADER, END_HEADER, END_OF_TURN}:
            raise TokenizerError(
                f"this model's vocabulary has no {START_HEADER}, {END_HEADER} and {END_OF_TURN}, so it knows no chat; "
                "send a prompt"
            )
        ids = [self.bos_id]
        for message in dialog:
            ids += [*self._header(message["role"]), *self._encode(message["content"].strip()), control[END_OF_TURN]]
        return ids + self._header("assistant")

    def _header(self, role: str) -> list[int]:
        control = self._model.control
        return [control[START_HEADER], *self._encode(role), control[END_HEADER], *self._encode("\n\n")]

    @property
    def _control_ids(self) -> Mapping[str, int]:
        return self._model.control

    def _encode(self, text: str) -> list[int]:
        return [id for part in _parts(text) for id in self._model.encode(part)]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte, itself where it can be printed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _parts(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MOST_CHARACTERS):
        chunk = text[start : start + _MOST_CHARACTERS]
        done = 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield chunk[done:cut]
                done = cut
        yield chunk[done:]


def _load_ranks(path: str) -> ByteLevelModel:
    ranks = _read_ranks(path)
    try:
        import tiktoken
    except ImportError as error:
        raise TokenizerError(f"{path}: needs the package tiktoken; pip install tiktoken") from error
    encoding = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    control = {name: id for id, name in enumerate(control_tokens(), start=len(ranks))}
    return ByteLevelModel(
        encode=encoding.encode_ordinary,
        bytes_by_id=[*sorted(ranks, key=ranks.__getitem__), *[b""] * len(control)],
        control=control,
        bos_id=control[BEGIN_OF_TEXT],
        eos_id=control[END_OF_TEXT],
    )


def _read_ranks(path: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = _read_rank(line)
        except ValueError:
            raise TokenizerError(
                f"{path}: line {number} is {line[:40]!r}, but each holds a token in base64 and its rank; give the path "
                "of Llama 3's tokenizer.model, complete"
            ) from None
        if token in ranks:
            raise TokenizerError(
                f"{path}: line {number} repeats the token {token[:40]!r}; fetch or copy the file again"
            )
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once; fetch or copy the "
            "file again"
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{path}: has no token for the byte {missing[0]:#04x}; fetch or copy the file again")
    return ranks


def _read_rank(line: bytes) -> tuple[bytes, int]:
    encoded, rank = line.split(b" ")
    token = b64decode(encoded, validate=True)
    if not token or not rank.isdigit():
        raise ValueError
    return token, int(rank)
