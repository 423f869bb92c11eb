"""tokenizer.json in all its variations, checked against transformers, and what a damaged one is told."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixture import chat, nasty_texts, write_kinds, write_pieces
from transformers import AutoTokenizer

from tokenizing import Tokenizer, TokenizerError, load_tokenizer

END, END_OF_MESSAGE, END_OF_TURN = 1, 8, 9  # places behind the ranks


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def loaded(paths: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(path) for kind, path in paths.items()}


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a tokenizer.json without anything beside it, changed in place."""
    content = json.loads(source.read_text())
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def added(id: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **flags, "special": special}


METASPACE = [
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    for scheme in ("first", "always", "never")
]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PIECE_LAYOUTS = [
    *({"pre_tokenizer": metaspace, "normalizer": None} for metaspace in METASPACE),
    {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
    {"pre_tokenizer": None, "normalizer": REPLACE},
]


@pytest.mark.parametrize("layout", PIECE_LAYOUTS)
def test_spaces_become_pieces_as_each_release_of_transformers_writes_it(layout, paths, tmp_path):
    path = write_pieces(tmp_path, paths["sentencepiece"], changes=layout)
    tokenizer, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [" ", " a", "  the", "▁a", *nasty_texts(200, seed=8)]:
        assert tokenizer.encode(text, bos=False, eos=False) == oracle.encode(text, add_special_tokens=False), text


def test_a_file_alone_has_the_special_tokens_of_the_usual_names(paths, tmp_path, loaded):
    first = loaded["tiktoken"].vocab_size - 256
    alone = load_tokenizer(changed(paths["byte-level"], tmp_path / "3", lambda content: None))
    assert (alone.bos_id, alone.eos_id) == (first, first + END)
    assert alone.stop_ids == {first + END, first + END_OF_MESSAGE, first + END_OF_TURN}
    pieces = load_tokenizer(changed(paths["pieces"], tmp_path / "2", lambda content: None))
    assert (pieces.bos_id, pieces.eos_id, pieces.stop_ids) == (1, 2, {2})


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_the_settings_beside_a_file_name_its_special_tokens(kind, paths, tmp_path, loaded):
    size = loaded[kind].vocab_size
    content = [added(size, "<|im_start|>", special=False), added(size + 1, "<|im_end|>", special=True)]
    path = changed(paths[kind], tmp_path, lambda file: file["added_tokens"].extend(content))
    config = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size + 2, size, size + 1)
    assert tokenizer.stop_ids == loaded[kind].stop_ids - {loaded[kind].eos_id} | {size + 1} | (
        {size - 256 + END_OF_TURN} if kind == "byte-level" else set()
    )
    text = loaded[kind].decode([300])  # some word
    for stops in (300, [300, size]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "temperature": 0.6}))
        again = load_tokenizer(path)
        assert again.stop_ids == tokenizer.stop_ids | {300} | set(stops if isinstance(stops, list) else ())
        # What ends an answer is no text any more, and neither is what begins one.
        assert again.token_bytes(300) == again.token_bytes(size) == b""
        ids = again.encode(f"{text}<|im_start|><|im_end|>", bos=False, eos=False)
        assert {300, size, size + 1}.isdisjoint(ids) and again.decode(ids) == f"{text}<|im_start|><|im_end|>"


def test_a_setting_that_names_no_token_is_refused(paths, tmp_path):
    path = changed(paths["byte-level"], tmp_path, lambda content: None)
    for file, settings, problem in (
        ("tokenizer_config.json", {"eos_token": "<|nobody|>"}, r"no token '<\|nobody\|>', .*tokenizer_config.json"),
        ("tokenizer_config.json", {"bos_token": ["a"]}, r"no token \['a'\], .*bos_token"),
        ("special_tokens_map.json", {"eos_token": "<|nobody|>"}, r"no token '<\|nobody\|>', .*special_tokens_map.json"),
    ):
        (tmp_path / file).write_text(json.dumps(settings))
        with pytest.raises(TokenizerError, match=f"{path}: .*{problem}"):
            load_tokenizer(path)
        (tmp_path / file).write_text("{")
        with pytest.raises(TokenizerError, match=f"{tmp_path / file}: no valid JSON"):
            load_tokenizer(path)
        (tmp_path / file).unlink()


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_added_tokens_that_are_text_are_taken_whole_as_transformers_does(kind, paths, tmp_path, loaded):
    size = loaded[kind].vocab_size
    content = [
        added(size, "<think>", special=False),
        added(size + 7, " quick é", special=False) | {"normalized": True, "lstrip": True},  # ids may have holes
        added(size + 8, "word", special=False) | {"single_word": True},
    ]

    def extend(file: dict[str, Any]) -> None:
        file["added_tokens"].extend(content)
        file["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in content}

    path = changed(paths[kind], tmp_path, extend)
    (tmp_path / "tokenizer_config.json").write_bytes((paths[kind].parent / "tokenizer_config.json").read_bytes())
    tokenizer, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.token_bytes(size), tokenizer.token_bytes(size + 1)) == (
        size + 9,
        b"<think>",
        b"",
    )
    generator, used = random.Random(9), set()
    for text in nasty_texts(200, seed=10):
        text += "".join(generator.choices(["<think>", "  quick é", "word", " word ", "swords", text], k=4))
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == oracle.encode(text, add_special_tokens=False), text
        used |= set(ids)
    assert {size, size + 7, size + 8} <= used


@pytest.mark.parametrize(("kind", "token", "text"), [("pieces", "☃", "x☃"), ("byte-level", "word", "word1")])
def test_an_added_token_is_none_of_the_models_words(kind, token, text, paths, tmp_path, loaded):
    entry = added(loaded[kind].vocab_size, token, special=False) | {"single_word": True}
    path = changed(paths[kind], tmp_path, lambda file: file["added_tokens"].append(entry))
    assert load_tokenizer(path).encode(text, bos=False, eos=False) == loaded[kind].encode(text, bos=False, eos=False)


def test_the_oldest_settings_name_special_tokens_too(paths, tmp_path, loaded):
    entry = added(loaded["pieces"].vocab_size, "<|end|>", special=True)
    path = changed(paths["pieces"], tmp_path, lambda file: file["added_tokens"].append(entry))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert load_tokenizer(path).stop_ids == {entry["id"]}


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_no_merge_and_no_whole_word_makes_a_control_token(kind, paths, tmp_path, loaded):
    """A file may have its control tokens among the tokens that text is made of, which transformers then makes."""
    size = loaded[kind].vocab_size
    vocab = json.loads(paths[kind].read_text())["model"]["vocab"]
    word = "▁the" if kind == "pieces" else next(token for token in vocab if len(token) > 2 and token.isascii())

    def forge(file: dict[str, Any]) -> None:
        model = file["model"]
        model["ignore_merges"] = True
        file["added_tokens"].append(added(model["vocab"][word], word, special=True))
        file["added_tokens"].append(added(size, "<|", special=False))
        model["vocab"] |= {"qx": size + 1, "qxq": size + 2}
        pair = (lambda left, right: f"{left} {right}") if isinstance(model["merges"][0], str) else lambda *parts: parts
        model["merges"] += [pair("q", "x"), pair("qx", "q")]
        file["added_tokens"].append(added(size + 1, "qx", special=True))

    path = changed(paths[kind], tmp_path, forge)
    forged = {json.loads(path.read_text())["model"]["vocab"][word], size + 1}
    tokenizer, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path)
    spoken = word.removeprefix("▁")
    for text in (spoken, f" {spoken} {spoken}", "qx", "qxq", "a qx", "xqxqx"):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert forged.isdisjoint(ids) and tokenizer.decode(ids) == text
    assert not forged.isdisjoint(oracle.encode("qx", add_special_tokens=False))


def test_chat_tokens_that_are_not_marked_as_special_are_control_tokens_all_the_same(paths, tmp_path, loaded):
    def unmark(file: dict[str, Any]) -> None:
        for entry in file["added_tokens"]:
            entry["special"] = False

    tokenizer = load_tokenizer(changed(paths["byte-level"], tmp_path, unmark))
    text = "<|eot_id|><|start_header_id|>system<|end_header_id|>\n\nhi<|begin_of_text|><|end_of_text|><|eom_id|>"
    assert tokenizer.encode_dialog(chat(text)) == loaded["tiktoken"].encode_dialog(chat(text))


def test_a_vocabulary_without_chat_tokens_refuses_dialogs_only(paths, tmp_path, loaded):
    keep = ("<|begin_of_text|>", "<|end_of_text|>")

    def forget(file: dict[str, Any]) -> None:
        file["added_tokens"] = [entry for entry in file["added_tokens"] if entry["content"] in keep]

    path = changed(paths["byte-level"], tmp_path, forget)
    tokenizer = load_tokenizer(path)
    ids = loaded["tiktoken"].encode("Hi <|eot_id|>", bos=False, eos=False)
    assert tokenizer.encode("Hi <|eot_id|>", bos=False, eos=False) == ids
    with pytest.raises(TokenizerError, match=r"no <\|start_header_id\|>.* send a prompt") as caught:
        tokenizer.encode_dialog(chat("a"))
    assert str(path) not in str(caught.value)  # a client reads this


def test_what_a_file_says_of_lengths_and_ends_is_not_done(paths, tmp_path, loaded):
    def restrict(file: dict[str, Any]) -> None:
        file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        file["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    for kind in ("pieces", "byte-level"):
        tokenizer = load_tokenizer(changed(paths[kind], tmp_path / kind, restrict))
        for text in ("a", "one two three four"):
            assert tokenizer.encode(text, bos=False, eos=False) == loaded[kind].encode(text, bos=False, eos=False)


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_merges_may_be_texts_or_pairs(kind, paths, tmp_path, loaded):
    def respell(file: dict[str, Any]) -> None:
        merges = file["model"]["merges"]
        file["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else " ".join(merge) for merge in merges]

    tokenizer = load_tokenizer(changed(paths[kind], tmp_path, respell))
    for text in nasty_texts(50, seed=11):
        assert tokenizer.encode(text, bos=False, eos=False) == loaded[kind].encode(text, bos=False, eos=False)


# --- bad files


def place(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change that puts a value at a place such as model.vocab.the."""

    def change(content: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            content = content[int(name) if name.isdigit() else name]
        content[last] = value

    return change


def remove(path: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            content = content[name]
        del content[last]

    return change


def append(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        for name in path.split("."):
            content = content[name]
        content.append(value)

    return change


OTHER_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BAD_JSON = {
    "another model": (place("model.type", "Unigram"), "model.type is 'Unigram'"),
    "no model": (remove("model"), "model is None, but must be an object"),
    "no vocabulary": (place("model.vocab", [1]), r"model.vocab is \[1\], but must be an object"),
    "an empty vocabulary": (lambda content: content.update(added_tokens=[], model={"type": "BPE", "vocab": {}}), "bos"),
    "chance": (place("model.dropout", 0.1), "model.dropout is 0.1"),
    "suffixes": (place("model.end_of_word_suffix", "</w>"), "model.end_of_word_suffix is '</w>'"),
    "a flag that is none": (place("model.ignore_merges", "yes"), "model.ignore_merges is 'yes'"),
    "an id that is true": (place("model.vocab.qqq", True), "'qqq' has the id True"),
    "an id below zero": (place("model.vocab.qqq", -1), "'qqq' has the id -1"),
    "a huge id": (place("model.vocab.qqq", 10**12), "'qqq' has the id 1000000000000; .* 0 to 1048575"),
    "a fraction": (place("model.vocab.qqq", 3.0), "'qqq' has the id 3.0"),
    "an id twice": (place("model.vocab.qqq", 7), "have the same id 7"),
    "a token without text": (place("model.vocab.\ud800", 5000), "is no text"),
    "a token of nothing": (
        lambda content: content["model"]["vocab"].update({"": 5000}),
        "the token '' has the id 5000",
    ),
    "an added token of nothing": (append("added_tokens", added(5000, "", special=False)), "added_tokens has ''"),
    "an added token twice": (append("added_tokens", added(5000, "<|eot_id|>", special=True)), "twice"),
    "an added token with another id": (append("added_tokens", added(5000, "a", special=False)), "'a' has the ids"),
    "an added token that is a text": (append("added_tokens", "<s>"), "one of added_tokens is '<s>'"),
    "added tokens that are no list": (place("added_tokens", 5), "added_tokens is 5"),
    "no merges": (remove("model.merges"), "model.merges is None"),
    "a merge of three": (append("model.merges", ["a", "b", "c"]), r"model.merges has \['a', 'b', 'c'\]"),
    "a merge of nothing known": (append("model.merges", ["qq", "ww"]), "cannot be used"),
    "a merge of numbers": (append("model.merges", [1, 2]), r"model.merges has \[1, 2\]"),
    "another way to cut": (place("pre_tokenizer.pretokenizers", [OTHER_SPLIT, BYTE_LEVEL]), "no Llama model cuts"),
    "GPT-2's way to cut": (place("pre_tokenizer", BYTE_LEVEL), "no Llama model cuts"),
    "a normalizer": (place("normalizer", {"type": "NFKC"}), "no Llama model cuts"),
    "no way to cut": (place("pre_tokenizer", None), "no Llama model cuts"),
    "characters that are no bytes": (place("model.vocab.日", 5000), "'日' is not written in byte-level BPE's alphabet"),
    "a byte left out": (lambda content: content["model"]["vocab"].pop("Ā"), "no token for the byte 0x00"),
    "no first token": (lambda content: content["added_tokens"].pop(0), "does not say which token its bos_token is"),
    "pieces without bytes": (place("model.byte_fallback", True), "no Llama model cuts"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_tokenizer_json_that_makes_no_sense_is_refused_with_the_reason(name, paths, tmp_path, capfd):
    change, problem = BAD_JSON[name]
    path = changed(paths["byte-level"], tmp_path, change)
    with pytest.raises(TokenizerError, match=f"^{path}: .*{problem}") as caught:
        load_tokenizer(path)
    assert len(str(caught.value)) < 500 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["model"]["vocab"].pop("<0x41>"), "no token <0x41>"),
        (append("added_tokens", added(3 + 0x41, "<0x41>", special=True)), "no token <0x41>"),
        (place("pre_tokenizer", METASPACE[0] | {"split": True}), "no Llama model cuts"),
        (place("normalizer", None), "no Llama model cuts"),
        (place("model.byte_fallback", False), "no Llama model cuts"),
    ],
)
def test_pieces_that_cannot_write_every_text_are_refused(change, problem, paths, tmp_path):
    path = changed(paths["pieces"], tmp_path, change)
    with pytest.raises(TokenizerError, match=f"^{path}: .*{problem}"):
        load_tokenizer(path)


BROKEN = {
    "cut": (lambda content: content[: len(content) // 2], "no valid JSON"),
    "deep": (lambda content: b'{"a":' * 100_000, "no valid JSON"),
    "not UTF-8": (lambda content: content.replace(b"header", b"\xff"), "no valid JSON"),
    "a number of 5,000 digits": (lambda content: b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    "empty": (lambda content: b"", "is empty"),
    "a pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(name, paths, tmp_path, capfd):
    change, problem = BROKEN[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(change(paths["byte-level"].read_bytes()))
    with pytest.raises(TokenizerError, match=f"^{path}: .*{problem}"):
        load_tokenizer(path)
    assert capfd.readouterr() == ("", "")
