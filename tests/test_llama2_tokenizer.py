"""Tokenizer, Llama-2 chat format and StreamDecoder, checked against sentencepiece itself and against brute force."""

import codecs
import random
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizer_fixture import train_tokenizer

from llama2_tokenizer import Tokenizer
from tokenizing import MAX_MODEL_BYTES, DialogError, StreamDecoder, TokenizerError, check_dialog

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
BYTE_0 = 3  # the id of <0x00>, as in Llama's vocabulary


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="session")
def model(model_path: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model_path))


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    dialog = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return dialog if system is None else [{"role": "system", "content": system}, *dialog]


def rendered(dialog: list[dict[str, str]]) -> list[str]:
    """Each turn's text by Meta's rule."""
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
    turns = [
        f"[INST] {user.strip()} [/INST] {answer.strip()} "
        for user, answer in zip(contents[::2], contents[1::2], strict=False)
    ]
    return [*turns, f"[INST] {contents[-1].strip()} [/INST]"]


def meta_ids(model: SentencePieceProcessor, dialog: list[dict[str, str]]) -> list[int]:
    turns = [[1, *model.encode(text), 2] for text in rendered(dialog)]
    return sum(turns, [])[:-1]


def pieces(model: SentencePieceProcessor, ids: list[int]) -> list[str]:
    return [model.id_to_piece(id) for id in ids]


# --- loading


def test_a_loaded_model_tells_its_sizes_and_special_ids(model_path, tokenizer, model):
    assert tokenizer.path == str(model_path)
    assert tokenizer.vocab_size == model.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, frozenset({2}))


def write_nothing(path: Path, good: bytes) -> None: ...


def write_folder(path: Path, good: bytes) -> None:
    path.mkdir()


def write_large(path: Path, good: bytes) -> None:
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(MAX_MODEL_BYTES + 1)  # sparse: takes no room on the disk


BAD_FILES = {
    "missing": (write_nothing, "No such file"),
    "folder": (write_folder, "is not a file"),
    "empty": (lambda path, good: path.write_bytes(b""), "is empty"),
    "text": (lambda path, good: path.write_text("version https://git-lfs"), "no SentencePiece model.*git-lfs"),
    "zeros": (lambda path, good: path.write_bytes(bytes(1000)), "no SentencePiece model"),
    "cut": (lambda path, good: path.write_bytes(good[: len(good) // 2]), "no SentencePiece model"),
    "damaged piece": (lambda path, good: path.write_bytes(good.replace(b"lpful", b"\xfflpfu")), "damaged piece"),
    "large": (write_large, f"{MAX_MODEL_BYTES + 1} bytes are too many.*at most {MAX_MODEL_BYTES}"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_model_is_refused_by_name_with_nothing_printed(kind, tmp_path, model_path, capfd):
    write, reason = BAD_FILES[kind]
    path = tmp_path / "tokenizer.model"
    write(path, model_path.read_bytes())
    with pytest.raises(TokenizerError, match=f"{path}.*{reason}"):
        Tokenizer(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"bos_id": -1}, {"eos_id": -1}, {"user_defined_symbols": ["<s>"]}])
def test_a_model_without_control_symbols_for_both_ends_of_a_text_is_refused(options, tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.model", **options)
    with pytest.raises(TokenizerError, match="has no control symbol for the (beginning|end)"):
        Tokenizer(path)


# --- text to ids and back

TEXTS = [
    "",
    " ",
    "Hello there",
    "  two  spaces ",
    "a\x00b",
    "line\nline\r\n\t",
    "naïve 😀 \u2028 \ufffd",
    "12345",
    "日本語",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_ids_that_sentencepiece_gives_and_comes_back_unchanged(text, tokenizer, model):
    assert tokenizer.encode(text, bos=False, eos=False) == model.encode(text)
    assert tokenizer.encode(text, bos=True, eos=True) == [1, *model.encode(text), 2]
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text == model.decode(model.encode(text))


@pytest.mark.parametrize("text", ["<s></s><unk>", "<s>", "a </s>", "<unk>", "<0x41><0x00>", "<pad>", "▁<s>"])
def test_typed_control_symbols_stay_text(text, tokenizer):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(TokenizerError, match=r"lone surrogate '\\ud800' at character 2"):
        tokenizer.encode("ab\ud800", bos=True, eos=False)


def test_a_text_that_is_no_string_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="must be a string, not list"):
        tokenizer.encode(["a", "b"], bos=False, eos=False)


def test_the_bytes_of_a_token_are_what_it_adds_to_the_text(tokenizer, model):
    assert [tokenizer.token_bytes(id) for id in (0, 1, 2)] == [" \u2047 ".encode(), b"", b""]
    assert [tokenizer.token_bytes(BYTE_0 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(model.piece_to_id("▁the")) == b" the"
    assert tokenizer.token_bytes(model.piece_to_id("aïve")) == "aïve".encode()


@pytest.mark.parametrize("id", [-1, 420, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_with_the_range(id, tokenizer):
    assert tokenizer.vocab_size == 420
    for use in (
        tokenizer.token_bytes,
        lambda id: tokenizer.decode([5, id]),
    ):
        with pytest.raises(TokenizerError, match=f"{id} is outside.*0 to 419"):
            use(id)


def test_decoding_takes_away_only_the_space_that_encoding_added(tmp_path, tokenizer, model):
    assert tokenizer.decode([model.piece_to_id("▁the"), model.piece_to_id("▁the")]) == "the the"
    bare = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=False))
    assert bare.decode(bare.encode(" the", bos=True, eos=False)) == " the"


# --- dialogs


@pytest.mark.parametrize(
    "dialog", [chat("a"), chat("a", system="b"), chat("a", "b", ""), chat("a", "b", "c", system="")]
)
def test_a_well_formed_dialog_passes(dialog):
    check_dialog(dialog)


USER, ANSWER, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
BAD_DIALOGS = [
    ("hello", "list of messages, not str"),
    (None, "not NoneType"),
    ([], "empty.*'user'"),
    (["hello"], r"dialog\[0\].*object with 'role' and 'content', not str"),
    ([USER, {"role": "tool", "content": "x"}], r"dialog\[1\]: role 'tool' is unknown.*system, user, assistant"),
    ([{"content": "x"}], r"dialog\[0\]: role None is unknown"),
    ([{"role": ["user"], "content": "x"}], r"dialog\[0\]: role \['user'\] is unknown"),
    ([USER, ANSWER, {"role": "user"}], r"dialog\[2\]: 'content' must be a string, not NoneType"),
    ([{"role": "user", "content": [{"text": "x"}]}], r"dialog\[0\]: 'content' must be a string, not list"),
    ([{"role": "user", "content": "x\udfff"}], r"dialog\[0\]: 'content' has the lone surrogate '\\udfff'"),
    ([USER, ANSWER, SYSTEM, USER], r"dialog\[2\]: role 'system' is allowed only for the first"),
    ([SYSTEM, SYSTEM, USER], r"dialog\[1\]: role 'system' is allowed only for the first"),
    ([ANSWER, USER], r"dialog\[0\]: role 'assistant' where 'user' is due"),
    ([SYSTEM, ANSWER, USER], r"dialog\[1\]: role 'assistant' where 'user' is due"),
    ([USER, USER], r"dialog\[1\]: role 'user' where 'assistant' is due"),
    ([USER, ANSWER], r"dialog\[1\]: the last message is from 'assistant'"),
    ([SYSTEM], r"dialog\[0\]: the last message is from 'system'"),
]


@pytest.mark.parametrize(("dialog", "problem"), BAD_DIALOGS)
def test_a_malformed_dialog_is_refused_with_the_place_and_the_problem(dialog, problem, tokenizer):
    with pytest.raises(DialogError, match=problem):
        check_dialog(dialog)
    with pytest.raises(DialogError, match=problem):
        tokenizer.encode_dialog(dialog)


def test_a_huge_role_is_not_echoed_whole():
    with pytest.raises(DialogError) as caught:
        check_dialog([{"role": "x" * 100_000, "content": ""}])
    assert len(str(caught.value)) < 200


BENIGN_DIALOGS = [
    chat("Hello there"),
    chat("  \nwhat is it? \n"),
    chat("what is it?", "the end", "stop"),
    chat("a", " b ", "c", "d\n", "e"),
    chat("Hello", system="You are a helpful assistant."),
    chat(" Hello ", " fine ", "naïve 😀", system="\n be helpful \n"),
    chat(" \n", system="x"),
    chat("", "", ""),
    chat("a [ INST ] b [inst] < <SYS>> SYS", "</s> <s>", "INST ] >> <<"),
    chat("a▁b ▁", "▁", "▁c", system="▁é"),
]


@pytest.mark.parametrize("dialog", BENIGN_DIALOGS)
def test_a_dialog_without_tags_has_the_ids_of_metas_rendering(dialog, tokenizer, model):
    assert tokenizer.encode_dialog(dialog) == meta_ids(model, dialog)


def test_the_chat_format_is_metas_to_the_letter(tokenizer, model):
    dialog = chat(" hi ", " yo ", "ok", system="be")
    first = "[INST] <<SYS>>\nbe\n<</SYS>>\n\n hi [/INST] yo "  # only the ends of the whole prompt are stripped
    assert tokenizer.encode_dialog(dialog) == [1, *model.encode(first), 2, 1, *model.encode("[INST] ok [/INST]")]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("x [INST] y", "▁x ▁ [ I N S T ] ▁y"),
        ("x[/INST]y", "▁x [ / I N S T ] y"),
        ("stop<<SYS>>stop", "▁stop < < S Y S > > st op"),
        ("the <</SYS>> the", "▁the ▁ < < / S Y S > > ▁the"),
        ("[[INST]]", "▁ [ [ I N S T ] ]"),
        ("<<<SYS>>>", "▁ < < < S Y S > > >"),
        ("[INST][/INST]", "▁ [ I N S T ] [ / I N S T ]"),
    ],
)
def test_a_typed_tag_is_spelled_out_and_nothing_else_changes(text, written, tokenizer, model):
    ids = tokenizer.encode_dialog(chat(text))
    assert pieces(model, ids) == ["<s>", "▁[", "INST", "]", *written.split(), "▁[/", "INST", "]"]
    assert tokenizer.decode(ids) == f"[INST] {text} [/INST]"


FRAGMENTS = [*TAGS, "[", "]", "<", ">", "<<", ">>", "/", "INST", "SYS", "IN", "ST]", "[IN", "<</", "S>>", " ", "\n"]
FRAGMENTS += ["▁", "é", "😀", "\x00", "<s>", "</s>", "x", "the", "［INST］", "\u200b", "\n\n", "[INST] <<SYS>>\n"]


def test_no_client_text_can_forge_a_tag_or_a_control_token(tokenizer, model):
    generator = random.Random(0)
    template_forms = {tuple(model.encode(tag)) for tag in TAGS} | {tuple(model.encode("x" + tag)[1:]) for tag in TAGS}
    harmless = str.maketrans("[]<>", "xxxx")
    for _ in range(400):
        contents = ["".join(generator.choices(FRAGMENTS, k=generator.randrange(8))) for _ in range(6)]
        system = contents.pop() if generator.random() < 0.6 else None
        dialog = chat(*contents[: generator.choice([1, 3, 5])], system=system)
        benign = [{**message, "content": message["content"].translate(harmless)} for message in dialog]
        ids = tokenizer.encode_dialog(dialog)
        turns = split_turns(ids)
        assert len(turns) == len(rendered(dialog))
        for turn, text, benign_text in zip(turns, rendered(dialog), rendered(benign), strict=True):
            text, benign_text = text.replace("▁", " "), benign_text.replace("▁", " ")
            assert tokenizer.decode(turn) == text
            meta, ours = places(tokenizer, model.encode(text)), places(tokenizer, turn)
            template = tag_bytes(benign_text)
            typed = tag_bytes(text) - template
            for span, id in meta.items():
                if not typed & set(range(*span)):
                    assert ours[span] == id
            for span, id in ours.items():
                if typed & set(range(*span)):
                    assert len(model.id_to_piece(id)) == 1
            assert count_runs(turn, template_forms) == sum(benign_text.count(tag) for tag in TAGS)


def split_turns(ids: list[int]) -> list[list[int]]:
    """The turns of a prompt, which must be BOS turn EOS BOS turn ... EOS BOS turn."""
    assert ids[0] == 1
    turns = [list(map(int, turn.split())) for turn in " ".join(map(str, ids[1:])).split(" 2 1 ")]
    assert not any({0, 1, 2} & set(turn) for turn in turns)
    return turns


def places(tokenizer: Tokenizer, ids: list[int]) -> dict[tuple[int, int], int]:
    """Each id by the bytes of the rendered text that it covers."""
    found, position = {}, -1  # the model puts one space before the text
    for id in ids:
        end = position + len(tokenizer.token_bytes(id))
        found[position, end] = id
        position = end
    return found


def tag_bytes(text: str) -> set[int]:
    """The offsets of all bytes of all tags in a text."""
    data, found = text.encode(), set()
    for tag in TAGS:
        start = data.find(tag.encode())
        while start >= 0:
            found |= set(range(start, start + len(tag)))
            start = data.find(tag.encode(), start + 1)
    return found


def count_runs(ids: list[int], runs: set[tuple[int, ...]]) -> int:
    return sum(tuple(ids[i : i + len(run)]) == run for run in runs for i in range(len(ids)))


def test_a_vocabulary_that_merges_nothing_has_typed_tags_in_bytes(tmp_path):
    characters = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", model_type="char"))
    ids = characters.encode_dialog(chat("é[INST]é"))
    as_bytes = [BYTE_0 + byte for byte in b"[INST]"]
    assert count_runs(ids, {tuple(as_bytes)}) == 1
    assert count_runs(ids, {tuple(characters.encode("[INST]", bos=False, eos=False))}) == 1
    assert characters.decode(ids) == "[INST] é[INST]é [/INST]"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"corpus": ["xyz"]}, "[INST]"),  # the template's tags are bytes already
        ({"model_type": "char", "byte_fallback": False}, "[INST]"),
        ({"normalization_rule_name": "nmt_nfkc"}, "［INST］"),
    ],
)
def test_a_tag_that_the_vocabulary_cannot_tell_from_the_templates_is_refused(options, text, tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.model", **options)
    other = Tokenizer(path)
    with pytest.raises(TokenizerError, match=r"own tags \(\[INST\].*remove it") as caught:
        other.encode_dialog(chat(text))
    assert str(path) not in str(caught.value)  # a client reads this
    benign = chat("x y", "x", "y", system="x\n")
    assert other.encode_dialog(benign) == meta_ids(SentencePieceProcessor(model_file=str(path)), benign)


# --- streams


def stream(tokenizer: Tokenizer, ids: list[int], *stop: str, strip: bool = False) -> list[str]:
    """What each push and then finish() returned."""
    decoder = StreamDecoder(tokenizer, stop, strip_leading_space=strip)
    return [*map(decoder.push, ids), decoder.finish()]


def byte_ids(data: bytes) -> list[int]:
    return [BYTE_0 + byte for byte in data]


def test_text_comes_token_by_token_and_control_tokens_have_none(tokenizer, model):
    ids = [model.piece_to_id(piece) for piece in ("<s>", "▁the", "▁f", "</s>", "ox")]
    assert stream(tokenizer, ids) == ["", " the", " f", "", "ox", ""]


def test_only_the_first_space_of_an_answer_is_dropped(tokenizer, model):
    ids = [model.piece_to_id(piece) for piece in ("<s>", "▁the", "▁the", "▁", "▁▁")]
    assert stream(tokenizer, ids[:3], strip=True) == ["", "the", " the", ""]
    assert stream(tokenizer, ids[:3], strip=False) == ["", " the", " the", ""]
    assert stream(tokenizer, [ids[3], ids[1]], strip=True) == ["", " the", ""]
    assert stream(tokenizer, [ids[4], ids[1]], strip=True) == [" ", " the", ""]
    assert stream(tokenizer, byte_ids(b"a b"), strip=True) == ["a", " ", "b", ""]


def test_a_character_over_several_tokens_comes_whole_or_as_a_replacement(tokenizer):
    assert stream(tokenizer, byte_ids("😀é".encode())) == ["", "", "", "😀", "", "é", ""]
    assert stream(tokenizer, byte_ids("😀".encode()[:3])) == ["", "", "", "\ufffd"]
    assert stream(tokenizer, byte_ids(b"\xe2\x82A\xff")) == ["", "", "\ufffdA", "\ufffd", ""]


def test_text_is_cut_before_a_stop_string_and_nothing_follows(tokenizer):
    decoder = StreamDecoder(tokenizer, ["stop"], strip_leading_space=False)
    assert [decoder.push(id) for id in byte_ids(b"a sto")] == ["a", " ", "", "", ""]
    assert not decoder.stopped
    assert [decoder.push(id) for id in byte_ids(b"p b")] == ["", "", ""]
    assert decoder.stopped
    assert decoder.finish() == ""


def test_what_only_began_like_a_stop_string_is_released(tokenizer):
    assert stream(tokenizer, byte_ids(b"ststart"), "stop") == ["", "", "st", "", "sta", "r", "t", ""]
    assert stream(tokenizer, byte_ids(b"a sto"), "stop", "a b") == ["", "", "a ", "", "", "sto"]


@pytest.mark.parametrize("stop", [["ing", "ping"], ["p", "ping", "pin"], ["g", "in", "pi"]])
def test_of_stop_strings_that_one_token_completes_the_earliest_wins(stop, tokenizer, model):
    ids = [model.piece_to_id(piece) for piece in ("▁st", "o", "ping")]
    decoder = StreamDecoder(tokenizer, stop, strip_leading_space=True)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == "sto"
    assert decoder.stopped


def test_a_stop_string_can_be_completed_by_the_end_of_the_stream(tokenizer):
    decoder = StreamDecoder(tokenizer, ["a\ufffd"], strip_leading_space=False)
    assert [decoder.push(id) for id in byte_ids(b"xa\xe2")] == ["x", "", ""]
    assert (decoder.finish(), decoder.stopped) == ("", True)


@pytest.mark.parametrize("stop", ["stop", [""], ["a", ""], ["a", 1]])
def test_stop_must_be_a_list_of_strings_that_are_not_empty(stop, tokenizer):
    with pytest.raises(TokenizerError, match="stop must be a list"):
        StreamDecoder(tokenizer, stop, strip_leading_space=False)


def longest_held(text: str, stop: list[str]) -> int:
    """How many characters at the end of a text could begin one of the stop strings, by trying all."""
    return max((size for s in stop for size in range(len(s)) if text.endswith(s[:size])), default=0)


def test_a_stream_is_the_decoded_text_as_early_as_it_can_be(tokenizer):
    generator = random.Random(0)
    stopped = 0
    for _ in range(1500):
        ids = random_ids(generator, tokenizer)
        strip = generator.random() < 0.5
        whole = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
        stop = random_stops(generator, whole)
        decoder = StreamDecoder(tokenizer, stop, strip_leading_space=strip)
        out, data = "", b""
        for id in [*ids, None]:
            out += decoder.finish() if id is None else decoder.push(id)
            data += b"" if id is None else tokenizer.token_bytes(id)
            text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=id is None)
            text = text.removeprefix(" ") if strip else text
            starts = [text.find(s) for s in stop if s in text]
            if starts:
                assert (out, decoder.stopped) == (text[: min(starts)], True)
                break
            held = 0 if id is None else longest_held(text, stop)
            assert (out, decoder.stopped) == (text[: len(text) - held], False)
        else:
            assert out == (tokenizer.decode(ids) if strip else whole)
        stopped += decoder.stopped
    assert 300 < stopped < 1200  # both endings were tried


def random_ids(generator: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Ids of all kinds: ordinary tokens, whole characters in bytes, and bytes that make none."""
    ids: list[int] = []
    while len(ids) < 25:
        kind = generator.randrange(4)
        if kind == 0:
            ids += byte_ids(generator.choice(["😀", "é", "日"]).encode()[: generator.choice([1, 2, 3, 4])])
        elif kind == 1:
            ids.append(BYTE_0 + generator.randrange(256))
        elif kind == 2:
            ids += tokenizer.encode(generator.choice(["aaba", "stop", " the end"]), bos=False, eos=False)
        else:
            ids.append(generator.randrange(tokenizer.vocab_size))
    return ids


def random_stops(generator: random.Random, text: str) -> list[str]:
    """Up to three strings that occur in the text, nearly occur, or repeat themselves."""
    stops = []
    for _ in range(generator.randrange(4)):
        start = generator.randrange(len(text))
        piece = text[start : start + generator.choice([1, 2, 3, 6])]
        stops.append(generator.choice([piece, piece + "!", "aab", "aa" + piece]))
    return stops


def test_a_decoder_keeps_no_more_after_many_tokens_than_after_few(tokenizer):
    decoder = StreamDecoder(tokenizer, ["stop it", "stopping!"], strip_leading_space=False)
    ids = tokenizer.encode("stop stopping the sto 😀 ", bos=False, eos=False)
    after_few, after_many = [], []
    for turn in range(2000):
        for id in ids:
            decoder.push(id)
            if turn in (1, 1999):
                size = sum(map(sys.getsizeof, vars(decoder).values()))
                (after_few if turn == 1 else after_many).append(size)
    assert after_few == after_many


def test_tokens_of_a_padded_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer, strip_leading_space=False)
    assert decoder.push(tokenizer.vocab_size) == "" and decoder.push(tokenizer.vocab_size + 99) == ""
    word = tokenizer.encode("word", bos=False, eos=False)
    assert "".join(map(decoder.push, word)) + decoder.finish() == " word"
