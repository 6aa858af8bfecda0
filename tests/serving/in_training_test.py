"""Training in the served format: its forward against the engine's numbers, its backward against dequantised weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from served import DENSE, MIXED, OTHER, T, engine_of, rollout_of
from tiny import masters

from dcjax.models import token_logps
from dcjax.models.numerics import MASTERS
from dcjax.models.parameters import parameters
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.formats import formats
from dcjax.serving.formats.base import Format
from dcjax.serving.in_training import training_numerics
from dcjax.serving.sync import Conversion

pytestmark = pytest.mark.heavy

SLOW = pytest.mark.slow


def numerics_of(format, how, config=DENSE, keep=(), kv_cache=None):
    engine = engine_of(format, config)
    return training_numerics(config, engine.format, kv_cache or engine.kv_cache, keep, how)


def forward(config, numerics, params, rollout):
    return token_logps(
        config,
        params,
        rollout.tokens,
        rollout.attention_mask,
        response_length=T,
        temperature=jnp.asarray(rollout.temperature),
        numerics=numerics,
    ).logps


def scored(format, how, config=DENSE):
    """Log-probs of the engine's samples by the training forward, and the engine's own."""
    model, numerics = numerics_of(format, how, config)
    rollout = rollout_of(format, config)
    program = jax.jit(partial(forward, model, numerics, rollout=rollout), compiler_options=NO_EXCESS_PRECISION)
    found, mask = np.asarray(program(masters(config))), rollout.response_mask
    return found[mask], rollout.rollout_logps[mask]


def gap(scored):
    ours, theirs = map(np.exp, scored)
    return np.abs(ours - theirs).mean()


EVERY_DAY = ("int4",)


@pytest.mark.parametrize("name", [name if name in EVERY_DAY else pytest.param(name, marks=SLOW) for name in formats])
def test_what_is_left_of_the_mismatch_is_the_order_of_sums(name):
    """Weights, activations, keys and values as the engine has them: of its gap less than a twentieth is left."""
    own, whole = gap(scored(name, "masters")), gap(scored(name, "all"))
    assert whole < (1e-6 if name == "float32" else own / 20)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("config", [pytest.param(MIXED, marks=SLOW), pytest.param(OTHER, marks=SLOW)])
def test_so_it_is_with_experts_biases_and_heads_of_their_own(name, config):
    # a rounding that falls the other way may send a token to another expert
    assert gap(scored(name, "all", config)) < gap(scored(name, "masters", config)) / (4 if config == MIXED else 20)


def dequantised(config, format):
    """The masters as the engine stores them, by what a sync makes of each parameter, as float32."""
    conversion, params = Conversion(config, formats[format]), masters(config)
    outer, layers = {}, {}
    for parameter in parameters(config):
        if parameter.layers is None:
            leaf = params[parameter.name]
            outer[parameter.name] = decoded(conversion(parameter.name, 0, leaf, 0), parameter)
            continue
        slices = [conversion(parameter.name, n, leaf, 0) for n, leaf in enumerate(params["layers"][parameter.name])]
        layers[parameter.name] = np.stack([decoded(stored, parameter) for stored in slices])
    return {**outer, "layers": layers}


def decoded(stored, parameter):
    """By NumPy: 16 bits as they are, values of a group or a channel times its scale, and of int4 both nibbles."""
    axis = parameter.contracted_axis
    if axis is None:
        return np.asarray(stored, np.float32)
    if not hasattr(stored, "codes"):
        return np.asarray(stored.values, np.float32) * np.expand_dims(np.asarray(stored.scale), axis)
    if not hasattr(stored.codes, "scale"):
        return np.asarray(stored.codes, np.float32)
    values = np.moveaxis(np.asarray(stored.codes.values), axis, -1)
    if values.dtype == np.uint8:
        values = np.stack([values & 15, values >> 4], axis=-1).astype(np.int32).reshape(*values.shape[:-1], -1)
        values = np.where(values > 7, values - 16, values)
    scale = np.moveaxis(np.asarray(stored.codes.scale, np.float32), axis, -1)
    product = np.float32(values) * np.repeat(scale, values.shape[-1] // scale.shape[-1], -1)
    return np.moveaxis(product.astype(jnp.bfloat16).astype(np.float32), -1, axis)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("int4", DENSE),
        *(pytest.param(n, c, marks=SLOW) for n in ("int8", "w8a8", "fp8", "bf16") for c in (DENSE, MIXED)),
    ],
)
def test_values_and_gradients_in_served_weights_are_those_of_the_dequantised_ones(name, config):
    """Straight through: the gradient of the masters is the gradient at what is served, to every parameter."""
    model, numerics = numerics_of(name, "weights", config)
    assert model == config
    rollout = rollout_of("float32", config)
    held = jax.tree.map(jnp.asarray, dequantised(config, name))

    def loss(params, numerics):
        return jnp.sum(jnp.where(rollout.response_mask, forward(config, numerics, params, rollout), 0))

    program = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=NO_EXCESS_PRECISION)
    (found, ours), (expected, theirs) = program(masters(config), numerics), program(held, MASTERS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for own, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max())
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize("how", ["weights", "all"])
def test_in_float32_it_is_the_base_to_the_bit(how):
    model, numerics = numerics_of("float32", how)
    rollout = rollout_of("float32")

    def loss(params, model, numerics):
        return jnp.sum(jnp.where(rollout.response_mask, forward(model, numerics, params, rollout), 0))

    program = jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    base, found = program(masters(DENSE), DENSE, MASTERS), program(masters(DENSE), model, numerics)
    assert numerics != MASTERS and model == DENSE
    jax.tree.map(np.testing.assert_array_equal, found, base)


@SLOW
def test_gradients_through_activations_and_cache_are_near_those_of_the_weights_alone():
    """Roundings are seen by the forward pass only, so that the gradient is another by the size of the gap."""
    rollout = rollout_of("float32")

    def grad(how):
        model, numerics = numerics_of("w8a8", how)

        def loss(params):
            return jnp.sum(jnp.where(rollout.response_mask, forward(model, numerics, params, rollout), 0))

        return jax.jit(jax.grad(loss), compiler_options=NO_EXCESS_PRECISION)(masters(DENSE))

    ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(grad(how))]) for how in ("all", "weights"))
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert 0.99 < cosine < 1 - 1e-6


def test_kept_weights_stay_wide_and_before_them_activations_cannot_be_told_apart():
    format = formats["w8a8"]
    _, numerics = numerics_of("w8a8", "weights", keep=("o_proj",))
    leaf = masters(DENSE)["layers"]["o_proj"][0]
    np.testing.assert_array_equal(numerics.weight("o_proj", leaf), leaf.astype(jnp.bfloat16).astype(jnp.float32))
    assert (
        np.abs(numerics.weight("gate_proj", leaf) - leaf).max() > np.abs(numerics.weight("o_proj", leaf) - leaf).max()
    )
    with pytest.raises(ValueError, match=r"serving\.keep has o_proj, and serving\.format w8a8 quantises activations"):
        training_numerics(DENSE, format, jnp.dtype(jnp.int8), ("o_proj",), "all")
    with pytest.raises(ValueError, match=r"serving\.in_training is 'both'; it must be"):
        ServingConfig(in_training="both")
    # a format that says only how it multiplies cannot be trained in, and says so
    with pytest.raises(NotImplementedError, match="does not encode"):
        training_numerics(DENSE, _Opaque(), jnp.dtype(jnp.bfloat16), (), "weights")[1].weight("o_proj", leaf)


@dataclasses.dataclass(frozen=True)
class _Opaque(Format):
    @property
    def name(self):
        return "opaque"
