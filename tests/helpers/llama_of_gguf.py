"""Llama by its definition, in NumPy's float64, with the weights of a GGUF file: nothing of it is dcjax's.

What is rotated together lies side by side in such a file, and is rotated so here. Only the container is read by a
library, the package `gguf`.
"""

import gguf
import numpy as np


def numbers(tensor):
    """A tensor of types F32, Q8_0 and Q4_1: of a block of 32 numbers, float16s come first and then the codes."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        return tensor.data.astype(np.float64)
    floats = {gguf.GGMLQuantizationType.Q8_0: 1, gguf.GGMLQuantizationType.Q4_1: 2}[tensor.tensor_type]
    rows, width = len(tensor.data), int(tensor.shape[0])
    blocks = tensor.data.reshape(rows, width // 32, -1)
    scale, *least = np.moveaxis(blocks[..., : 2 * floats].copy().view("<f2").astype(np.float64), -1, 0)
    codes = blocks[..., 2 * floats :]
    if least:
        # the lower halves of the bytes are the first 16 numbers, the upper ones the rest
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1) * scale[..., None] + least[0][..., None]
    else:
        codes = codes.view(np.int8) * scale[..., None]
    return codes.reshape(rows, width)


def normalised(x, weight, epsilon):
    """RMSNorm."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * weight


def rotated(x, theta):
    """RoPE of heads [S, heads, width]: number i of each pair (2i, 2i + 1) turns by position × theta^(-2i / width)."""
    length, _, width = x.shape
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attention(queries, keys, values):
    """Each query, of several heads for one of the keys', over what is not behind it; [S, heads × width]."""
    length, heads, width = queries.shape
    future = np.triu(np.ones((length, length), bool), 1)
    out = []
    for head in range(heads):
        shared = head // (heads // keys.shape[1])
        scores = np.where(future, -np.inf, queries[:, head] @ keys[:, shared].T / np.sqrt(width))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ values[:, shared])
    return np.concatenate(out, axis=-1)


class Llama:
    """A model with a tied head; weights are read when they are used."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name):
        return self.fields[f"llama.{name}"].contents()

    def read(self, name):
        return numbers(self.tensors[f"{name}.weight"])

    def logits(self, tokens):
        """[S] to [S, V]."""
        table, epsilon = self.read("token_embd"), self.field("attention.layer_norm_rms_epsilon")
        heads, kv_heads = self.field("attention.head_count"), self.field("attention.head_count_kv")
        theta = self.field("rope.freq_base")

        def in_heads(x, number):
            return x.reshape(len(x), number, -1)

        x = table[tokens]
        for layer in range(self.field("block_count")):
            at = f"blk.{layer}."
            y = normalised(x, self.read(f"{at}attn_norm"), epsilon)
            queries = rotated(in_heads(y @ self.read(f"{at}attn_q").T, heads), theta)
            keys = rotated(in_heads(y @ self.read(f"{at}attn_k").T, kv_heads), theta)
            values = in_heads(y @ self.read(f"{at}attn_v").T, kv_heads)
            x = x + attention(queries, keys, values) @ self.read(f"{at}attn_output").T
            y = normalised(x, self.read(f"{at}ffn_norm"), epsilon)
            gate = y @ self.read(f"{at}ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ self.read(f"{at}ffn_up").T)) @ self.read(f"{at}ffn_down").T
        assert "output.weight" not in self.tensors
        return normalised(x, self.read("output_norm"), epsilon) @ table.T
