"""The random weights that servers and peers are measured with: made once for each shape, then kept in build/bench."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from deploy.configuration import PROJECT
from formats.conversion import convert
from tokenizing import load_tokenizer
from tools.random_checkpoint import DEMO_TOKENIZER, write_random_checkpoint

FOLDER = PROJECT / "build" / "bench"
MAX_SEQ_LEN = 4096
# GGUF's types that are nearest to ours.
GGUF_TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


class Weights:
    """One shape's weights in every form that somebody loads, each written when it is first asked for."""

    def __init__(self, shape: str) -> None:
        self.shape, self._folder = shape, FOLDER / "weights" / shape

    def served(self) -> Path:
        """The converted folder, in bfloat16."""
        folder = self._folder / "dcp"
        if not folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".making-") as temporary:
                _say(f"writing random weights of {self.shape}'s shape to {self._folder.relative_to(PROJECT)}")
                source = Path(temporary) / "meta"
                write_random_checkpoint(source, self.shape, dtype=torch.bfloat16)
                convert(source, folder, max_seq_len=MAX_SEQ_LEN, progress=False)
        return folder

    def gguf(self, kind: str) -> Path:
        """The file for llama.cpp whose type is nearest to a kind of weights of ours."""
        file = self._folder / f"{GGUF_TYPES[kind]}.gguf"
        if not file.is_file():
            source = self.served()
            _say(f"writing {file.relative_to(PROJECT)}")
            convert(source, file, type=GGUF_TYPES[kind], progress=False)
        return file


def usual_tokens() -> list[int]:
    """Ids that prompts are made of: those of the embedded tokenizer that are text."""
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    return [id for id in range(3, tokenizer.vocab_size) if _is_plain(tokenizer.token_bytes(id))]


def answer_token() -> int:
    """An id whose text is a whole word, so that no server holds any of it back."""
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    return next(id for id in usual_tokens() if len(tokenizer.token_bytes(id).strip()) > 2)


def _is_plain(data: bytes) -> bool:
    return data.strip().isalpha() and data.isascii()


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)
