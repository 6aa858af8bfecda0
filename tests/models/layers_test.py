"""Each piece of a layer against NumPy written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dcjax.models import ModelConfig, layers


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_by_hand():
    # mean of squares of (3, 4) is 12.5, eps lifts it to 16
    x, scale = jnp.array([[3.0, 4.0]]), jnp.array([2.0, 1.0])
    np.testing.assert_allclose(layers.rms_norm(x, scale, 3.5), [[1.5, 1.0]], rtol=1e-6)


def test_rms_norm_takes_its_statistics_in_float32():
    # 300² overflows float16, and 256 ones lose the last bits of a bfloat16 sum
    x = jnp.full((1, 256), 300.0, jnp.float16)
    out = layers.rms_norm(x, jnp.ones(256), 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.ones((1, 256)))


def test_rotation_multiplies_complex_pairs():
    batch, length, heads, dim, theta = 2, 5, 3, 8, 100.0
    x = normal(0, batch, length, heads, dim)
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 9]])
    pairs = x[..., : dim // 2] + 1j * x[..., dim // 2 :]
    angle = positions[..., None, None] * theta ** (-np.arange(dim // 2) * 2 / dim)
    turned = pairs * np.exp(1j * angle)
    out = layers.apply_rope(x, layers.rope_table(positions, 10, dim, theta))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 1, 16), normal(2, 1, 1, 1, 16)

    def score(query_position, key_position):
        turn = [layers.rope_table(np.full((1, 1), p), 106, 16, 10_000.0) for p in (query_position, key_position)]
        return float(jnp.sum(layers.apply_rope(q, turn[0]) * layers.apply_rope(k, turn[1])))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(4, 9)) > 1e-2


def softmax_attention(q, k, v, mask):
    """One query at a time; None where a query may look nowhere."""
    out = np.zeros_like(q)
    sharing = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, s])
        if len(seen) == 0:
            continue
        scores = k[b, seen, h // sharing] @ q[b, s, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, seen, h // sharing]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_grouped_heads_against_a_loop(kv_heads):
    q, k, v = normal(3, 2, 6, 4, 8), normal(4, 2, 6, kv_heads, 8), normal(5, 2, 6, kv_heads, 8)
    real = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    mask = layers.causal_mask(real)
    out = layers.attention(q, k, v, mask)
    looks = np.asarray(mask)[:, 0].any(-1)
    np.testing.assert_allclose(np.asarray(out)[looks], softmax_attention(q, k, v, np.asarray(mask))[looks], atol=1e-5)
    assert np.isfinite(out).all()


def test_the_mask_hides_the_future_and_padding():
    real = np.array([[False, True, True, False]])
    expected = [[False, False, False, False], [False, True, False, False]]
    expected += [[False, True, True, False], [False, True, True, False]]
    np.testing.assert_array_equal(layers.causal_mask(real), [[expected]])


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

    out, cache = layers.block(config, p, x, rope, lambda q, k, v: (layers.attention(q, k, v, mask), "kept"))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert cache == "kept"


def test_the_block_takes_its_products_from_the_caller():
    config = ModelConfig(hidden_size=4, intermediate_size=4, num_heads=1, num_kv_heads=1, head_dim=4)
    p = {name: jnp.ones(4) for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")}
    kernels = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    asked = []

    def dot(x, kernel):
        asked.append(kernel)
        return jnp.zeros((*x.shape[:-1], 4), x.dtype)

    x = jnp.ones((1, 2, 4))
    rope = layers.rope_table(jnp.arange(2)[None], 2, 4, 10.0)
    out, _ = layers.block(config, p | {k: k for k in kernels}, x, rope, lambda q, k, v: (v, None), dot)
    assert sorted(asked) == sorted(kernels)
    np.testing.assert_array_equal(out, x)


def test_dense_computes_in_the_activations_dtype():
    out = jax.eval_shape(layers.dense, jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32))
    assert (out.shape, out.dtype) == ((2, 4), jnp.bfloat16)


def test_wrong_shapes_are_caught_while_testing():
    with pytest.raises(TypeCheckError):
        layers.rms_norm(jnp.ones((2, 3)), jnp.ones(4), 1e-6)
