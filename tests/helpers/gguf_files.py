"""GGUF files, written byte by byte from the format's definition, whole and broken; and a tiny model in one."""

import struct
from typing import NamedTuple

import numpy as np

ALIGNMENT = 32
F32, F16 = 0, 1
CODES = {"u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?")}


class Tensor(NamedTuple):
    kind: int
    shape: tuple
    """In NumPy's order."""
    data: bytes


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def typed(value):
    """A value of the metadata: its type and its bytes; pairs give the type of a number, bytes are taken as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        number, code = CODES[value[0]]
        return struct.pack(f"<I{code}", number, value[1])
    if isinstance(value, bool):
        return typed(("bool", value))
    if isinstance(value, int):
        return typed(("u32", value))
    if isinstance(value, float):
        return typed(("f32", value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    number, code = CODES["i32" if isinstance(value[0], int) else "f32"]
    return struct.pack(f"<IIQ{len(value)}{code}", 9, number, len(value), *value)


def f32(array):
    return Tensor(F32, array.shape, np.ascontiguousarray(array, "<f4").tobytes())


def padded(content, alignment=ALIGNMENT):
    return content + b"\0" * (-len(content) % alignment)


def gguf_bytes(metadata, tensors, *, offsets=None, alignment=ALIGNMENT):
    """A file; metadata and tensors are lists of pairs, or dictionaries. `offsets` replaces some by their names."""
    metadata, tensors = (list(each.items()) if isinstance(each, dict) else each for each in (metadata, tensors))
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    content += b"".join(text(key) + typed(value) for key, value in metadata)
    payload = b""
    for name, tensor in tensors:
        offset = (offsets or {}).get(name, len(payload))
        content += text(name) + struct.pack("<I", len(tensor.shape))
        content += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]) + struct.pack("<IQ", tensor.kind, offset)
        payload = padded(payload + tensor.data, alignment)
    return padded(content, alignment) + payload


TOKENS = ["<end>", "<user>", *(chr(letter) for letter in range(ord("a"), ord("a") + 12)), "Ġ", "ab", "Ġc"]


class Sizes(NamedTuple):
    """Of a model of one layer."""

    vocabulary: int = len(TOKENS)
    hidden: int = 8
    wide: int = 12
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 4


def metadata(architecture="qwen2", sizes=Sizes(), **changes):  # noqa: B008
    """The metadata of a model. Changes are by key, "__" for "."; None leaves a key out."""
    fields = {
        "general.architecture": architecture,
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": sizes.hidden,
        f"{architecture}.feed_forward_length": sizes.wide,
        f"{architecture}.attention.head_count": sizes.heads,
        f"{architecture}.attention.head_count_kv": sizes.kv_heads,
        f"{architecture}.attention.key_length": sizes.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 2)],
        "tokenizer.ggml.merges": ["a b", "Ġ c"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in fields.items() if value is not None}


def tensors(architecture="qwen2", sizes=Sizes(), *, seed=0):  # noqa: B008
    """The tensors of that model, random, with a tied head."""
    rng = np.random.default_rng(seed)
    hidden, wide, q, kv = sizes.hidden, sizes.wide, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {
        "token_embd.weight": (sizes.vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (q, hidden),
        "blk.0.attn_k.weight": (kv, hidden),
        "blk.0.attn_v.weight": (kv, hidden),
        "blk.0.attn_output.weight": (hidden, q),
        "blk.0.ffn_gate.weight": (wide, hidden),
        "blk.0.ffn_up.weight": (wide, hidden),
        "blk.0.ffn_down.weight": (hidden, wide),
    }
    if architecture == "qwen2":
        shapes |= {f"blk.0.attn_{x}.bias": (width,) for x, width in (("q", q), ("k", kv), ("v", kv))}
    if architecture == "qwen3":
        shapes |= {f"blk.0.attn_{x}_norm.weight": (sizes.head_dim,) for x in "qk"}
    return {name: f32(rng.normal(size=shape)) for name, shape in shapes.items()}
