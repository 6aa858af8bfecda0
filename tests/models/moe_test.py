"""Experts against NumPy loops over tokens, forward and backward, in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dcjax.models import ModelConfig, moe
from dcjax.models.layers import EXACT, Arithmetic

pytestmark = pytest.mark.heavy

HIDDEN, WIDTH, EXPERTS = 10, 12, 5
FLOAT32 = jnp.dtype(jnp.float32)
NAMES = {"gate": "experts_gate_proj", "up": "experts_up_proj", "down": "experts_down_proj"}

# what is run a few times takes its time compiling
route = jit(moe.route, static_argnums=0)
training_dot = partial(moe.grouped_dot, arithmetic=EXACT)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def architecture(k=2, norm=True):
    return ModelConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=k,
        moe_intermediate_size=WIDTH,
        norm_topk_prob=norm,
    )


def parameters(seed=0):
    shapes = {
        "router": (HIDDEN, EXPERTS),
        NAMES["gate"]: (EXPERTS, HIDDEN, WIDTH),
        NAMES["up"]: (EXPERTS, HIDDEN, WIDTH),
    }
    shapes |= {NAMES["down"]: (EXPERTS, WIDTH, HIDDEN)}
    return {name: normal(seed + i, *shape) / np.float32(2) for i, (name, shape) in enumerate(shapes.items())}


def choose(p, config):
    return np.argsort(-p, kind="stable")[: config.num_experts_per_tok]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def token_forward(config, params, x, experts):
    """One token: its experts, their weights, all probabilities, and per expert what the backward needs."""
    p = softmax(x @ params["router"])
    experts = choose(p, config) if experts is None else experts
    weights = p[experts] / (p[experts].sum() if config.norm_topk_prob else 1)
    inner = []
    for e in experts:
        gate, up = x @ params[NAMES["gate"]][e], x @ params[NAMES["up"]][e]
        sigmoid = 1 / (1 + np.exp(-gate))
        act = gate * sigmoid * up
        inner.append((gate, up, sigmoid, act, act @ params[NAMES["down"]][e]))
    return experts, weights, p, inner


def wide(params):
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def loop_forward(config, params, x, experts=None):
    params, out = wide(params), np.zeros(x.shape)
    for b, s in np.ndindex(*x.shape[:2]):
        imposed = None if experts is None else experts[b, s]
        _, weights, _, inner = token_forward(config, params, x[b, s].astype(np.float64), imposed)
        out[b, s] = sum(w * one[-1] for w, one in zip(weights, inner, strict=True))
    return out


def loop_backward(config, params, x, upstream, experts=None):
    """Gradients of Σ upstream · out, by the chain rule written out."""
    params = wide(params)
    grads, of_x = {name: np.zeros(value.shape) for name, value in params.items()}, np.zeros(x.shape)
    for b, s in np.ndindex(*x.shape[:2]):
        token, dy = x[b, s].astype(np.float64), upstream[b, s].astype(np.float64)
        imposed = None if experts is None else experts[b, s]
        chosen, weights, p, inner = token_forward(config, params, token, imposed)
        dweights = np.array([dy @ one[-1] for one in inner])
        for e, w, (gate, up, sigmoid, act, _) in zip(chosen, weights, inner, strict=True):
            dact = params[NAMES["down"]][e] @ (w * dy)
            dup, dgate = dact * gate * sigmoid, dact * up * sigmoid * (1 + gate * (1 - sigmoid))
            grads[NAMES["down"]][e] += np.outer(act, w * dy)
            grads[NAMES["gate"]][e] += np.outer(token, dgate)
            grads[NAMES["up"]][e] += np.outer(token, dup)
            of_x[b, s] += params[NAMES["gate"]][e] @ dgate + params[NAMES["up"]][e] @ dup
        dp = np.zeros_like(p)
        dp[chosen] = (dweights - dweights @ weights) / p[chosen].sum() if config.norm_topk_prob else dweights
        dlogits = p * (dp - dp @ p)
        grads["router"] += np.outer(token, dlogits)
        of_x[b, s] += params["router"] @ dlogits
    return grads, of_x


def scored(config, params, x, upstream, experts=None):
    """Σ upstream · out, and out and the routing with it."""
    out, routing = moe.moe(config, params, x, training_dot, experts)
    return jnp.sum(upstream * out), (out, routing)


@cache
def program(config):
    return jit(jax.value_and_grad(partial(scored, config), argnums=(0, 1), has_aux=True))


def run(config, params, x, upstream, experts=None):
    (_, (out, routing)), (grads, of_x) = program(config)(params, x, upstream, experts)
    return out, routing, grads, of_x


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def close_trees(actual, expected):
    jax.tree.map(close, actual, expected)


def compare(config, params, x, experts=None):
    upstream = normal(90, *x.shape)
    out, _, grads, of_x = run(config, params, x, upstream, experts)
    close(out, loop_forward(config, params, x, experts))
    expected, expected_x = loop_backward(config, params, x, upstream, experts)
    close(of_x, expected_x)
    for name in params:
        close(grads[name], expected[name])


@pytest.mark.parametrize(
    ("k", "norm"),
    [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (EXPERTS, True),
        pytest.param(EXPERTS, False, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_against_a_loop(k, norm):
    compare(architecture(k, norm), parameters(), normal(10, 2, 20, HIDDEN))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("favourite", [0, 3, EXPERTS - 1])
def test_all_tokens_to_one_expert(favourite, norm):
    params, x = parameters(1), np.abs(normal(11, 2, 20, HIDDEN))
    params["router"][:, favourite] = 1.0
    params["router"][:, [e for e in range(EXPERTS) if e != favourite]] *= 0.1
    _, routing, _, _ = run(architecture(1, norm), params, x, x)
    assert (np.asarray(routing.experts) == favourite).all()
    compare(architecture(1, norm), params, x)


def test_one_token_only():
    compare(architecture(), parameters(2), normal(12, 1, 1, HIDDEN))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("used", [(0, 1), (1, 4), (0, 2, 4), tuple(range(EXPERTS))])
def test_imposed_experts_against_a_loop(used, norm):
    rng = np.random.default_rng(3)
    experts = np.array([[rng.permutation(used)[:2] for _ in range(20)] for _ in range(2)], np.int32)
    compare(architecture(2, norm), parameters(3), normal(13, 2, 20, HIDDEN), experts)


def test_replay_of_its_own_choices_changes_nothing():
    params, x = parameters(4), normal(14, 2, 20, HIDDEN)
    free = run(architecture(), params, x, x)
    replayed = run(architecture(), params, x, x, free[1].experts)
    jax.tree.map(np.testing.assert_array_equal, free, replayed)


def test_imposed_experts_of_vanishing_probability_have_weights():
    router = np.array([[0.0, -200.0, -200.0]], np.float32)
    config = ModelConfig(num_experts=3, num_experts_per_tok=2)
    routing, weights = route(config, router, np.ones((1, 1, 1), np.float32), np.array([[[1, 2]]]))
    np.testing.assert_array_equal(routing.probabilities, [[[1, 0, 0]]])
    np.testing.assert_allclose(weights, [[[0.5, 0.5]]])


def test_routing_by_hand():
    # e to the power of the logits is 1, 4, 2, 1
    router = np.log(np.array([[1, 4, 2, 1]], np.float32))
    for norm, expected in [(True, [4 / 6, 2 / 6]), (False, [4 / 8, 2 / 8])]:
        config = ModelConfig(num_experts=4, num_experts_per_tok=2, norm_topk_prob=norm)
        routing, weights = route(config, router, np.ones((1, 1, 1), np.float32))
        np.testing.assert_array_equal(routing.experts, [[[1, 2]]])
        np.testing.assert_allclose(routing.probabilities, [[[1 / 8, 4 / 8, 2 / 8, 1 / 8]]], rtol=1e-6)
        np.testing.assert_allclose(routing.logsumexp, [[np.log(8)]], rtol=1e-6)
        np.testing.assert_allclose(weights, [[expected]], rtol=1e-6)


def test_equal_experts_are_taken_from_the_lowest_index():
    router = np.array([[0, 1, 0, 1, 1]], np.float32)
    config = architecture(4)
    routing, _ = route(config, router, np.ones((1, 1, 1), np.float32))
    np.testing.assert_array_equal(routing.experts, [[[1, 3, 4, 0]]])


def test_accelerators_multiply_the_router_in_full_precision():
    lowered = jax.jit(partial(moe.route, architecture())).trace(parameters()["router"], normal(37, 1, 2, HIDDEN))
    assert "precision = [HIGHEST, HIGHEST]" in lowered.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_router_is_float32_whatever_the_activations_are(dtype):
    # the last expert is ahead by what neither narrow dtype can tell apart from 1
    router = np.array([[1, 1, 1, 1, 1 + 2**-14]], np.float32)
    routing, weights = route(architecture(1), router, jnp.ones((1, 1, 1), dtype))
    assert int(routing.experts[0, 0, 0]) == EXPERTS - 1
    assert routing.probabilities.dtype == routing.logsumexp.dtype == jnp.float32
    assert weights.dtype == dtype


def test_narrow_activations_stay_narrow_and_gradients_wide():
    params, x = parameters(5), jnp.asarray(normal(15, 2, 20, HIDDEN), jnp.bfloat16)
    out, _, grads, of_x = run(architecture(), params, x, x)
    assert out.dtype == of_x.dtype == jnp.bfloat16
    assert all(gradient.dtype == jnp.float32 for gradient in grads.values())
    close(np.asarray(out, np.float64), loop_forward(architecture(), params, np.asarray(x, np.float32)), 3e-2)


def test_kernel_gradients_are_not_rounded_to_the_rows_dtype():
    sizes = np.array([30, 0, 3, 31], np.int32)
    rows, upstream = (jnp.asarray(normal(seed, 64, width), jnp.bfloat16) for seed, width in [(16, 6), (17, 8)])
    kernels = normal(18, 4, 6, 8)
    total = jax.grad(lambda kernels: jnp.sum((upstream * training_dot(rows, kernels, sizes)).astype(jnp.float32)))
    expected = np.zeros(kernels.shape)
    for n, group in enumerate(np.repeat(np.arange(4), sizes)):
        expected[group] += np.outer(np.asarray(rows[n], np.float64), np.asarray(upstream[n], np.float64))
    close(jit(total)(kernels), expected, 1e-6)


def cut(cuts, rows):
    """Sizes of the groups between sorted cuts."""
    return np.diff([0, *sorted(cuts), rows]).astype(np.int32)


def grouped_loop(rows, kernels, sizes):
    rows, kernels = rows.astype(np.float64), kernels.astype(np.float64)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return np.array([row @ kernels[group] for row, group in zip(rows, groups, strict=True)])


def grouped_backward(rows, kernels, sizes, upstream):
    of_rows, of_kernels = np.zeros(rows.shape), np.zeros(kernels.shape)
    for n, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        of_rows[n] = kernels[group].astype(np.float64) @ upstream[n]
        of_kernels[group] += np.outer(rows[n].astype(np.float64), upstream[n])
    return of_rows, of_kernels


@jit
def grouped_with_gradients(rows, kernels, sizes, upstream):
    out, pull = jax.vjp(lambda rows, kernels: training_dot(rows, kernels, sizes), rows, kernels)
    return out, *pull(upstream)


# from fewer rows than groups to many blocks in a group
@pytest.mark.parametrize("count", [1, 3, 40, 500])
@settings(max_examples=40)
@given(data=st.data())
def test_grouped_dot_of_any_group_sizes(count, data):
    sizes = cut(data.draw(st.lists(st.integers(0, count), min_size=5, max_size=5)), count)
    rows, kernels, upstream = normal(20, count, 4), normal(21, 6, 4, 3), normal(22, count, 3)
    out, of_rows, of_kernels = grouped_with_gradients(rows, kernels, sizes, upstream)
    close(out, grouped_loop(rows, kernels, sizes))
    expected_rows, expected_kernels = grouped_backward(rows, kernels, sizes, upstream)
    close(of_rows, expected_rows)
    close(of_kernels, expected_kernels)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 100), min_size=3, max_size=3))
def test_integer_products_are_exact(cuts):
    rng = np.random.default_rng(0)
    rows, kernels = (rng.integers(-127, 128, shape, np.int8) for shape in [(100, 9), (4, 9, 7)])
    out = integer_product(rows, kernels, cut(cuts, 100))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, grouped_loop(rows, kernels, cut(cuts, 100)))


@jit
def integer_product(rows, kernels, sizes):
    return moe.grouped_product(rows, kernels, sizes, Arithmetic(jnp.dtype(jnp.int32)))


def test_blocks_take_any_product_of_rows():
    sizes, rows = np.array([5, 0, 20, 1], np.int32), normal(23, 26, 3)

    def product(block, expert):
        assert block.shape[1:] == (3,)
        return jnp.stack([block.sum(1).astype(jnp.bfloat16), jnp.full(len(block), expert, jnp.bfloat16)], axis=1)

    out = jit(lambda rows, sizes: moe.blocked(rows, sizes, product))(rows, sizes)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[:, 0], rows.sum(1).astype(jnp.bfloat16))
    np.testing.assert_array_equal(out[:, 1], np.repeat(np.arange(4), sizes))


def test_rows_of_other_groups_do_not_leak():
    # NaN in the second group, which the first group's only block reads and computes with
    sizes, rows = np.array([3, 2, 3], np.int32), normal(24, 8, 4)
    rows[3:5] = np.nan
    out, of_rows, of_kernels = grouped_with_gradients(rows, normal(25, 3, 4, 3), sizes, normal(26, 8, 3))
    assert np.isfinite(np.delete(out, [3, 4], axis=0)).all()
    assert np.isfinite(of_rows).all()
    assert np.isfinite(np.asarray(of_kernels)[[0, 2]]).all()


def test_the_accelerators_path_agrees(monkeypatch):
    params, x = parameters(6), normal(27, 2, 20, HIDDEN)
    blocks = run(architecture(), params, x, x)
    monkeypatch.setattr(moe, "_by_platform", lambda cpu, accelerator, **others: accelerator)
    ragged = program.__wrapped__(architecture())
    assert "ragged_dot" in str(ragged.trace(params, x, x).jaxpr)
    (_, (out, routing)), (grads, of_x) = ragged(params, x, x)
    close_trees((out, routing, grads, of_x), blocks)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_each_platform_is_lowered_to_its_own_products(platform):
    args = normal(28, 8, 4), normal(29, 3, 4, 2), np.array([3, 2, 3], np.int32), normal(30, 8, 2)
    text = grouped_with_gradients.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text, "tpu_custom_call" in text) == (platform != "cpu", platform == "tpu")
    # a CPU's blocks are a loop, and so is the search for the tiles of a TPU's kernel
    assert ("while" in text) == (platform != "cuda")


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 0, 20, 3), (0, 0, 0, 7), (40, 0, 0, 0), (0, 0, 0, 0), (16, 16, 4, 4)])
def test_a_tpus_kernel_gradients_are_those_of_a_loop(sizes, dtype):
    """Rows behind the last group are not read: they hold NaN, as what a kernel leaves unwritten may."""
    rows, gradient = (jnp.asarray(normal(number, 40, width), dtype) for number, width in ((32, 24), (33, 40)))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        out = moe.tiled_outer_products(
            EXACT, rows.at[sum(sizes) :].set(jnp.nan), gradient, jnp.array(sizes, jnp.int32), tiles=(16, 16, 16)
        )
    ends = np.cumsum(sizes)
    for group, end in enumerate(ends):
        mine = slice(end - sizes[group], end)
        expected = np.asarray(rows[mine], np.float64).T @ np.asarray(gradient[mine], np.float64)
        np.testing.assert_allclose(out[group], expected, rtol=1e-5, atol=1e-5)


def test_memory_grows_with_rows_and_not_with_rows_times_experts():
    count, experts, width = 2048, 64, 32
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(count, width), (experts, width, width)]]
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    compiled = grouped_with_gradients.lower(*shapes, sizes, shapes[0]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * count * experts * width / 8


def test_permuted_tokens_give_permuted_outputs():
    params, x = parameters(7), normal(31, 2, 20, HIDDEN)
    order = np.random.default_rng(32).permutation(40)
    shuffled = x.reshape(40, -1)[order].reshape(x.shape)
    out, _, grads, _ = run(architecture(), params, x, x)
    turned, _, turned_grads, _ = run(architecture(), params, shuffled, shuffled)
    close(turned.reshape(40, -1), np.asarray(out).reshape(40, -1)[order], 1e-6)
    close_trees(turned_grads, grads)


def test_a_token_does_not_depend_on_its_neighbours():
    params, x = parameters(8), normal(33, 2, 20, HIDDEN)
    together = run(architecture(), params, x, x)[0]
    crowd = np.broadcast_to(x[1, 4], x.shape).copy()
    crowd[0, 3] = x[0, 3]
    close(run(architecture(), params, x[:1, 3:4], x[:1, 3:4])[0][0, 0], together[0, 3], 1e-6)
    close(run(architecture(), params, crowd, crowd)[0][0, 3], together[0, 3], 1e-6)


def loss(params, x, experts=None):
    return scored(architecture(), params, x, x, experts)[0]


def test_rematerialised_gradients_are_the_same():
    params, x = parameters(9), normal(34, 2, 20, HIDDEN)
    close_trees(jit(jax.grad(jax.checkpoint(loss)))(params, x), run(architecture(), params, x, x)[2])


@pytest.mark.parametrize("stacked", [True, False])
def test_vmapped_gradients_are_those_of_each(stacked):
    each = [parameters(10), parameters(20) if stacked else parameters(10)]
    x = normal(35, 2, 2, 20, HIDDEN)
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *each) if stacked else each[0]
    together = jit(jax.vmap(jax.grad(loss), in_axes=(0 if stacked else None, 0)))(params, x)
    for i, one in enumerate(each):
        close_trees(take(together, i), run(architecture(), one, x[i], x[i])[2])


def test_scanned_layers_are_those_one_by_one():
    each, x = [parameters(30), parameters(40)], normal(36, 2, 20, HIDDEN)

    def total(stacked):
        def layer(x, params):
            return moe.moe(architecture(), params, x, training_dot)

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, stacked)[0])

    grads = jit(jax.grad(total))(jax.tree.map(lambda *leaves: np.stack(leaves), *each))
    between = run(architecture(), each[0], x, x)[0]
    _, _, last, upstream = run(architecture(), each[1], between, np.ones_like(x))
    close_trees(take(grads, 1), last)
    close_trees(take(grads, 0), run(architecture(), each[0], x, upstream)[2])


def take(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def routing_of(probabilities, experts, logsumexp):
    return moe.Routing(
        experts=jnp.asarray(experts, jnp.int32),
        probabilities=jnp.asarray(probabilities, jnp.float32),
        logsumexp=jnp.asarray(logsumexp, jnp.float32),
    )


@jit
def metrics_of(routing, mask):
    def sum_tokens(values):
        return jnp.einsum("bs,bs...->b...", mask, jnp.where(jnp.isnan(values), 0, values))

    return moe.router_metrics(routing, sum_tokens)


def test_router_metrics_by_hand():
    # row 0: choices go 2, 1, 1, 0 times to the experts, of mean probability .5, .25, .125, .125; row 1: one real token
    p = [[[0.5, 0.25, 0.25, 0], [0.5, 0.25, 0, 0.25]], [[0, 0, 1, 0], [np.nan] * 4]]
    experts = [[[0, 1], [0, 2]], [[2, 0], [2, 0]]]
    routing = routing_of(p, experts, [[1, 3], [2, np.nan]])
    metrics = metrics_of(routing, np.array([[True, True], [True, False]]))
    np.testing.assert_allclose(metrics["router/load_balance"], [4 * (0.5 * 0.5 + 0.25 * 0.25 + 0.25 * 0.125), 2.0])
    np.testing.assert_allclose(metrics["router/z"], [5, 4])
    np.testing.assert_allclose(metrics["router/entropy"], [1.5 * np.log(2), 0], atol=1e-6)


def test_router_metrics_of_even_and_one_sided_routing():
    even = routing_of(np.full((1, 4, 4), 0.25), [[[0, 1], [2, 3], [0, 1], [2, 3]]], np.zeros((1, 4)))
    single = routing_of(np.tile([0, 1.0, 0, 0], (1, 4, 1)), np.ones((1, 4, 1)), np.zeros((1, 4)))
    mask = np.ones((1, 4), bool)
    np.testing.assert_allclose(metrics_of(even, mask)["router/load_balance"], [1])
    np.testing.assert_allclose(metrics_of(single, mask)["router/load_balance"], [4])


def test_router_metrics_of_a_row_without_tokens_are_zero():
    routing = routing_of(np.full((2, 3, 4), np.nan), np.zeros((2, 3, 2)), np.full((2, 3), np.nan))
    for value in metrics_of(routing, np.zeros((2, 3), bool)).values():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, [0, 0])


@pytest.mark.parametrize("norm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_choice_may_be_made_from_the_routers_probabilities(norm):
    config, params, x = architecture(2, norm), parameters(4), normal(12, 2, 7, HIDDEN)
    least = jit(lambda x: moe.moe(config, params, x, training_dot, lambda p: jnp.argsort(p, axis=-1)[..., :2]))
    out, routing = least(x)
    p = np.apply_along_axis(softmax, -1, np.float64(x) @ np.float64(params["router"]))
    experts = np.argsort(p, axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(routing.experts, experts)
    close(routing.probabilities, p)
    close(out, loop_forward(config, params, x, experts))
