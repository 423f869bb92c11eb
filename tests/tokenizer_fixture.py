"""Tiny tokenizers with the settings of Llama's, made in a fraction of a second by the packages that they are for."""

import base64
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

# Tags, so that the vocabulary has pieces such as "▁[" and "INST"; no line breaks, which have no piece in Llama's.
CORPUS = [
    "[INST] <<SYS>> You are a helpful assistant. <</SYS>> Hello there [/INST] I am fine, thank you.",
    "[INST] what is it? [/INST] x[INST]y [[INST]] <<<SYS>>> a<</SYS>>",
    "The quick brown fox jumps over 12 lazy dogs; naïve café résumé.",
    "STOP stopping the stop sign. Human: User:    ### end",
] * 20


def train_tokenizer(path: Path, *, corpus: Iterable[str] = CORPUS, **options: object) -> Path:
    """Train a SentencePiece model into a file; options are the trainer's and overrule Llama's."""
    model = io.BytesIO()
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=model, **(settings | options))
    path.write_bytes(model.getvalue())
    return path


# How Llama 3 cuts words, and its control tokens as Hugging Face has them since Llama 3.1.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA3_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
]
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_CORPUS = [
    *CORPUS,
    *["system\n\nuser\n\nassistant\n\n", "eot_id start_header_id", "12 123 1234 it's we'll I'M aa aaaa aaaaaa"] * 5,
    *["日本語 русский 😀😀 é e\u0301\n", "    def f():\r\n\t\treturn 1\n\n\n", "!!! --- ... <<< >>>"] * 5,
]


def train_ranks(path: Path, *, size: int = 600) -> Path:
    """Train byte-level BPE into a tiktoken file, as Meta publishes Llama 3's; `size` is the most tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LLAMA3_CORPUS, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = tokenizer.get_vocab()  # ids are in the order of merges
    return write_ranks(path, [bytes(map(byte_of.get, token)) for token in sorted(vocab, key=vocab.get)])


def write_ranks(path: Path, tokens: Iterable[bytes]) -> Path:
    """A tiktoken file of tokens in the order of their ranks."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def write_byte_level(folder: Path, ranks: Path) -> Path:
    """The tokenizer.json that transformers makes of Llama 3's tiktoken file, with its settings beside it."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder.mkdir(parents=True, exist_ok=True)
    converter = TikTokenConverter(str(ranks), pattern=LLAMA3_PATTERN, extra_special_tokens=LLAMA3_CONTROL)
    converter.converted().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA3_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def write_pieces(folder: Path, model: Path, *, changes: dict[str, Any] | None = None) -> Path:
    """A tokenizer.json of Llama 2's kind from a SentencePiece model, its vocabulary and merges by transformers.

    It puts a space before every text, as the published one; `changes` overrule what is said beside the vocabulary.
    """
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(id): id for id in range(pieces.vocab_size())}
    scores = {piece: pieces.get_score(id) for piece, id in vocab.items()}
    LlamaTokenizerFast(vocab=vocab, merges=generate_merges(vocab, scores)).save_pretrained(folder)
    path = folder / "tokenizer.json"
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    published = {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
    path.write_text(json.dumps(json.loads(path.read_text()) | published | (changes or {})))
    # By this class transformers takes the file as it is; by LlamaTokenizer, from version 5 on, as it has changed.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path


KINDS = ("sentencepiece", "pieces", "tiktoken", "byte-level")
"""Two files of Llama 2's kind and two of Llama 3's; of each, the first is Meta's and the second a tokenizer.json."""


def write_kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind; those of a generation have the same vocabulary."""
    model, ranks = train_tokenizer(folder / "pieces.model"), train_ranks(folder / "ranks.model")
    pieces, byte_level = write_pieces(folder / "pieces", model), write_byte_level(folder / "byte-level", ranks)
    return dict(zip(KINDS, (model, pieces, ranks, byte_level), strict=True))


# What breaks tokenizers: contractions, digits, combined and joined characters, spaces of all sorts, parts of tags.
WORDS = """the naïve it's 'S 'll I'M 12 1234567 a aaaa é e\u0301 日本語 😀 👩‍👩‍👧 🇫🇷 русский नमस्ते שלום ﬁ Ⅳ ² ٣ A\u030a ẞ
ǅ 𝔘 \U0010ffff \ue000 \ufffd \ufeff \u200b \0 ! ... <<< <| |> [INST] _ _id ▁ <0x41> quick"""
SPACES = [
    " ",
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n\n",
    " \n ",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
]


def nasty_texts(count: int, seed: float) -> list[str]:
    """Texts of what breaks tokenizers, and of code points from everywhere."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        parts = generator.choices([*WORDS.split(), *SPACES], k=generator.randrange(14))
        if generator.random() < 0.4:
            points = [generator.randrange(0x20, 0x3000) for _ in range(generator.randrange(6))]
            parts.insert(len(parts) // 2, "".join(map(chr, points)))
        found.append("".join(parts))
    return found


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A dialog of a user's messages and the answers between them."""
    roles = ("user", "assistant")
    dialog = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return dialog if system is None else [{"role": "system", "content": system}, *dialog]
