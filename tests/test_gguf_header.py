"""GGUF headers that lie: each is refused with the reason, in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from checkpoints import random_tensors
from gguf import GGMLQuantizationType
from gguf_files import field, header, llama_cpp_tensors, refusal, tensor, text, write_gguf

from formats.gguf import GGUFSource
from formats.gguf_header import header_bytes, read_header
from formats.source import FormatError
from llama2 import ModelArgs

Q8_0 = GGMLQuantizationType.Q8_0

HUGE = struct.pack("<Q", 1 << 62)
COUNT = struct.pack("<Q", 1)
NAME, ALIGNMENT = text("a"), "general.alignment"
DATA = bytes(4096)


def ending_with(*shapes_and_offsets: tuple[tuple[int, ...], int, int], data: bytes = DATA) -> bytes:
    """A file of tensors a, b, ... of a shape, kind and offset each."""
    infos = [tensor("ab"[number], shape, kind, at) for number, (shape, kind, at) in enumerate(shapes_and_offsets)]
    start = header(*infos, tensors=len(infos))
    return start.ljust(-(-len(start) // 32) * 32, b"\0") + data


LIES = {
    "nothing": (b"", "is no GGUF file"),
    "three bytes": (b"GGU", "is no GGUF file"),
    "another format": (header(magic=b"ggjt"), "is no GGUF file: it does not begin with 'GGUF'"),
    "a pickle": (b"\x80\x02}q\x00.", "is no GGUF file"),
    "version 1": (header(version=1), "is GGUF version 1; versions 2 and 3 are read"),
    "version 4": (header(version=4), "is GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "no counts": (header()[:20], "ends within its header: the number of fields needs 8 bytes, 4 are left"),
    "no architecture": (header(), "general.architecture is None"),
    "endless tensors": (header(tensors=1 << 63), "the number of tensors is 9223372036854775808; at most 65536"),
    "endless fields": (header(fields=1 << 63), "the number of fields is 9223372036854775808; at most 4096"),
    "fields that are not there": (header(fields=4000), "ends within its header: the length of the key of field 0"),
    "tensors that are not there": (header(tensors=60000), "ends within its header: the length of the name of tensor 0"),
    "an endless key": (
        header(HUGE, fields=1),
        "the length of the key of field 0 is 4611686018427387904; at most 255 are allowed",
    ),
    "an endless string": (header(field("k", 8, HUGE), fields=1), "'k' needs 4611686018427387904 bytes"),
    "an endless array": (header(field("k", 9, struct.pack("<I", 4) + HUGE), fields=1), "the length of 'k' is 46116860"),
    "an array that is not there": (
        header(field("k", 9, struct.pack("<IQ", 10, 1 << 20)), fields=1),
        "'k' needs 8388608 bytes, 0 are left",
    ),
    "arrays that are too many": (
        header(*(field(f"k{n}", 9, struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20)) for n in range(3)), fields=3),
        "the length of 'k2' is 1048576; at most 0 are allowed",
    ),
    "an array of arrays": (header(field("k", 9, struct.pack("<I", 9)), fields=1), "'k' is an array of arrays"),
    "an unknown type": (header(field("k", 13, b""), fields=1), "'k' is of type 13, which GGUF does not have"),
    "an unknown type of elements": (header(field("k", 9, struct.pack("<I", 99)), fields=1), "'k' is of type 99"),
    "a bool that is two": (header(field("k", 7, b"\2"), fields=1), "'k' is neither true nor false"),
    "a key twice": (header(*[field("k", 7, b"\1")] * 2, fields=2), "field 'k' is there twice"),
    "a key that is no text": (header(text(b"\xff"), fields=1), "the key of field 0 is no UTF-8"),
    "a value that is no text": (header(field("k", 8, text(b"a\xff")), fields=1), "'k' is no UTF-8"),
    "an alignment of zero": (header(field(ALIGNMENT, 4, bytes(4)), fields=1), f"{ALIGNMENT} is 0; a power of two"),
    "an alignment of 24": (header(field(ALIGNMENT, 4, b"\x18\0\0\0"), fields=1), f"{ALIGNMENT} is 24; a power of two"),
    "an endless alignment": (header(field(ALIGNMENT, 10, HUGE), fields=1), f"{ALIGNMENT} is 4611686018427387904"),
    "an alignment that is text": (header(field(ALIGNMENT, 8, text("32")), fields=1), f"{ALIGNMENT} is '32'"),
    "a tensor twice": (header(tensor("a"), tensor("a", offset=128), tensors=2), "tensor 'a' is there twice"),
    "no dimension": (header(tensor("a", ()), tensors=1), "tensor 'a' has 0 dimensions; 1 to 4 are allowed"),
    "endless dimensions": (header(NAME + b"\xff\xff\xff\xff", tensors=1), "'a' has 4294967295 dimensions"),
    "no numbers": (header(tensor("a", (0, 8)), tensors=1), "tensor 'a' is empty (8x0)"),
    "an unknown kind": (header(tensor("a", kind=31), tensors=1), "tensor 'a' is of type 31, which is not known"),
    "half a block": (
        header(tensor("a", (48, 2), kind=8), tensors=1),
        "'a' is Q8_0, whose blocks have 32 numbers, but a row has 48",
    ),
    "a crooked offset": (header(tensor("a", offset=33), tensors=1), "offset 33, which is no multiple of 32"),
    "an offset beyond the end": (ending_with(((32,), 0, 4096)), "'a' (32, F32) ends at byte 4288, but the file has 41"),
    "an endless offset": (ending_with(((32,), 0, (1 << 64) - 32)), "'a' (32, F32) ends at byte 1844674407370955"),
    "an endless tensor": (ending_with(((1 << 63, 1 << 63), 0, 0)), "ends at byte 340282366920938463463"),
    "a tensor cut short": (ending_with(((1024,), 0, 0), data=DATA[:-1]), "ends at byte 4160, but the file has 4159"),
    "tensors that overlap": (ending_with(((64,), 0, 0), ((32,), 0, 224)), "tensors 'a' and 'b' overlap"),
    "tensors in one place": (ending_with(((32,), 0, 32), ((32,), 0, 32)), "tensors 'a' and 'b' overlap"),
    "a tensor inside another": (ending_with(((512,), 0, 0), ((32,), 0, 64)), "tensors 'a' and 'b' overlap"),
}


@pytest.mark.parametrize(("content", "expected"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_with_the_reason_and_without_much_memory(tmp_path, content, expected):
    (tmp_path / "a.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        assert expected in refusal(tmp_path / "a.gguf")
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_header_larger_than_any_models_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.gguf", "wb") as file:
        file.write(header(field("k", 8, struct.pack("<Q", 1 << 40)), fields=1))
        file.truncate(1 << 41)
    assert "'k' makes a header of more than 67108864 bytes" in refusal(tmp_path / "a.gguf")


def test_what_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").mkdir()
    assert "a.gguf: is no regular file" in refusal(tmp_path)


def test_neighbours_that_touch_and_gaps_between_tensors_are_no_overlap(tmp_path):
    (tmp_path / "a.gguf").write_bytes(ending_with(((32,), 0, 0), ((32,), 0, 128)))
    assert [each.offset for each in read_header(tmp_path / "a.gguf").tensors.values()] == [96, 224]
    (tmp_path / "a.gguf").write_bytes(ending_with(((32,), 0, 1024), ((32,), 0, 0)))
    assert [each.offset for each in read_header(tmp_path / "a.gguf").tensors.values()] == [1120, 96]


def test_400_headers_with_random_damage_are_read_or_refused_but_nothing_else(tmp_path):
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=8, ffn_hidden_dim=32)
    write_gguf(tmp_path / "a.gguf", llama_cpp_tensors(random_tensors(args), args), args, Q8_0)
    data, rng, refused = (tmp_path / "a.gguf").read_bytes(), random.Random(0), 0
    end = data.index(text("output.weight")) + 60
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(end)] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del damaged[rng.randrange(end) :]
        (tmp_path / "b.gguf").write_bytes(damaged)
        try:
            GGUFSource(tmp_path / "b.gguf").close()
        except FormatError as error:
            assert "b.gguf" in str(error)
            refused += 1
    assert 200 < refused < 400


def test_a_header_of_arrays_and_scalars_is_read_as_it_was_written(tmp_path):
    fields = {"a": True, "b": 7, "c": 0.5, "d": "é▁", "e": ["x", ""], "f": [1, -2], "g": [0.25], "h": "", "i": []}
    (tmp_path / "a.gguf").write_bytes(header_bytes(fields, {"t": (Q8_0, (2, 64))}) + bytes(136))
    found = read_header(tmp_path / "a.gguf")
    assert found.fields == {key: value for key, value in fields.items() if key != "i"}
    assert (found.tensors["t"].shape, found.tensors["t"].size) == ((2, 64), 136)
