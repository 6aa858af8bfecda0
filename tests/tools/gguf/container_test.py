"""What is read of a GGUF file's header, and what is refused: in one line, before anything is allocated for it."""

import struct

import gguf_files
import numpy as np
import pytest
from gguf_files import Tensor, f32, gguf_bytes, text

from dcjax.tools.gguf import container
from dcjax.tools.gguf.container import open_container

gguf = pytest.importorskip("gguf")


@pytest.fixture
def opened(tmp_path):
    """The container of a file with these bytes."""

    def open_bytes(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return open_container(path)

    return open_bytes


@pytest.fixture
def refusal(opened, tmp_path):
    """The line by which a file is refused, behind its path."""

    def refuse(content):
        with pytest.raises(ValueError) as caught:
            opened(content)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 500, message
        assert message.startswith(str(tmp_path / "model.gguf"))
        return message.removeprefix(str(tmp_path / "model.gguf"))

    return refuse


def one_value(value, key="key"):
    return gguf_bytes([(key, value)], [])


def test_it_reads_what_the_formats_own_package_writes(tmp_path):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("true", True)
    writer.add_bool("false", False)
    writer.add_string("text", "中文\n\0 é")
    writer.add_array("texts", ["a", "", "Ġb"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    rng = np.random.default_rng(0)
    arrays = {
        "vector": rng.normal(size=7).astype(np.float32),
        "matrix": rng.normal(size=(3, 5)).astype(np.float16),
        "cube": rng.normal(size=(2, 3, 4)).astype(np.float32),
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    packed = gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = open_container(path)
    told = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in read.metadata.items()}
    assert told == {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 1e-5,
        "f64": 0.1,
        "true": True,
        "false": False,
        "text": "中文\n\0 é",
        "texts": ["a", "", "Ġb"],
        "numbers": [1, -2, 3],
        "floats": [0.5, -1.5],
    }
    assert {type(read.metadata[key]) for key in ("true", "false")} == {bool}
    for name, array in arrays.items():
        assert read.tensors[name].shape == array.shape
        assert read.tensors[name].data.tobytes() == array.tobytes()
    assert (read.tensors["packed"].shape, read.tensors["packed"].kind.name) == ((3, 64), "Q8_0")
    np.testing.assert_array_equal(read.tensors["packed"].data, packed)


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_tensors_lie_at_multiples_of_the_alignment(opened, alignment):
    arrays = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 3), ("b", 11), ("c", 1))}
    content = gguf_bytes(
        {"general.alignment": alignment}, {name: f32(array) for name, array in arrays.items()}, alignment=alignment
    )
    for name, array in arrays.items():
        assert opened(content).tensors[name].data.tobytes() == array.tobytes()


def test_version_2_is_read_and_others_are_refused(opened, refusal):
    content = gguf_bytes({"a": 1}, {})
    for version, said in ((1, "version 1"), (4, "version 4"), (0, "version 0"), (2**32 - 1, "version 4294967295")):
        assert said in refusal(content[:4] + struct.pack("<I", version) + content[8:])
    assert opened(content[:4] + struct.pack("<I", 2) + content[8:]).metadata == {"a": 1}
    assert "big-endian" in refusal(content[:4] + struct.pack(">I", 3) + content[8:])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"G",
        b"GGU",
        b"ggml" * 9,
        b"GGJT" + b"\0" * 99,
        b"PK\3\4",
        struct.pack("<Q", 99) + b'{"a":',
        b"FUGG\3\0\0\0",
    ],
)
def test_what_is_no_gguf_file_is_refused_by_what_it_begins_with(refusal, content):
    assert refusal(content).startswith(" is no GGUF file: it begins with b'")


@pytest.mark.parametrize("count", [2**20, 2**31, 2**60, 2**64 - 1])
def test_counts_without_room_are_refused(refusal, count):
    content = gguf_bytes({"key": "value", "list": ["a"], "ints": [1, 2]}, {"t": f32(np.ones(3))})
    told = struct.pack("<Q", count)
    assert f"announces {count} tensors" in refusal(content[:8] + told + content[16:])
    assert f"announces {count} values" in refusal(content[:16] + told + content[24:])
    for key, number in (("key", 8), ("list", 9), ("ints", 9)):
        head = text(key) + struct.pack("<I", number)
        at = content.index(head) + len(head) + (4 if number == 9 else 0)
        said = refusal(content[:at] + told + content[at + 8 :])
        assert f"announces {count}" in said or f"list has {count} strings" in said
    name = content.index(text("t"))
    assert f"announces {count} bytes of a string" in refusal(content[:name] + told + content[name + 8 :])


def test_every_truncation_is_refused(refusal):
    content = gguf_bytes(
        {"key": "value", "list": ["a", "bc"], "ints": [1, 2], "flag": True, "float": 0.5},
        {"t": f32(np.ones((2, 3))), "u": f32(np.ones(8))},
    )
    for length in range(len(content)):
        said = refusal(content[:length])
        assert "truncated" in said or "no GGUF file" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (struct.pack("<II", 13, 0), "type 13"),
        (struct.pack("<II", 2**32 - 1, 0), "type 4294967295"),
        (struct.pack("<IB", 7, 2), "a boolean is 2"),
        (struct.pack("<I", 8) + text(b"caf\xe9"), "not UTF-8 (b'caf\\xe9'"),
        (struct.pack("<I", 8) + text(b"\xed\xa0\x80"), "not UTF-8"),
        (struct.pack("<IIQ", 9, 8, 1) + text(b"\xff"), "not UTF-8"),
        # a list of lists, and one of itself, as deep as one likes
        (struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 1) + b"\0" * 4, "list is of type 9"),
        (struct.pack("<IIQ", 9, 9, 1) * 9999, "list is of type 9"),
        (struct.pack("<IIQ", 9, 13, 1), "list is of type 13"),
    ],
)
def test_values_that_are_not_what_they_say_are_refused(refusal, value, said):
    assert said in refusal(one_value(value) + b"\0" * 64)


def test_names_must_be_different_and_utf_8(refusal):
    assert "names 'a' twice" in refusal(gguf_bytes([("a", 1), ("b", 2), ("a", 3)], []))
    pair = [("t", f32(np.ones(3))), ("u", f32(np.ones(3))), ("t", f32(np.ones(3)))]
    assert "the tensor 't' twice" in refusal(gguf_bytes([], pair))
    assert "not UTF-8" in refusal(gguf_bytes([(b"\xff", 1)], []))
    assert "not UTF-8" in refusal(gguf_bytes([], [(b"\xff", f32(np.ones(3)))]))
    said = refusal(gguf_bytes([], [("long\n" * 999, Tensor(99, (3,), b""))]))
    assert "is of type 99" in said


@pytest.mark.parametrize("alignment", [0, 3, 31, True, "32", 2**31 + 1, -32, [32]])
def test_alignments_that_are_no_powers_of_2_are_refused(refusal, alignment):
    value = ("i32", -32) if alignment == -32 else alignment
    assert "general.alignment is" in refusal(gguf_bytes({"general.alignment": value}, {"t": f32(np.ones(3))}))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1, 1, 1), (2**63, 2**63), (2**64 - 1,), (31,), (2, 33)])
@pytest.mark.parametrize("kind", [gguf_files.F32, 8])
def test_shapes_that_do_not_fit_are_refused(refusal, shape, kind):
    if kind == gguf_files.F32 and shape in ((31,), (2, 33)):
        shape = (*shape, 2**40)
    said = refusal(gguf_bytes({}, {"t": Tensor(kind, shape, b"\0" * 64)}))
    assert any(part in said for part in ("dimensions; it must have 1 to 4", "must have positive sizes", "not within"))


@pytest.mark.parametrize("kind", [4, 5, 31, 33, 36, 99, 2**32 - 1])
def test_unknown_types_of_tensors_are_refused(refusal, kind):
    assert f"'t' is of type {kind}, which is not known" in refusal(gguf_bytes({}, {"t": Tensor(kind, (32,), b"")}))


@pytest.mark.parametrize("shape", [(9,), (2**20,), (2**60,), (2**63,)])
def test_tensors_beyond_the_file_are_refused(refusal, shape):
    assert "is not within the file" in refusal(gguf_bytes({}, {"t": Tensor(gguf_files.F32, shape, b"\0" * 32)}))


def test_tensors_lie_one_behind_another(refusal, opened):
    three = {name: f32(np.full(16, number)) for number, name in enumerate("abc")}
    wrong = ({"b": 63}, {"b": 0}, {"b": 32}, {"c": 96}, {"c": 160}, {"a": 32}, {"c": 2**63}, {"c": 2**64 - 32})
    for offsets in wrong:
        said = refusal(gguf_bytes({}, three, offsets=offsets))
        assert "at a multiple of the alignment 32, it must be at" in said
    assert "1 bytes lie behind its last tensor" in refusal(gguf_bytes({}, three) + b"\0")
    swapped = opened(gguf_bytes({}, three, offsets={"a": 64, "b": 0}))
    assert swapped.tensors["a"].data.view("<f4")[0] == 1 and swapped.tensors["b"].data.view("<f4")[0] == 0


def test_headers_and_lists_have_a_largest_size(refusal, opened, monkeypatch):
    content = gguf_bytes({"texts": ["a"] * 9, "more": "b" * 200}, {"t": f32(np.ones(99))})
    assert len(opened(content).metadata["texts"]) == 9
    monkeypatch.setattr(container, "MAX_TEXTS", 8)
    assert "a list has 9 strings; at most 8 are read" in refusal(content)
    monkeypatch.undo()
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 152)
    assert "longer than 152 bytes" in refusal(content)
    monkeypatch.undo()
    monkeypatch.setattr(container, "MAX_ENTRIES", 1)
    assert "has 2 values; at most 1 are read" in refusal(content)


def test_a_file_must_be_there(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FileNotFoundError, match="give a GGUF file"):
            open_container(path)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'dcjax\[gguf\]'"):
        open_container(tmp_path / "model.gguf")
