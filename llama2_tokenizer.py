"""Text to token ids and back for Llama 1 and 2: SentencePiece models and the Llama-2 chat format.

Words used below:
    tag       one of the four strings that structure a Llama-2 chat prompt ([INST] and its kin)
    template  the part of a prompt that the chat format writes; the rest is client text
    marker    U+2581, by which SentencePiece writes a space inside a piece
"""

import os
import re
from collections.abc import Iterable
from enum import IntEnum
from functools import cached_property
from typing import Protocol

from sentencepiece import SentencePieceProcessor

import tokenizing
from tokenizing import Dialog, TokenizerError, read_file

_MARKER = "\u2581"
_TAGS = (b"[INST]", b"[/INST]", b"<<SYS>>", b"<</SYS>>")
# No tag begins as another one ends, so occurrences never overlap and one scan finds them all.
_ANY_TAG = re.compile(b"|".join(map(re.escape, _TAGS)))


class _Spelling(IntEnum):
    """How to write a token; a higher one overrules where a token meets two."""

    NONE = 0
    CHARACTERS = 1
    BYTES = 2
    IMPOSSIBLE = 3


class PieceModel(Protocol):
    """What is asked of a vocabulary of pieces; SentencePieceProcessor's methods."""

    def vocab_size(self) -> int: ...
    def bos_id(self) -> int: ...
    def eos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def id_to_piece(self, id: int) -> str: ...
    def piece_to_id(self, piece: str) -> int: ...
    def is_control(self, id: int) -> bool: ...
    def is_byte(self, id: int) -> bool: ...
    def is_unknown(self, id: int) -> bool: ...


class Tokenizer(tokenizing.Tokenizer):
    """A Llama 1 or 2 vocabulary, SentencePiece's own file unless given, with the Llama-2 chat format over it."""

    answer_begins_with_space = True

    def __init__(
        self, path: str | os.PathLike[str], model: PieceModel | None = None, stop_ids: Iterable[int] = ()
    ) -> None:
        self.path = os.fspath(path)
        self._model = _load_model(self.path) if model is None else model
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.stop_ids = frozenset({self.eos_id, *stop_ids})
        # SentencePiece gives -1 for a symbol that is missing, and for one that typed text could become.
        for name, id in (("beginning", self.bos_id), ("end", self.eos_id)):
            if id < 0:
                raise TokenizerError(
                    f"{self.path}: has no control symbol for the {name} of a text; use Llama 1's or 2's tokenizer.model"
                )
        self.control_names = {id: self._model.id_to_piece(id) for id in (self.bos_id, self.eos_id)}
        try:
            self._bytes_by_id = [_bytes_of(self._model, id) for id in range(self.vocab_size)]
        except ValueError as error:
            raise TokenizerError(f"{self.path}: damaged piece ({error}); fetch or copy the file again") from error
        # Llama's models put a space before every text; what encode() added, decode() takes away.
        self._adds_space = self._joined(self._model.encode("a")) == b" a"
        self._spelling_by_tag = {tag: self._choose_spelling(tag) for tag in _TAGS}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens have none, and bytes that are no UTF-8 become U+FFFD."""
        text = super().decode(ids)
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def _encode_dialog(self, dialog: Dialog) -> list[int]:
        """The Llama-2 chat prompt, with Meta's ids except where client text spells a tag.

        Such a tag is spelled out in ids that the template never uses, so it reads the same and commands nothing.
        """
        contents = [message["content"] for message in dialog]
        system = contents.pop(0) if dialog[0]["role"] == "system" else None
        ids: list[int] = []
        for index in range(0, len(contents) - 1, 2):
            turn = self._encode_turn(*_render_turn(contents[index], contents[index + 1], system))
            ids += [self.bos_id, *turn, self.eos_id]
            system = None  # it stands in the first turn only
        return [*ids, self.bos_id, *self._encode_turn(*_render_turn(contents[-1], None, system))]

    def _encode_turn(self, text: str, template: frozenset[int]) -> list[int]:
        """The ids of a rendered turn, its tags spelled out save those at the template's byte offsets."""
        ids = self._model.encode(text)
        joined = self._joined(ids)
        tags = list(_ANY_TAG.finditer(joined))
        if len(tags) <= len(template):  # only the template's own
            return ids
        # The bytes of the ids are the text, after the space that the model adds, unless this model's normaliser
        # rewrites text (Llama's does not). Then nobody can tell whose tag is whose.
        added = len(joined) - len(text.encode())
        if joined[added:] != text.encode():
            raise _tag_error()
        spelling = bytearray(len(joined))  # of the piece that covers each byte
        for tag in tags:
            if tag.start() - added not in template:
                spelling[tag.start() : tag.end()] = bytes([self._spelling_by_tag[tag.group()]]) * len(tag.group())
        spelled: list[int] = []
        known: dict[tuple[int, int], list[int]] = {}  # a client may repeat a tag 100,000 times
        position = 0
        for id in ids:
            end = position + len(self._bytes_by_id[id])
            how = max(spelling[position:end], default=_Spelling.NONE)
            if (id, how) not in known:
                known[id, how] = self._spell(id, _Spelling(how))
            spelled += known[id, how]
            position = end
        return spelled

    def _choose_spelling(self, tag: bytes) -> _Spelling:
        """The spelling in which this tag cannot have the ids that the template gives it.

        Single characters will do once the model merges any two characters of the tag: it then does so in every
        context, or merges one of them with a neighbour, since BPE stops only when no adjacent pieces can merge.
        """
        ids = self._model.encode(tag.decode())
        pieces = [self._bytes_by_id[id].strip() for id in ids]
        if any(len(piece) > 1 for piece in pieces):
            return _Spelling.CHARACTERS
        if any(piece and not self._model.is_byte(id) for piece, id in zip(pieces, ids, strict=True)):
            return _Spelling.BYTES
        return _Spelling.IMPOSSIBLE

    def _spell(self, id: int, spelling: _Spelling) -> list[int]:
        """The text of a token in other tokens; a character without a piece of its own becomes bytes."""
        if spelling is _Spelling.NONE:
            return [id]
        ids: list[int] = []
        for character in self._bytes_by_id[id].decode():
            whole = self._model.piece_to_id(character.replace(" ", _MARKER))
            if spelling is _Spelling.CHARACTERS and not self._model.is_unknown(whole):
                ids.append(whole)
            else:
                ids += [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        if spelling is _Spelling.IMPOSSIBLE or any(map(self._model.is_unknown, ids)):
            raise _tag_error()
        return ids

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {self._model.id_to_piece(id): id for id in range(self.vocab_size) if self._model.is_control(id)}

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _encode_behind(self, text: str) -> list[int]:
        return getattr(self._model, "encode_behind", self._model.encode)(text)


def _render_turn(user: str, answer: str | None, system: str | None) -> tuple[str, frozenset[int]]:
    """One turn of a chat as Meta writes it, and the byte offsets at which the template put a tag."""
    template = {0}
    opening = "[INST] "
    prompt = user
    if system is not None:
        template.add(len(opening))
        template.add(_size(f"{opening}<<SYS>>\n{system}\n"))
        prompt = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
    text = f"{opening}{prompt.strip()} "
    template.add(_size(text))
    text += "[/INST]"
    if answer is not None:
        text += f" {answer.strip()} "
    # To the model a marker is a space already; saying so keeps offsets in the text and in its pieces equal.
    return text.replace(_MARKER, " "), frozenset(template)


def _size(text: str) -> int:
    return len(text.replace(_MARKER, " ").encode())


def _tag_error() -> TokenizerError:
    tags = ", ".join(tag.decode() for tag in _TAGS)
    return TokenizerError(
        f"a message holds one of the chat format's own tags ({tags}), or text that this model's normaliser turns into "
        "one, and this vocabulary has no other way to write it; remove it from the message"
    )


def _load_model(path: str) -> SentencePieceProcessor:
    content = read_file(path)
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: is no SentencePiece model, or a damaged one (begins with {content[:24]!r}); "
            "give the path of Llama 1's or 2's tokenizer.model, complete"
        ) from error
    return model


def _bytes_of(model: PieceModel, id: int) -> bytes:
    piece = model.id_to_piece(id)
    if model.is_control(id):
        return b""
    if model.is_byte(id):
        return bytes([int(piece[1:-1], 16)])
    if model.is_unknown(id):
        return model.decode([id]).encode()
    return piece.replace(_MARKER, " ").encode()
