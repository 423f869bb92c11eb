"""Every kind of tokenizer file into every other: the packages that own the formats find the same ids in all of them."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizer_fixture import train_tokenizer
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig
from transformers.convert_slow_tokenizer import TikTokenConverter

from formats.source import FormatError
from formats.vocabulary import TokenType, Vocabulary, read_vocabulary
from formats.vocabulary_merges import disagreement, join, ranked, ranks_of
from llama3_tokenizer import byte_alphabet
from tokenizing import load_tokenizer

DEMO = Path(__file__).parent.parent / "demo" / "model" / "tokenizer.model"
# Published with Llama 3, in Meta's code and in tokenizer.json.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over 12 lazy dogs; naïve café résumé.",
    "I'm you're WE'LL they'd 123 12345 1\n\n\n   x\ty   ",
    "user assistant system\n\nHello there, how are you today? I am fine, thank you.",
    "日本語のテキスト 日本 😀😀 🇩🇪",
] * 20
NASTY = [
    *("", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "a", " a", "  a", "a ", "a  b   c    d", "\r\n\r\n", " " * 70),
    *("12345 6789", "1 22 333 4444", "naïve café", "日本語", "😀", "👩‍👩‍👧‍👦🇩🇪", "e\u0301", "ab" * 40, "\ud7ff"),
    *("\u2581", "a\u2581b", "\u00a0x", "\u3000", "\x00\x01", "\ufeff", "I'M I'm i'LL 'ſ", "<0x41>"),
    "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nhi [/INST]",
]
ALPHABET = "abcdefghijklmnopqrst         ABC.,!?'\n\t\r0123456789éß日本😀[]<>/\u00a0\u2581"


def texts(seed: int = 0, count: int = 250) -> list[str]:
    source = random.Random(seed)
    words = sorted({word for line in CORPUS for word in line.split(" ")})
    made = []
    for _ in range(count):
        parts = (source.choice(words) if source.random() < 0.4 else source.choice(ALPHABET) for _ in range(30))
        made.append("".join(list(parts)[: source.randrange(30)]))
    return NASTY + made


TEXTS = texts()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer.model like Llama 2's."""
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    return train_tokenizer(path, vocab_size=700, character_coverage=1.0)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The tokenizer.json that the tokenizers package writes of byte-level BPE, without control tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def ranks(trained: dict[str, Any]) -> dict[bytes, int]:
    """The same as tiktoken has it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    return {bytes(alphabet[c] for c in token): id for token, id in trained["model"]["vocab"].items()}


@pytest.fixture(scope="module")
def tiktoken_file(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model like Llama 3's."""
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


@pytest.fixture
def crafted(tmp_path: Path) -> Path:
    """A tiktoken file with a token that no others make, and splits whose order is not that of their lengths."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"bc", b"abc", b"ab", b"cd", b"abcd", b" hello", b"hi"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def written(vocabulary: Vocabulary, folder: Path) -> Path:
    """The Hugging Face folder of a vocabulary, with the config.json of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(vocab_size=len(vocabulary.tokens)).save_pretrained(folder)
    for name, content in vocabulary.huggingface().items():
        (folder / name).write_bytes(content)
    return folder


def through_gguf(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """Through a file that the package of llama.cpp's authors writes and reads, padded by five rows."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    for key, value in vocabulary.gguf_fields(len(vocabulary.tokens) + 5).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / "vocabulary.gguf").fields
    return Vocabulary.from_gguf({key: fields[key].contents() for key in fields if key.startswith("tokenizer.")})


def through_model(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    folder.mkdir(parents=True, exist_ok=True)
    content = vocabulary.sentencepiece() if vocabulary.kind == "sentencepiece" else vocabulary.tiktoken()
    (folder / "tokenizer.model").write_bytes(content)
    return read_vocabulary(folder / "tokenizer.model")


def through_json(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    return read_vocabulary(written(vocabulary, folder) / "tokenizer.json")


def forgetful(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary without the files that it was read from, so that all is written anew."""
    return dataclasses.replace(vocabulary, originals={})


HOPS: dict[str, Callable[[Vocabulary, Path], Vocabulary]] = {
    "model": through_model,
    "json": through_json,
    "gguf": through_gguf,
}
PATHS = [(first, second) for first in HOPS for second in HOPS]


def sentencepiece_ids(content: bytes) -> list[list[int]]:
    return sentencepiece.SentencePieceProcessor(model_proto=content).encode(TEXTS)


def transformers_ids(folder: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(TEXTS, add_special_tokens=False)["input_ids"]


def tiktoken_ids(content: bytes) -> list[list[int]]:
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    encoding = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary_batch(TEXTS)


@pytest.fixture(params=["trained", "demo"])
def model(request: pytest.FixtureRequest, pieces: Path) -> Path:
    return pieces if request.param == "trained" else DEMO


class TestSentencePiece:
    def test_a_model_file_is_read_as_its_own_package_reads_it(self, model: Path) -> None:
        vocabulary, theirs = read_vocabulary(model), sentencepiece.SentencePieceProcessor(model_file=str(model))
        ids = range(theirs.vocab_size())
        assert vocabulary.tokens == tuple(map(theirs.id_to_piece, ids))
        assert vocabulary.scores == tuple(map(theirs.get_score, ids))
        assert vocabulary.ids_of(TokenType.CONTROL) == list(filter(theirs.is_control, ids))
        assert vocabulary.ids_of(TokenType.BYTE) == list(filter(theirs.is_byte, ids))
        assert vocabulary.ids_of(TokenType.UNKNOWN) == [theirs.unk_id()]
        assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
        assert (vocabulary.pad_id, vocabulary.stop_ids) == (None, (2,))
        assert vocabulary.add_space_prefix and vocabulary.add_bos and not vocabulary.add_eos

    def test_a_model_file_is_written_as_it_was(self, model: Path) -> None:
        assert read_vocabulary(model).sentencepiece() == model.read_bytes()

    @pytest.mark.parametrize("hops", PATHS, ids="-".join)
    def test_every_way_keeps_the_ids(self, model: Path, hops: tuple[str, str], tmp_path: Path) -> None:
        expected = sentencepiece_ids(model.read_bytes())
        first = vocabulary = read_vocabulary(model)
        for number, hop in enumerate(hops):
            vocabulary = HOPS[hop](forgetful(vocabulary), tmp_path / str(number))
        assert sentencepiece_ids(forgetful(vocabulary).sentencepiece()) == expected
        assert transformers_ids(written(forgetful(vocabulary), tmp_path / "hf")) == expected
        assert (vocabulary.tokens, vocabulary.types) == (first.tokens, first.types)
        assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)

    def test_a_rebuilt_model_has_the_scores_of_the_trained_one(self, model: Path, tmp_path: Path) -> None:
        first = read_vocabulary(model)
        again = through_json(forgetful(first), tmp_path)
        normal = first.ids_of(TokenType.NORMAL)
        assert [again.scores[id] for id in normal] == [first.scores[id] for id in normal]

    @pytest.mark.parametrize("prefix", [True, False])
    def test_the_space_before_a_text_is_carried(self, prefix: bool, tmp_path: Path) -> None:
        path = train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
        expected = sentencepiece_ids(path.read_bytes())
        vocabulary = forgetful(read_vocabulary(path))
        assert vocabulary.gguf_fields()["tokenizer.ggml.add_space_prefix"] is prefix
        assert sentencepiece_ids(vocabulary.sentencepiece()) == expected
        assert transformers_ids(written(vocabulary, tmp_path / "hf")) == expected
        assert read_vocabulary(tmp_path / "hf" / "tokenizer.json").add_space_prefix is prefix

    def test_transformers_adds_the_beginning_and_decodes(self, pieces: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(written(forgetful(read_vocabulary(pieces)), tmp_path))
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        assert tokenizer("Hello")["input_ids"] == [1, *theirs.encode("Hello")]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        # Older releases would remove spaces before punctuation.
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
        for text in TEXTS:
            if "\u2581" not in text:
                assert tokenizer.decode(theirs.encode(text)) == text

    def test_a_model_without_byte_pieces_keeps_its_unknown_ids(self, tmp_path: Path) -> None:
        path = train_tokenizer(tmp_path / "tokenizer.model", byte_fallback=False)
        vocabulary = forgetful(read_vocabulary(path))
        assert any(0 in ids for ids in sentencepiece_ids(path.read_bytes()))
        assert transformers_ids(written(vocabulary, tmp_path / "hf")) == sentencepiece_ids(path.read_bytes())

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"model_type": "unigram"}, "not BPE"),
            ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
            ({"remove_extra_whitespaces": True}, "removes extra spaces"),
            ({"treat_whitespace_as_suffix": True}, "spaces unlike Llama's"),
        ],
    )
    def test_a_model_unlike_llamas_stays_what_it_is(self, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
        path = train_tokenizer(tmp_path / "tokenizer.model", vocab_size=330, **options)
        vocabulary = read_vocabulary(path)
        assert vocabulary.sentencepiece() == path.read_bytes()
        assert vocabulary.served_files() == {"tokenizer.model": path.read_bytes()}
        for write in (vocabulary.gguf_fields, vocabulary.huggingface, forgetful(vocabulary).sentencepiece):
            with pytest.raises(FormatError, match=reason):
                write()

    def test_a_model_that_says_nothing_of_spaces_removes_them(self, pieces: Path, tmp_path: Path) -> None:
        content = pieces.read_bytes()
        # What is left of a protocol buffer after its pieces, and then a trainer that says BPE and byte fallback.
        end, position = 0, 0
        while content[position] == 0x0A:
            position = end = position + 2 + content[position + 1]
        (tmp_path / "tokenizer.model").write_bytes(content[:end] + b"\x12\x05\x18\x02\x98\x02\x01")
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert theirs.encode("the  quick") == theirs.encode("the quick")
        with pytest.raises(FormatError, match="removes extra spaces"):
            read_vocabulary(tmp_path / "tokenizer.model").gguf_fields()

    def test_single_characters_may_have_one_score(self, pieces: Path, tmp_path: Path) -> None:
        vocabulary = forgetful(read_vocabulary(pieces))
        pairs = zip(vocabulary.tokens, vocabulary.scores, strict=True)
        scores = tuple(-1e4 if len(token) == 1 else score for token, score in pairs)
        changed = dataclasses.replace(vocabulary, scores=scores)
        assert transformers_ids(written(changed, tmp_path)) == sentencepiece_ids(pieces.read_bytes())

    def test_merges_of_added_tokens_do_not_count(self, pieces: Path, tmp_path: Path) -> None:
        content = json.loads(read_vocabulary(pieces).huggingface()["tokenizer.json"])
        token = "▁quick"
        content["added_tokens"].append({"id": content["model"]["vocab"][token], "content": token, "special": False})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
        assert vocabulary.types[vocabulary.tokens.index(token)] is TokenType.USER_DEFINED
        expected = sentencepiece.SentencePieceProcessor(model_file=str(pieces)).encode("the fox jumps")
        model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.sentencepiece())
        assert model.encode("the fox jumps") == expected

    def test_a_server_gets_the_file_that_there_was(self, pieces: Path, tmp_path: Path) -> None:
        vocabulary = forgetful(read_vocabulary(pieces))
        assert vocabulary.served_files() == {"tokenizer.model": vocabulary.sentencepiece()}
        from_json = through_json(vocabulary, tmp_path)
        assert from_json.served_files().keys() == {"tokenizer.json", "tokenizer_config.json"}
        assert from_json.served_files()["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


class TestByteLevel:
    def test_the_alphabet_of_bytes_is_gpt_2s(self) -> None:
        alphabet = {byte: character for character, byte in byte_alphabet().items()}
        assert sorted(alphabet) == list(range(256))
        assert set(alphabet.values()) == set(pre_tokenizers.ByteLevel.alphabet())
        cut = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("é \n~")
        assert cut[0][0] == "".join(alphabet[byte] for byte in "é \n~".encode())

    def test_a_token_that_merges_do_not_make_is_still_taken_for_a_word(self, crafted: Path, tmp_path: Path) -> None:
        vocabulary = read_vocabulary(crafted)
        folder = written(through_gguf(vocabulary, tmp_path), tmp_path / "hf")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, crafted.open("rb"))}
        theirs = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        assert theirs.encode("a hello") == [97, ranks[b" hello"]]
        for text in ("a hello", "a helloo", "hi abcd abc dabcd", "abcabcd"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["ignore_merges"] = False
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(FormatError, match="'Ġhello', that its merges do not make"):
            read_vocabulary(folder / "tokenizer.json").tiktoken()

    def test_a_tiktoken_file_is_read_with_metas_control_tokens(
        self, tiktoken_file: Path, ranks: dict[bytes, int]
    ) -> None:
        vocabulary, first = read_vocabulary(tiktoken_file), len(ranks)
        control = {vocabulary.tokens[id]: id - first for id in vocabulary.ids_of(TokenType.CONTROL)}
        assert (len(vocabulary.tokens), len(control)) == (first + 256, 256)
        # The ids that Meta gives in llama_models/llama3/tokenizer.py
        places = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4, "start_header_id": 6}
        places |= {"end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10}
        assert {name: control[f"<|{name}|>"] for name in places} == places
        assert (vocabulary.bos_id, vocabulary.eos_id) == (first, first + 1)
        assert vocabulary.stop_ids == (first + 1, first + 8, first + 9)

    @pytest.mark.parametrize("name", ["tiktoken_file", "crafted"])
    def test_merges_are_those_that_transformers_makes_of_the_ranks(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        path = request.getfixturevalue(name)
        vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(path))
        vocabulary = read_vocabulary(path)
        assert vocabulary.merges == tuple(map(" ".join, merges))
        assert {vocabulary.tokens[id]: id for id in vocabulary.ids_of(TokenType.NORMAL)} == vocab

    @pytest.mark.parametrize("hops", PATHS, ids="-".join)
    def test_every_way_keeps_the_ids(self, tiktoken_file: Path, hops: tuple[str, str], tmp_path: Path) -> None:
        expected = tiktoken_ids(tiktoken_file.read_bytes())
        first = vocabulary = read_vocabulary(tiktoken_file)
        for number, hop in enumerate(hops):
            vocabulary = HOPS[hop](forgetful(vocabulary), tmp_path / str(number))
        assert forgetful(vocabulary).tiktoken() == tiktoken_file.read_bytes()
        assert transformers_ids(written(forgetful(vocabulary), tmp_path / "hf")) == expected
        assert forgetful(vocabulary) == dataclasses.replace(first, origin=vocabulary.origin)

    @pytest.mark.parametrize("ignore_merges", [True, False])
    def test_a_trainers_single_merges_are_found_to_mean_the_ranks(
        self, trained: dict[str, Any], tiktoken_file: Path, ignore_merges: bool, tmp_path: Path
    ) -> None:
        content = json.loads(read_vocabulary(tiktoken_file).huggingface()["tokenizer.json"])
        content["model"]["merges"] = trained["model"]["merges"]
        content["model"]["ignore_merges"] = ignore_merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
        assert len(vocabulary.merges) == len(trained["model"]["merges"])
        assert vocabulary.tiktoken() == tiktoken_file.read_bytes()
        again = through_gguf(vocabulary, tmp_path)
        assert transformers_ids(written(again, tmp_path / "hf")) == tiktoken_ids(tiktoken_file.read_bytes())

    def test_merges_of_added_tokens_do_not_count(self, tiktoken_file: Path, tmp_path: Path) -> None:
        content = json.loads(read_vocabulary(tiktoken_file).huggingface()["tokenizer.json"])
        token = content["model"]["merges"][-1].replace(" ", "")
        content["added_tokens"].append({"id": content["model"]["vocab"][token], "content": token, "special": True})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
        assert vocabulary.types[vocabulary.tokens.index(token)] is TokenType.CONTROL
        assert 0 < len(vocabulary.merges) < len(content["model"]["merges"])

    def test_transformers_adds_the_beginning_and_decodes(self, tiktoken_file: Path, tmp_path: Path) -> None:
        vocabulary = read_vocabulary(tiktoken_file)
        tokenizer = AutoTokenizer.from_pretrained(written(vocabulary, tmp_path))
        assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id == vocabulary.bos_id
        assert tokenizer.eos_token == "<|end_of_text|>"
        for text, ids in zip(TEXTS, tiktoken_ids(tiktoken_file.read_bytes()), strict=True):
            assert tokenizer.decode(ids) == text

    def test_the_names_of_llama_3_0_are_metas_too(self, tiktoken_file: Path, ranks: dict[bytes, int]) -> None:
        vocabulary, first = read_vocabulary(tiktoken_file), len(ranks)
        reserved = (f"<|reserved_special_token_{n}|>" for n in range(251))
        kept = {0, 1, 6, 7, 9}
        names = [vocabulary.tokens[first + place] if place in kept else next(reserved) for place in range(256)]
        older = dataclasses.replace(vocabulary, tokens=(*vocabulary.tokens[:first], *names), originals={})
        assert older.tiktoken() == tiktoken_file.read_bytes()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda tokens, types: (tokens[:-1], types[:-1]), "255 control"),
            (lambda tokens, types: ((*tokens, "<pad>"), (*types, 3)), "257 control"),
            (lambda tokens, types: ((*tokens[:-1], "<|im_start|>"), types), r"<\|im_start\|>"),
            (
                lambda tokens, types: ((*tokens[:-250], "<|reserved_special_token_900|>", *tokens[-249:]), types),
                "means",
            ),
            (lambda tokens, types: (tokens, (*types[:-1], 4)), "no control token"),
            (lambda tokens, types: (tokens[-256:] + tokens[:-256], types[-256:] + types[:-256]), "after all others"),
        ],
        ids=["one less", "one more", "renamed", "header renamed", "user-defined", "first"],
    )
    def test_tiktoken_refuses_control_tokens_that_it_would_not_name(
        self, tiktoken_file: Path, change: Callable[..., Any], reason: str
    ) -> None:
        vocabulary = forgetful(read_vocabulary(tiktoken_file))
        tokens, types = change(vocabulary.tokens, vocabulary.types)
        # The fields of another order of ids would not fit the old special tokens.
        changed = dataclasses.replace(vocabulary, tokens=tokens, types=types, eos_id=None, stop_ids=())
        with pytest.raises(FormatError, match=reason):
            changed.tiktoken()
        assert changed.served_files().keys() == {"tokenizer.json", "tokenizer_config.json"}

    def test_tiktoken_refuses_merges_in_another_order_than_the_ids(self, tiktoken_file: Path) -> None:
        vocabulary = forgetful(read_vocabulary(tiktoken_file))
        for merges in (vocabulary.merges[::-1], vocabulary.merges[:-1], vocabulary.merges[3:]):
            with pytest.raises(FormatError, match="not in the order of its ids"):
                dataclasses.replace(vocabulary, merges=merges).tiktoken()

    def test_another_way_to_split_text_stays_what_it_is(self, tiktoken_file: Path, tmp_path: Path) -> None:
        files = read_vocabulary(tiktoken_file).huggingface()
        content = json.loads(files["tokenizer.json"])
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}"}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
        assert vocabulary.huggingface() == {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
        for write in (vocabulary.gguf_fields, vocabulary.tiktoken, forgetful(vocabulary).huggingface):
            with pytest.raises(FormatError, match="does not split text as Llama 3"):
                write()


DIALOGS = [
    [{"role": "user", "content": "Hello there"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  What is\n\nit? "}],
    [
        {"role": "system", "content": "naïve"},
        {"role": "user", "content": "1 22 333"},
        {"role": "assistant", "content": " I'm fine.\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "日本"},
        {"role": "user", "content": "\n😀"},
    ],
]


class TestChat:
    @pytest.mark.parametrize("dialog", DIALOGS, ids=len)
    def test_llama_2s_template_gives_metas_ids(self, pieces: Path, dialog: list[Any], tmp_path: Path) -> None:
        folder = written(forgetful(read_vocabulary(pieces)), tmp_path)
        template = AutoTokenizer.from_pretrained(folder).apply_chat_template(dialog)["input_ids"]
        encode = sentencepiece.SentencePieceProcessor(model_file=str(pieces)).encode
        contents = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            system, first, *rest = contents
            contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
        expected: list[int] = []
        for user, answer in zip(contents[::2], [*contents[1::2], None], strict=True):
            turn = f"[INST] {user.strip()} [/INST]"
            expected += [1, *encode(turn if answer is None else f"{turn} {answer.strip()} ")]
            expected += [2] * (answer is not None)
        assert template == expected
        assert template == load_tokenizer(pieces).encode_dialog(dialog)

    @pytest.mark.parametrize("dialog", DIALOGS, ids=len)
    def test_llama_3s_template_gives_metas_ids(self, tiktoken_file: Path, dialog: list[Any], tmp_path: Path) -> None:
        vocabulary = forgetful(read_vocabulary(tiktoken_file))
        tokenizer = AutoTokenizer.from_pretrained(written(vocabulary, tmp_path))
        template = tokenizer.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        ids = {name: vocabulary.tokens.index(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")}

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        expected = [vocabulary.bos_id]
        for message in (*dialog, {"role": "assistant", "content": None}):
            header = [ids["start_header_id"], *encode(message["role"]), ids["end_header_id"], *encode("\n\n")]
            content = message["content"]
            expected += header + ([] if content is None else [*encode(content.strip()), ids["eot_id"]])
        assert template == expected
        assert template == load_tokenizer(tiktoken_file).encode_dialog(dialog)
        without = tokenizer.apply_chat_template(dialog)["input_ids"]
        assert without == expected[: len(without)] and without[-1] == ids["eot_id"]

    @pytest.mark.parametrize("roles", ["assistant", "user user", "user system", "system assistant", "user tool"])
    def test_llama_2s_template_refuses_other_orders_of_roles(self, pieces: Path, roles: str, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(written(forgetful(read_vocabulary(pieces)), tmp_path))
        with pytest.raises(Exception, match="roles alternate"):
            tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles.split()])

    def test_a_template_is_carried_from_whichever_place_it_has(self, pieces: Path, tmp_path: Path) -> None:
        folder = written(forgetful(read_vocabulary(pieces)), tmp_path)
        config = json.loads((folder / "tokenizer_config.json").read_text())

        def found(template: Any) -> list[str | None]:
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
            read = [read_vocabulary(folder / name) for name in ("tokenizer.json", "tokenizer.model")]
            read.append(through_gguf(read[0], tmp_path))
            read.append(through_json(forgetful(read[0]), tmp_path / "again"))
            return [vocabulary.chat_template for vocabulary in read]

        assert found("{{ 'one' }}") == ["{{ 'one' }}"] * 4
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        assert found(several) == ["yes"] * 4
        assert found(None) == [None] * 4  # a base model's folder says so
        (folder / "chat_template.jinja").write_text("{{ 'file' }}")
        assert found("{{ 'one' }}") == ["{{ 'file' }}"] * 4


class TestAddedTokens:
    @pytest.fixture
    def tuned(self, pieces: Path, tmp_path: Path) -> Path:
        """A fine-tune as transformers saves it, with tokens after those of its tokenizer.model."""
        folder = written(read_vocabulary(pieces), tmp_path / "tuned")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<|im_end|>"})
        tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<tool>", special=False)])
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
        return folder

    @pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
    def test_they_keep_their_ids_in_every_format(self, tuned: Path, pieces: Path, name: str, tmp_path: Path) -> None:
        vocabulary = read_vocabulary(tuned / name)
        first = len(read_vocabulary(pieces).tokens)
        added = {vocabulary.tokens[id]: id for id in range(first, len(vocabulary.tokens))}
        assert sorted(added.values()) == list(range(first, first + 4))
        end, pad = added["<|im_end|>"], added["<pad>"]
        assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.stop_ids) == (end, pad, (2, end))
        for hop in HOPS.values():
            other = hop(forgetful(vocabulary), tmp_path / hop.__name__)
            assert (other.tokens, other.types) == (vocabulary.tokens, vocabulary.types)
            assert (other.eos_id, other.bos_id, other.unk_id) == (end, 1, 0)
            assert end in other.stop_ids
            assert other.types[added["<tool>"]] is TokenType.USER_DEFINED
            assert other.types[added["<|im_start|>"]] is TokenType.CONTROL
        model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.sentencepiece())
        assert {token: model.piece_to_id(token) for token in added} == added
        assert (model.bos_id(), model.eos_id()) == (1, end)
        assert model.encode("a <tool>") == [*model.encode("a "), added["<tool>"]]
        assert model.encode(TEXTS) == sentencepiece_ids(pieces.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(written(forgetful(vocabulary), tmp_path / "anew"))
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in added} == added
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)

    def test_a_model_file_is_continued_and_not_rewritten(self, tuned: Path, pieces: Path) -> None:
        content = read_vocabulary(tuned / "tokenizer.model").sentencepiece()
        assert content.startswith(pieces.read_bytes()) and content != pieces.read_bytes()

    def test_the_files_of_the_folder_are_written_as_they_were(self, tuned: Path) -> None:
        files = read_vocabulary(tuned / "tokenizer.model").huggingface()
        assert files.keys() >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
        assert all((tuned / name).read_bytes() == content for name, content in files.items())
        assert "tokenizer.model" not in read_vocabulary(tuned / "tokenizer.json").huggingface()

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
    def test_older_folders_list_them_beside_the_model(self, pieces: Path, name: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
        first = len(read_vocabulary(pieces).tokens)
        entry = {"content": "<|im_end|>", "special": True}
        listed = {"added_tokens_decoder": {str(first + 1): entry, "1": {"content": "<s>", "special": True}}}
        content = listed if name == "tokenizer_config.json" else {"<|im_end|>": first + 1}
        (tmp_path / name).write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.model")
        assert vocabulary.tokens[first:] == (f"[PAD{first}]", "<|im_end|>")
        kind = TokenType.CONTROL if name == "tokenizer_config.json" else TokenType.USER_DEFINED
        assert vocabulary.types[first:] == (TokenType.UNUSED, kind)
        tokenizer = AutoTokenizer.from_pretrained(written(vocabulary, tmp_path / "hf"))
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") == first + 1
        assert f"[PAD{first}]" not in tokenizer.get_vocab()
        assert read_vocabulary(tmp_path / "hf" / "tokenizer.json").tokens == vocabulary.tokens

    def test_pieces_that_users_define_are_found_alike_in_every_format(self, tmp_path: Path) -> None:
        path = train_tokenizer(tmp_path / "tokenizer.model", user_defined_symbols=["<tool>", "<to", "[x|y("])
        vocabulary = read_vocabulary(path)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        readers = [hop(forgetful(vocabulary), tmp_path / name).served() for name, hop in HOPS.items()]
        oracle = AutoTokenizer.from_pretrained(tmp_path / "json")
        for parts in itertools.product(("", " ", "x ", "<tool>"), ("<tool>", "<to", "[x|y("), (" y", "y")):
            text = "".join(parts)
            expected = theirs.encode(text)
            assert oracle.encode(text, add_special_tokens=False) == expected, text
            assert all(reader.encode(text, bos=False, eos=False) == expected for reader in readers), text

    def test_a_piece_with_a_space_is_found_where_spaces_are_markers(self, tmp_path: Path) -> None:
        path = train_tokenizer(tmp_path / "tokenizer.model", user_defined_symbols=["<tool>"])
        vocabulary = forgetful(read_vocabulary(path))
        id = vocabulary.tokens.index("<tool>")
        tokens = tuple("<to ol>" if token == "<tool>" else token for token in vocabulary.tokens)
        (tmp_path / "spaced.model").write_bytes(dataclasses.replace(vocabulary, tokens=tokens).sentencepiece())
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spaced.model"))
        assert id in theirs.encode("x<to ol>y") and id not in theirs.encode("x<tool>y")

    def test_a_server_gets_what_says_where_added_text_stands(self, tuned: Path, tmp_path: Path) -> None:
        """A tokenizer.model has no word on the spaces around a token that transformers added."""
        files = read_vocabulary(tuned / "tokenizer.model").served_files()
        assert "tokenizer.model" not in files and files["tokenizer.json"] == (tuned / "tokenizer.json").read_bytes()
        served, theirs = read_vocabulary(tuned / "tokenizer.model").served(), AutoTokenizer.from_pretrained(tuned)
        for text in ("<tool>", "a <tool> b", "x<tool>y", "<tool>y <tool>"):
            assert served.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False), text

    @pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
    @pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
    def test_conditions_on_added_text_stay_where_they_are(self, tuned: Path, name: str, flag: str) -> None:
        content = json.loads((tuned / "tokenizer.json").read_text())
        next(entry for entry in content["added_tokens"] if entry["content"] == "<tool>")[flag] = True
        (tuned / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tuned / name)
        assert "tokenizer.model" not in vocabulary.served_files()
        for write in (vocabulary.gguf_fields, vocabulary.sentencepiece, forgetful(vocabulary).huggingface):
            with pytest.raises(FormatError, match=f"'<tool>' is {flag}"):
                write()

    def test_two_different_tokenizers_in_one_folder_are_refused(self, pieces: Path, tmp_path: Path) -> None:
        written(read_vocabulary(DEMO), tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
        with pytest.raises(FormatError, match="different tokenizers"):
            read_vocabulary(tmp_path / "tokenizer.model")


class TestGGUF:
    def test_llama_2s_fields_are_those_of_llama_cpps_converter(self, pieces: Path) -> None:
        vocabulary = read_vocabulary(pieces)
        count = len(vocabulary.tokens)
        fields = vocabulary.gguf_fields(count + 2)
        assert fields.pop("tokenizer.ggml.tokens") == [*vocabulary.tokens, f"[PAD{count}]", f"[PAD{count + 1}]"]
        assert fields.pop("tokenizer.ggml.scores") == [*vocabulary.scores, -10000.0, -10000.0]
        assert fields.pop("tokenizer.ggml.token_type") == [*vocabulary.types, 5, 5]
        assert "bos_token + '[INST]" in fields.pop("tokenizer.chat_template")  # llama.cpp knows the format by it
        assert fields == {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.ggml.add_space_prefix": True,
        }

    def test_llama_3s_fields_are_those_of_llama_cpps_converter(self, tiktoken_file: Path) -> None:
        vocabulary = read_vocabulary(tiktoken_file)
        fields, first = vocabulary.gguf_fields(), len(vocabulary.tokens) - 256
        assert fields.pop("tokenizer.ggml.tokens") == list(vocabulary.tokens)
        assert fields.pop("tokenizer.ggml.token_type") == list(vocabulary.types)
        assert fields.pop("tokenizer.ggml.merges") == list(vocabulary.merges)
        assert "<|start_header_id|>" in fields.pop("tokenizer.chat_template")
        assert fields == {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.bos_token_id": first,
            "tokenizer.ggml.eos_token_id": first + 1,
            "tokenizer.ggml.eot_token_id": first + 9,
            "tokenizer.ggml.eom_token_id": first + 8,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.ggml.add_space_prefix": False,
        }

    def test_an_end_that_a_tiktoken_file_does_not_know_reaches_the_server(self, tiktoken_file: Path) -> None:
        fields = read_vocabulary(tiktoken_file).gguf_fields()
        end = fields["tokenizer.ggml.tokens"].index("<|reserved_special_token_5|>")
        vocabulary = Vocabulary.from_gguf(fields | {"tokenizer.ggml.eos_token_id": end})
        assert "tokenizer.model" in vocabulary.served_files()
        assert end in vocabulary.served().stop_ids

    @pytest.mark.parametrize("end", ["</s>", 2.0, -1, True, [[2]]])
    def test_ends_that_a_server_would_refuse_are_refused(self, pieces: Path, end: Any, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        with pytest.raises(FormatError, match="eos_token_id is .* must be token ids"):
            read_vocabulary(tmp_path / "tokenizer.model")

    def test_the_end_of_a_message_is_not_the_end_of_a_turn(self, tiktoken_file: Path) -> None:
        vocabulary = read_vocabulary(tiktoken_file)
        tokens = tuple("<|reserved|>" if token == "<|eot_id|>" else token for token in vocabulary.tokens)
        changed = dataclasses.replace(vocabulary, tokens=tokens, stop_ids=())
        fields = changed.gguf_fields()
        assert "tokenizer.ggml.eot_token_id" not in fields
        assert fields["tokenizer.ggml.eom_token_id"] == tokens.index("<|eom_id|>")

    def test_what_a_file_leaves_out_is_what_llama_cpp_assumes(self, pieces: Path) -> None:
        vocabulary = read_vocabulary(pieces)
        kept = {f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type")}
        fields = {key: value for key, value in vocabulary.gguf_fields().items() if key in kept}
        found = Vocabulary.from_gguf(fields | {"tokenizer.ggml.padding_token_id": 0xFFFFFFFF})
        assert found == dataclasses.replace(vocabulary, chat_template=None, origin=found.origin)

    def test_a_model_with_fewer_rows_than_tokens_is_refused(self, pieces: Path) -> None:
        vocabulary = read_vocabulary(pieces)
        with pytest.raises(FormatError, match="belongs to another model"):
            vocabulary.gguf_fields(len(vocabulary.tokens) - 1)

    def test_equal_scores_have_no_order_of_merges(self, pieces: Path) -> None:
        fields = read_vocabulary(pieces).gguf_fields()
        fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.scores"])
        with pytest.raises(FormatError, match="have the same score -1000"):
            Vocabulary.from_gguf(fields).huggingface()

    def test_a_piece_that_text_may_become_but_must_not_is_refused(self, pieces: Path) -> None:
        vocabulary = read_vocabulary(pieces)
        types = list(vocabulary.types)
        types[vocabulary.tokens.index("▁the")] = TokenType.UNUSED
        changed = dataclasses.replace(vocabulary, types=tuple(types), originals={})
        assert sentencepiece.SentencePieceProcessor(model_proto=changed.sentencepiece()).encode("the") != []
        with pytest.raises(FormatError, match="▁the.*marked as unused"):
            changed.huggingface()

    def test_a_piece_with_a_character_of_its_own_is_refused(self, pieces: Path) -> None:
        fields = read_vocabulary(pieces).gguf_fields()
        fields["tokenizer.ggml.tokens"] += ["ΩaΩ"]
        fields["tokenizer.ggml.scores"] += [-1e4]
        fields["tokenizer.ggml.token_type"] += [1]
        with pytest.raises(FormatError, match="ΩaΩ.*characters that are no tokens"):
            Vocabulary.from_gguf(fields).huggingface()


class TestMerges:
    def test_pairs_that_are_said_to_mean_ranks_do(self) -> None:
        """Random pairs over three letters, where every trap is near: the packages must agree wherever we say so."""
        verdicts = {True: 0, False: 0}
        for seed in range(150):
            source = random.Random(seed)
            tokens, merges = list("abc"), []
            for _ in range(source.randrange(3, 25)):
                pair = source.choice(tokens), source.choice(tokens)
                if pair not in merges and len("".join(pair)) < 12:
                    merges.append(pair)
                    tokens += ["".join(pair)] * ("".join(pair) not in tokens)
            if seed % 3 == 0:
                source.shuffle(merges)
            order = ranks_of(tokens, merges)
            agrees = disagreement(order, merges) is None
            verdicts[agrees] += 1
            if agrees:
                names = ["<unk>", "<s>", "</s>", *order]
                by_score = Vocabulary(
                    kind="sentencepiece",
                    tokens=tuple(names),
                    types=(2, 3, 3, *[1] * len(order)),
                    scores=(0.0,) * 3 + tuple(0.0 - rank for rank in order.values()),
                    unk_id=0,
                )
                theirs = sentencepiece.SentencePieceProcessor(model_proto=by_score.sentencepiece())
                vocab = {name: id for id, name in enumerate(names)}
                in_pairs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
                for _ in range(40):
                    text = "".join(source.choices("abc", k=25))
                    assert in_pairs.encode(text).ids == theirs.encode(text), (seed, text)
        assert min(verdicts.values()) > 20

    def test_pairs_that_differ_are_told_apart(self) -> None:
        # By rank "bc" would make "abc" with a lone "a"; the pairs make it of "ab" and "c" only.
        order = ranked(["a", "b", "c", "bc", "ab", "abc"])
        assert disagreement(order, [("b", "c"), ("a", "b"), ("ab", "c")]) is not None
        assert disagreement(order, [("b", "c"), ("a", "b"), ("a", "bc")]) is None
        assert disagreement(order, [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]) is None
        assert disagreement(order, [("a", "b"), ("b", "c"), ("a", "bc")]) is not None
        assert join("abc", order, below=order["abc"]) == ["a", "bc"]

    def test_a_tokenizer_json_whose_merges_no_scores_express_stays_what_it_is(
        self, pieces: Path, tmp_path: Path
    ) -> None:
        content = json.loads(read_vocabulary(pieces).huggingface()["tokenizer.json"])
        # Every way to make a token but the first; some can only be made in that way.
        seen: set[str] = set()
        merges = content["model"]["merges"]
        content["model"]["merges"] = [m for m in merges if m.replace(" ", "") in seen or seen.add(m.replace(" ", ""))]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
        assert vocabulary.served_files().keys() == {"tokenizer.json"}
        with pytest.raises(FormatError, match="no scores mean the same as its merges"):
            vocabulary.sentencepiece()


def damaged_json(content: dict[str, Any], **changes: Any) -> bytes:
    """tokenizer.json with parts of its model replaced."""
    changed = content | {"model": content["model"] | changes}
    return json.dumps(changed | {key: changes[key] for key in changes if key in content}).encode()


class TestStrangers:
    @pytest.fixture(scope="class")
    @staticmethod
    def content(pieces: Path) -> dict[str, Any]:
        return json.loads(read_vocabulary(pieces).huggingface()["tokenizer.json"])

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"vocab": {"a": 0, "b": 0}}, "same id"),
            ({"vocab": {"a": -1}}, "allowed"),
            ({"vocab": {"a": 1 << 40}}, "allowed"),
            ({"vocab": {"a": True}}, "allowed"),
            ({"vocab": {"a": 0.5}}, "allowed"),
            ({"vocab": [["a", 0.0]]}, "dict is needed"),
            ({"vocab": {}, "merges": [], "added_tokens": []}, "0 tokens"),
            ({"vocab": {"a": 3, "\ud800": 4}, "merges": []}, "surrogate"),
            ({"vocab": {"a": 3, "b" * 6000: 4}, "merges": []}, "too long"),
            ({"vocab": {"a": 3, "[PAD4]": 5}, "merges": []}, "both"),
            ({"merges": ["a"]}, "no pair"),
            ({"merges": ["a b c"]}, "no pair"),
            ({"merges": [["a", 1]]}, "no pair"),
            ({"merges": ["☃ ☃"]}, "no pair of tokens that make"),
            ({"merges": None}, "merges is missing"),
            ({"type": "Unigram"}, "only 'BPE'"),
            ({"dropout": 0.1}, "dropout"),
            ({"added_tokens": [{"id": 0}]}, "no added token"),
            ({"added_tokens": [{"id": 0, "content": "x"}, {"id": 0, "content": "x"}]}, "id of its own"),
            ({"added_tokens": [{"id": 1 << 30, "content": "x"}]}, "no added token"),
            ({"added_tokens": 3}, "added_tokens"),
        ],
    )
    def test_a_tokenizer_json_that_makes_no_sense_is_refused(
        self, content: dict[str, Any], changes: dict[str, Any], reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(damaged_json(content, **changes))
        with pytest.raises(FormatError, match=reason) as raised:
            read_vocabulary(path)
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("model", "bert", "can be converted"),
            ("model", None, "is missing"),
            ("model", 3, "str is needed"),
            ("tokens", ["a", "b"], "do not go together"),
            ("tokens", "abc", "list is needed"),
            ("tokens", [1], "other elements"),
            ("scores", None, "is missing"),
            ("scores", [1], "other elements"),
            ("token_type", lambda types: [7, *types[1:]], "token types are 1 to 6"),
            ("token_type", lambda types: [0, *types[1:]], "token types are 1 to 6"),
            ("token_type", lambda types: [*types[:3], 1, *types[4:]], "255 bytes"),
            ("token_type", lambda types: [6, *types[1:]], "<0x00> to <0xFF>"),
            ("scores", lambda scores: [float("nan"), *scores[1:]], "finite"),
            ("scores", lambda scores: [1e300, *scores[1:]], "finite"),
            ("scores", lambda scores: [-1e300, *scores[1:]], "finite"),
            ("tokens", lambda tokens: ["", *tokens[1:]], "not empty"),
            ("tokens", lambda tokens: ["<s>", *tokens[1:]], "both"),
            ("bos_token_id", 1 << 20, "bos token's id"),
            ("bos_token_id", True, "int is needed"),
            ("eos_token_id", -5, "eos token's id"),
            ("eot_token_id", 1 << 20, "stop token's id"),
            ("add_bos_token", 1, "bool is needed"),
        ],
    )
    def test_gguf_fields_that_make_no_sense_are_refused(self, pieces: Path, key: str, value: Any, reason: str) -> None:
        fields = read_vocabulary(pieces).gguf_fields()
        key = f"tokenizer.ggml.{key}"
        fields[key] = value(fields[key]) if callable(value) else value
        with pytest.raises(FormatError, match=reason) as raised:
            Vocabulary.from_gguf(fields, "strange.gguf")
        assert str(raised.value).startswith("strange.gguf: ")

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("pre", "qwen2", "only Llama 3's way"),
            ("pre", None, "only Llama 3's way"),
            ("merges", ["a b"], "no pair of tokens"),
            ("merges", lambda merges: [*merges, merges[0]], "twice"),
            ("merges", lambda merges: [f" {merges[0]}"], "no pair of tokens"),
            ("tokens", lambda tokens: ["é☃", *tokens[1:]], "stand for no byte"),
            ("tokens", lambda tokens: ["!!!!!!", *tokens[1:]], "no token for the byte 0x21"),
            ("token_type", lambda types: [*types[:-1], 6], "mixes byte tokens"),
        ],
    )
    def test_byte_level_gguf_fields_that_make_no_sense_are_refused(
        self, tiktoken_file: Path, key: str, value: Any, reason: str
    ) -> None:
        fields = read_vocabulary(tiktoken_file).gguf_fields()
        key = f"tokenizer.ggml.{key}"
        fields[key] = value(fields[key]) if callable(value) else value
        with pytest.raises(FormatError, match=reason):
            Vocabulary.from_gguf(fields)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"!!!! {next}", "base64 and its rank"),
            (b"YQ {next}", "base64"),
            (b"YWFhYWFh", "base64 and its rank"),
            (b"YWFhYWFh 5", "rank of another"),
            (b"YWFhYWFh 999999", "ranks of its"),
            (b"YWFhYWFh 99999999999", "base64 and its rank"),
            (b"YQ== {next}", "both"),
            (base64.b64encode(b"a" * 6000) + b" {next}", "too long"),
        ],
        ids=range(8),
    )
    def test_a_tiktoken_file_that_makes_no_sense_is_refused(
        self, tiktoken_file: Path, line: bytes, reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "tokenizer.model"
        content = tiktoken_file.read_bytes()
        path.write_bytes(content + line.replace(b"{next}", b"%d" % content.count(b"\n")) + b"\n")
        with pytest.raises(FormatError, match=reason) as raised:
            read_vocabulary(path)
        assert str(raised.value).startswith(f"{path}: ")

    def test_tokens_that_are_too_long_are_refused_before_they_are_joined(
        self, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def joined(*_: object) -> None:
            raise AssertionError("this would take hours")

        monkeypatch.setattr("formats.vocabulary_tiktoken.merges_of", joined)
        monkeypatch.setattr("formats.vocabulary_tokenizer_json.disagreement", joined)
        (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"a" * 6000) + b" 0\n")
        (tmp_path / "tokenizer.json").write_bytes(damaged_json(content, vocab={"a" * 6000: 3, "a": 4}, merges=[]))
        for name in ("tokenizer.model", "tokenizer.json"):
            with pytest.raises(FormatError, match="too long"):
                read_vocabulary(tmp_path / name)

    @pytest.mark.parametrize("kind", ["pieces", "tiktoken_file"])
    def test_no_damage_to_a_model_file_is_more_than_an_error(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        whole, source = request.getfixturevalue(kind).read_bytes(), random.Random(1)
        path, refused = tmp_path / "tokenizer.model", 0
        for _ in range(150):
            content = bytearray(whole[: source.randrange(len(whole))] if source.random() < 0.3 else whole)
            for _ in range(source.randrange(4)):
                if content:
                    content[source.randrange(len(content))] = source.randrange(256)
            path.write_bytes(content)
            try:
                forgetful(read_vocabulary(path)).served_files()
            except FormatError:
                refused += 1
        assert refused > 30

    @pytest.mark.parametrize("kind", ["pieces", "crafted"])
    def test_no_damage_to_a_json_file_is_more_than_an_error(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """Any value anywhere may be of any other type."""
        source, refused = random.Random(2), 0
        folder = written(forgetful(read_vocabulary(request.getfixturevalue(kind))), tmp_path / "hf")
        (folder / "tokenizer.model").unlink(missing_ok=True)
        names = ("tokenizer.json", "tokenizer_config.json")
        whole = {name: (folder / name).read_text() for name in names}
        strange = [None, True, -1, 1 << 70, 0.5, "", "x", [], {}, [[]], [{}], {"type": []}, {"x": None}, "\ud800"]
        for _ in range(120):
            name = source.choice(names)
            changed = json.loads(whole[name])
            holder = changed
            while source.random() < 0.8:
                keys = list(holder) if isinstance(holder, dict) else range(len(holder))
                inner = [holder[key] for key in keys if isinstance(holder[key], list | dict) and holder[key]]
                holder = source.choice(inner) if inner else holder
            key = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key] = source.choice(strange)
            for other in names:
                (folder / other).write_text(json.dumps(changed) if other == name else whole[other])
            try:
                forgetful(read_vocabulary(folder / "tokenizer.json")).served_files()
            except FormatError:
                refused += 1
        assert refused > 15

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x0a",
            b"\x0a\xff",
            b"\x0a" + b"\xff" * 12,
            b"\x0b",
            b"\x08\x01",
            b"\x0a\x02\x08\x01",
            b"PK\x03\x04",
            b"\x0a\x06\x0a\x01a\x12\x01b",
        ],
    )
    def test_a_file_of_another_kind_is_refused_by_its_name(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(FormatError, match=f"{tmp_path}/tokenizer.model: .*neither"):
            read_vocabulary(tmp_path / "tokenizer.model")

    def test_a_file_that_is_too_large_or_missing_is_refused(self, tmp_path: Path) -> None:
        with open(tmp_path / "tokenizer.model", "wb") as file:
            file.truncate(100_000_001)
        with pytest.raises(FormatError, match="too many for a tokenizer"):
            read_vocabulary(tmp_path / "tokenizer.model")
        with pytest.raises(FormatError, match="No such file"):
            read_vocabulary(tmp_path / "other.model")

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("tokenizer_config.json", {"bos_token": "<none>"}, "bos_token is '<none>'"),
            ("tokenizer_config.json", {"eos_token": {"content": 3}}, "eos_token is 3"),
            ("tokenizer_config.json", {"chat_template": 3}, "chat_template is 3"),
            ("tokenizer_config.json", [], "a JSON object is needed"),
            ("special_tokens_map.json", {"bos_token": "<none>"}, "special_tokens_map.json: bos_token is '<none>'"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(
        self, pieces: Path, name: str, content: Any, reason: str, tmp_path: Path
    ) -> None:
        (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(FormatError, match=reason):
            read_vocabulary(tmp_path / "tokenizer.model")

    def test_the_wrong_kind_is_refused(self, pieces: Path, tiktoken_file: Path) -> None:
        with pytest.raises(FormatError, match="other kind, 'sentencepiece'"):
            read_vocabulary(pieces).tiktoken()
        with pytest.raises(FormatError, match="other kind, 'bpe'"):
            read_vocabulary(tiktoken_file).sentencepiece()

    def test_sentencepiece_needs_an_unknown_token_and_control_tokens(self, pieces: Path) -> None:
        vocabulary = forgetful(read_vocabulary(pieces))
        for id, reason in ((0, "one unknown token"), (1, "bos token is no control token")):
            types = (*vocabulary.types[:id], TokenType.NORMAL, *vocabulary.types[id + 1 :])
            with pytest.raises(FormatError, match=f"cannot be written as a SentencePiece model.*{reason}"):
                dataclasses.replace(vocabulary, types=types).sentencepiece()
