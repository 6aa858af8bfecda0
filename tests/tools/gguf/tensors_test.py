"""Dequantised weights, against loops written from the definition of each type of block, and their names and order."""

import gguf_files
import numpy as np
import pytest
from gguf_files import Sizes, Tensor, gguf_bytes, metadata, tensors

from dcjax.tools.gguf import tensors as module
from dcjax.tools.gguf.config import read_config
from dcjax.tools.gguf.container import open_container
from dcjax.tools.gguf.tensors import READ, pending_tensors

gguf = pytest.importorskip("gguf")

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def half(blocks, at):
    """The float16 of each block at a byte."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float64)


def nibble(byte, high):
    return (byte.astype(int) >> 4) if high else (byte.astype(int) & 15)


def signed(byte):
    return byte.astype(np.int8).astype(int)


def halves_of_32(blocks, at, value):
    """Blocks of 32, whose 16 bytes hold the first half in their low nibbles and the second in their high ones."""
    return np.stack([value(nibble(blocks[:, at + place % 16], place >= 16), place) for place in range(32)], 1)


def q4_0(b):
    return halves_of_32(b, 2, lambda q, place: half(b, 0) * (q - 8))


def q4_1(b):
    return halves_of_32(b, 4, lambda q, place: half(b, 0) * q + half(b, 2))


def fifth_bit(b, at, place):
    """Bit `place` of 32 that begin at a byte, as 16 or 0."""
    return 16 * (b[:, at + place // 8].astype(int) >> place % 8 & 1)


def q5_0(b):
    return halves_of_32(b, 6, lambda q, place: half(b, 0) * (q + fifth_bit(b, 2, place) - 16))


def q5_1(b):
    return halves_of_32(b, 8, lambda q, place: half(b, 0) * (q + fifth_bit(b, 4, place)) + half(b, 2))


def q8_0(b):
    return np.stack([half(b, 0) * signed(b[:, 2 + place]) for place in range(32)], 1)


def iq4_nl(b):
    return halves_of_32(b, 2, lambda q, place: half(b, 0) * np.array(IQ4)[q])


def mxfp4(b):
    scale = 2.0 ** (b[:, 0].astype(np.float64) - 127)
    return halves_of_32(b, 1, lambda q, place: scale * np.array([*FP4, *(-value for value in FP4)])[q])


def two_bits(b, at, place):
    """Of 64 bytes for 256: each half has 32 bytes, whose four pairs of bits are 32 values each."""
    return b[:, at + place // 128 * 32 + place % 32].astype(int) >> 2 * (place % 128 // 32) & 3


def q2_k(b):
    def value(place):
        both = b[:, place // 16]
        return half(b, 80) * nibble(both, False) * two_bits(b, 16, place) - half(b, 82) * nibble(both, True)

    return np.stack([value(place) for place in range(256)], 1)


def q3_k(b):
    def value(place):
        group = place // 16
        low = nibble(b[:, 96 + group % 8], group >= 8)
        high = b[:, 104 + group % 4].astype(int) >> 2 * (group // 4) & 3
        bit = b[:, place % 32].astype(int) >> place // 32 & 1
        return half(b, 108) * (low + 16 * high - 32) * (two_bits(b, 32, place) + 4 * bit - 4)

    return np.stack([value(place) for place in range(256)], 1)


def scale_and_least(b, group):
    """Six bits each of eight groups of 32: those of the last four are spread over three bytes."""
    first, second = b[:, 4 + group % 4].astype(int), b[:, 8 + group % 4].astype(int)
    if group < 4:
        return first & 63, second & 63
    last = b[:, 12 + group % 4].astype(int)
    return last & 15 | first >> 6 << 4, last >> 4 | second >> 6 << 4


def q4_or_q5_k(b, at, bits):
    def value(place):
        scale, least = scale_and_least(b, place // 32)
        q = nibble(b[:, at + place // 64 * 32 + place % 32], place % 64 >= 32)
        q = q + (16 * (b[:, 16 + place % 32].astype(int) >> place // 32 & 1) if bits == 5 else 0)
        return half(b, 0) * scale * q - half(b, 2) * least

    return np.stack([value(place) for place in range(256)], 1)


def q6_k(b):
    def value(place):
        within = place % 128
        q = nibble(b[:, place // 128 * 64 + within % 64], within >= 64)
        high = b[:, 128 + place // 128 * 32 + within % 32].astype(int) >> 2 * (within // 32) & 3
        return half(b, 208) * signed(b[:, 192 + place // 16]) * (q + 16 * high - 32)

    return np.stack([value(place) for place in range(256)], 1)


def iq4_xs(b):
    def value(place):
        group = place // 32
        high = (b[:, 2].astype(int) | b[:, 3].astype(int) << 8) >> 2 * group & 3
        scale = nibble(b[:, 4 + group // 2], group % 2) + 16 * high - 32
        return half(b, 0) * scale * np.array(IQ4)[nibble(b[:, 8 + 16 * group + place % 16], place % 32 >= 16)]

    return np.stack([value(place) for place in range(256)], 1)


def plain(dtype):
    return lambda b: np.ascontiguousarray(b).view(dtype).astype(np.float64)


def bf16(b):
    bits = b[:, 0].astype(np.uint32) << 16 | b[:, 1].astype(np.uint32) << 24
    return bits.view(np.float32)[:, None].astype(np.float64)


# number in the file, bytes and values of a block, where its float16 scales are, and the values
KINDS = {
    "F32": (0, 4, 1, (), plain("<f4")),
    "F16": (1, 2, 1, (0,), plain("<f2")),
    "BF16": (30, 2, 1, (), bf16),
    "Q4_0": (2, 18, 32, (0,), q4_0),
    "Q4_1": (3, 20, 32, (0, 2), q4_1),
    "Q5_0": (6, 22, 32, (0,), q5_0),
    "Q5_1": (7, 24, 32, (0, 2), q5_1),
    "Q8_0": (8, 34, 32, (0,), q8_0),
    "Q2_K": (10, 84, 256, (80, 82), q2_k),
    "Q3_K": (11, 110, 256, (108,), q3_k),
    "Q4_K": (12, 144, 256, (0, 2), lambda b: q4_or_q5_k(b, 16, 4)),
    "Q5_K": (13, 176, 256, (0, 2), lambda b: q4_or_q5_k(b, 48, 5)),
    "Q6_K": (14, 210, 256, (208,), q6_k),
    "IQ4_NL": (20, 18, 32, (0,), iq4_nl),
    "IQ4_XS": (23, 136, 256, (0,), iq4_xs),
    "MXFP4": (39, 17, 32, (), mxfp4),
}


def random_blocks(name, count, seed=0):
    """Blocks of random bytes, whose scales are finite."""
    _, size, _, scales, _ = KINDS[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)
    for at in scales:
        # the exponent of a float16 is not 31, and that of a bfloat16 and a float32 not 255
        blocks[:, at + 1] &= 0xBF
    if name in ("F32", "BF16"):
        blocks[:, -1] &= 0xBF
    if name == "MXFP4":
        blocks[:, 0] = blocks[:, 0] % 100 + 80
    return blocks


@pytest.fixture
def imported(tmp_path):
    """The tensors that an import of a file would write, by Hugging Face's names."""

    def read(fields, arrays, dtype=None):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(fields, arrays))
        container = open_container(path)
        config = read_config(container)
        return {each.name: each.fetch() for each in pending_tensors(container, config, dtype)}

    return read


def test_all_types_that_are_read_are_tested():
    assert set(READ) == KINDS.keys()


@pytest.mark.parametrize("name", READ)
def test_blocks_hold_what_their_definition_says(imported, name, monkeypatch):
    # several chunks for a tensor
    monkeypatch.setattr(module, "CHUNK", 700)
    number, _, width, _, values = KINDS[name]
    sizes = Sizes(hidden=256)
    shape = (sizes.wide, sizes.hidden)
    blocks = random_blocks(name, sizes.wide * sizes.hidden // width)
    arrays = tensors(sizes=sizes) | {"blk.0.ffn_up.weight": Tensor(number, shape, blocks.tobytes())}
    written = imported(metadata(sizes=sizes), arrays)["model.layers.0.mlp.up_proj.weight"]
    assert written.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(name, "float32")
    # the products are exact in float32, so what is subtracted or added rounds once, as here
    expected = values(blocks).astype(written.dtype).reshape(shape)
    np.testing.assert_array_equal(written, expected)
    assert np.unique(written).size > 200


def test_rows_of_queries_and_keys_are_back_in_the_order_of_halves(imported):
    """Of a llama each row of a head says which pair it is of, and whether it comes first or second."""
    for architecture, q_rows in (
        ("llama", [0, 2, 1, 3, 4, 6, 5, 7]),
        ("qwen2", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("qwen3", [0, 1, 2, 3, 4, 5, 6, 7]),
    ):
        arrays = tensors(architecture)
        numbered = np.repeat(np.arange(8.0)[:, None], 8, 1)
        for key, rows in (("q", 8), ("k", 4), ("v", 4)):
            arrays[f"blk.0.attn_{key}.weight"] = gguf_files.f32(numbered[:rows])
        written = imported(metadata(architecture), arrays)
        attention = "model.layers.0.self_attn"
        assert written[f"{attention}.q_proj.weight"][:, 0].tolist() == q_rows
        assert written[f"{attention}.k_proj.weight"][:, 0].tolist() == q_rows[:4]
        assert written[f"{attention}.v_proj.weight"][:, 0].tolist() == [0, 1, 2, 3]


def as_half(tensor):
    return Tensor(gguf_files.F16, tensor.shape, np.frombuffer(tensor.data, "<f4").astype("<f2").tobytes())


def test_float16_is_kept_where_all_layers_have_it(imported):
    fields = metadata(qwen2__block_count=2)
    first = tensors()
    arrays = first | {name.replace("blk.0", "blk.1"): tensor for name, tensor in first.items() if "blk" in name}
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "blk.0.ffn_down.weight", "token_embd.weight"):
        arrays[name] = as_half(arrays[name])
    written = imported(fields, arrays)
    halves = {name for name, array in written.items() if array.dtype == np.float16}
    assert halves == {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert {array.dtype for array in written.values()} == {np.dtype(np.float16), np.dtype(np.float32)}
    for dtype, kind in (("float32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        assert {array.dtype.name for array in imported(fields, arrays, dtype).values()} == {kind}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(imported, value):
    arrays = tensors()
    numbers = np.frombuffer(arrays["blk.0.ffn_up.weight"].data, "<f4").copy()
    numbers[5] = value
    arrays["blk.0.ffn_up.weight"] = arrays["blk.0.ffn_up.weight"]._replace(data=numbers.tobytes())
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.up_proj.weight has an infinity, a NaN or"):
        imported(metadata(), arrays)


def test_an_infinite_scale_and_what_overflows_are_refused(imported, recwarn):
    wide = gguf_files.f32(np.full((Sizes().wide, Sizes().hidden), 1e6))
    with pytest.raises(ValueError, match="beyond float16"):
        imported(metadata(), tensors() | {"blk.0.ffn_up.weight": wide}, "fp16")
    sizes = Sizes(hidden=32)
    block = np.zeros((sizes.vocabulary, 34), np.uint8)
    block[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    arrays = tensors(sizes=sizes) | {"token_embd.weight": Tensor(8, (sizes.vocabulary, 32), block.tobytes())}
    with pytest.raises(ValueError, match=r"^model.embed_tokens.weight has an infinity, a NaN or"):
        imported(metadata(sizes=sizes), arrays)
    assert not list(recwarn)


@pytest.mark.parametrize("kind", ["I8", "I32", "F64", "Q8_K", "IQ2_XXS", "IQ1_M", "TQ1_0", "NVFP4"])
def test_types_that_are_not_read_are_refused_by_name(imported, kind):
    number = gguf.GGMLQuantizationType[kind]
    width, size = gguf.GGML_QUANT_SIZES[number]
    sizes = Sizes(wide=256)
    down = Tensor(int(number), (sizes.hidden, sizes.wide), bytes(sizes.hidden * sizes.wide // width * size))
    with pytest.raises(ValueError, match=rf"blk.0.ffn_down.weight is of type {kind}; those read are F32, F16"):
        imported(metadata(sizes=sizes), tensors(sizes=sizes) | {"blk.0.ffn_down.weight": down})


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_refused(imported):
    arrays = tensors()
    without = {name: tensor for name, tensor in arrays.items() if "attn_v" not in name}
    with pytest.raises(ValueError, match=r"describes: 2 missing \(blk.0.attn_v.weight, blk.0.attn_v.bias\)$"):
        imported(metadata(), without)
    with pytest.raises(ValueError, match=r"describes: 1 unexpected \(blk.0.attn_rot_embd\)$"):
        imported(metadata(), arrays | {"blk.0.attn_rot_embd": gguf_files.f32(np.ones(2))})
    with pytest.raises(ValueError, match=r"describes: 1 unexpected \(blk.1.attn_norm.weight\)$"):
        imported(metadata(), arrays | {"blk.1.attn_norm.weight": gguf_files.f32(np.ones(8))})
    turned = arrays["blk.0.ffn_up.weight"]
    turned = turned._replace(shape=turned.shape[::-1])
    with pytest.raises(
        ValueError, match=r"blk.0.ffn_up.weight has shape \[8, 12\]; by its metadata it must be \[12, 8\]"
    ):
        imported(metadata(), arrays | {"blk.0.ffn_up.weight": turned})
    with pytest.raises(ValueError, match=r"has no tensor token_embd.weight"):
        imported(metadata(), {"output_norm.weight": arrays["output_norm.weight"]})


def test_a_head_of_its_own_is_read(imported):
    head = np.random.default_rng(5).normal(size=(Sizes().vocabulary, Sizes().hidden)).astype(np.float32)
    assert "lm_head.weight" not in imported(metadata(), tensors())
    written = imported(metadata(), tensors() | {"output.weight": gguf_files.f32(head)})
    np.testing.assert_array_equal(written["lm_head.weight"], head)
