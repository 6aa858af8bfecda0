"""One decoder layer against NumPy written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from dcjax.models import ModelConfig, layers
from dcjax.models.block import Products, block, training_products
from dcjax.models.config import Precision

PRODUCTS = training_products(Precision())


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotated(x, theta):
    """Pairs turned by their position as complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_a_block_against_its_formula():
    config = ModelConfig(hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, head_dim=6, rms_norm_eps=0.1)
    shapes = {"q_proj": (8, 24), "k_proj": (8, 12), "v_proj": (8, 12), "o_proj": (24, 8)}
    shapes |= {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8), "q_norm": (6,), "k_norm": (6,)}
    shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    p = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x, context = normal(20, 2, 5, 8), normal(21, 2, 5, 4, 6)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale

    def heads(h, name):
        return (h @ p[name]).reshape(2, 5, -1, 6)

    @jax.jit
    def run(p, x):
        rope = layers.rope_table(np.tile(np.arange(5), (2, 1)), 5, 6, 50.0)
        return block(config, p, x, rope, lambda q, k, v: (context, (q, k, v)), PRODUCTS)

    out, (q, k, v), routing = run(p, x)
    h = norm(x, p["input_layernorm"])
    np.testing.assert_allclose(q, rotated(norm(heads(h, "q_proj"), p["q_norm"]), 50.0), atol=1e-5)
    np.testing.assert_allclose(k, rotated(norm(heads(h, "k_proj"), p["k_norm"]), 50.0), atol=1e-5)
    np.testing.assert_allclose(v, heads(h, "v_proj"), atol=1e-5)
    middle = x + context.reshape(2, 5, 24) @ p["o_proj"]
    h = norm(middle, p["post_attention_layernorm"])
    gate = h @ p["gate_proj"]
    expected = middle + (gate / (1 + np.exp(-gate)) * (h @ p["up_proj"])) @ p["down_proj"]
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert routing is None


def test_the_block_takes_its_products_from_the_caller():
    config = ModelConfig(hidden_size=4, intermediate_size=4, num_heads=1, num_kv_heads=1, head_dim=4)
    p = {name: np.ones(4, np.float32) for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")}
    kernels = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    asked = []

    def dot(x, kernel):
        asked.append(kernel)
        return jnp.zeros((*x.shape[:-1], 4), x.dtype)

    @jax.jit
    def run(x):
        rope = layers.rope_table(np.arange(2)[None], 2, 4, 10.0)
        products = Products(dot, grouped_dot=None)
        return block(config, p | {k: k for k in kernels}, x, rope, lambda q, k, v: (v, None), products)[0]

    x = np.ones((1, 2, 4), np.float32)
    np.testing.assert_array_equal(run(x), x)
    assert sorted(asked) == sorted(kernels)
