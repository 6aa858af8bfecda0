"""One decoder layer against NumPy written from its definition."""

import jax.numpy as jnp
import numpy as np

from dcjax.models import ModelConfig, layers
from dcjax.models.block import Products, block, training_products
from dcjax.models.config import Precision

PRODUCTS = training_products(Precision())


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, mask):
    """One query at a time."""
    out = np.zeros_like(q)
    sharing = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, s])
        scores = k[b, seen, h // sharing] @ q[b, s, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, seen, h // sharing]
    return out


def test_a_block_against_its_formula():
    config = ModelConfig(hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, head_dim=6, rms_norm_eps=0.1)
    shapes = {"q_proj": (8, 24), "k_proj": (8, 12), "v_proj": (8, 12), "o_proj": (24, 8)}
    shapes |= {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8), "q_norm": (6,), "k_norm": (6,)}
    shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    p = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(20, 2, 5, 8)
    positions = np.tile(np.arange(5), (2, 1))
    rope = layers.rope_table(positions, 5, 6, 50.0)
    mask = np.tril(np.ones((2, 1, 5, 5), bool))

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale

    def heads(h, name):
        return (h @ p[name]).reshape(2, 5, -1, 6)

    h = norm(x, p["input_layernorm"])
    q, k = (np.asarray(layers.apply_rope(norm(heads(h, f"{n}_proj"), p[f"{n}_norm"]), rope)) for n in "qk")
    middle = x + softmax_attention(q, k, heads(h, "v_proj"), mask).reshape(2, 5, 24) @ p["o_proj"]
    h = norm(middle, p["post_attention_layernorm"])
    gate = h @ p["gate_proj"]
    expected = middle + (gate / (1 + np.exp(-gate)) * (h @ p["up_proj"])) @ p["down_proj"]

    def attend(q, k, v):
        return softmax_attention(*(np.asarray(x) for x in (q, k, v)), mask), "kept"

    out, cache, routing = block(config, p, x, rope, attend, PRODUCTS)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert (cache, routing) == ("kept", None)


def test_the_block_takes_its_products_from_the_caller():
    config = ModelConfig(hidden_size=4, intermediate_size=4, num_heads=1, num_kv_heads=1, head_dim=4)
    p = {name: jnp.ones(4) for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")}
    kernels = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    asked = []

    def dot(x, kernel):
        asked.append(kernel)
        return jnp.zeros((*x.shape[:-1], 4), x.dtype)

    x, products = jnp.ones((1, 2, 4)), Products(dot, grouped_dot=None)
    rope = layers.rope_table(jnp.arange(2)[None], 2, 4, 10.0)
    out, _, _ = block(config, p | {k: k for k in kernels}, x, rope, lambda q, k, v: (v, None), products)
    assert sorted(asked) == sorted(kernels)
    np.testing.assert_array_equal(out, x)
