"""Faults that are planted, each of which ends the run, and what is no fault and does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import served
import tiny
from stepping import Stepper

import dcjax.loop.rollouts
import dcjax.rl.step
import dcjax.serving.rollout
from dcjax.errors import RunError
from dcjax.loop.self_checks import JUMP, NEVER, SERVED_TOLERANCE, UNRELATED, SampleCheck, StepCheck, WeightCheck
from dcjax.recipe import build
from dcjax.recipe.config import MeshConfig
from dcjax.rewards.pool import Pending
from dcjax.serving import Qwen3Engine
from dcjax.serving.fingerprint import Comparison
from dcjax.serving.formats import formats
from dcjax.serving.formats.grouped import Grouped
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import make_sync
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Rollout

pytestmark = pytest.mark.heavy

DENSE, EXPERTS = tiny.DENSE, tiny.EXPERTS


class Alternating:
    """Every group's rewards differ, so that each iteration changes the parameters."""

    counters, asks = None, ()

    def submit(self, texts, golds, finished, known=None):
        return Pending.of([float(number % 2) for number in range(len(texts))])


# --- weights ---


@functools.cache
def moved(config):
    """The masters after an update that moves each weight by a thousandth of its size."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x * (1 + 1e-3 * rng.choice([-1, 1], x.shape).astype(np.float32)), tiny.masters(config)
    )


@functools.cache
def check_of(engine):
    return WeightCheck(engine, make_mesh(MeshConfig()))


def refitted(format="int8", config=EXPERTS):
    """An engine's check, the new masters, and what was served before and after them."""
    engine = served.engine_of(format, config)
    old, new = tiny.masters(config), moved(config)
    return check_of(engine), new, engine.sync(old, 0), engine.sync(new, 1)


def with_layer(serving, number, **changes):
    """What serves, with changed weights in one layer."""
    layers = list(serving.weights["layers"])
    layers[number] = layers[number] | changes
    return dataclasses.replace(serving, weights=serving.weights | {"layers": tuple(layers)})


def of_experts(change, matrix):
    """A matrix of experts, its arrays changed along their first axis."""
    return jax.tree.map(lambda leaf: jnp.asarray(change(np.array(leaf))), matrix)


@pytest.mark.parametrize(
    "format",
    [format if format in ("int8", "int4") else pytest.param(format, marks=pytest.mark.slow) for format in formats],
)
def test_what_a_sync_gives_is_right_in_every_format_and_what_it_gave_before_is_not(format):
    check, masters, before, after = refitted(format)
    check(masters, after, 1)
    with pytest.raises(RunError, match="self-check of served weights: they are of version 0, expected 1"):
        check(masters, before, 1)
    stale = dataclasses.replace(before, version=after.version)
    with pytest.raises(RunError, match=f"away from the trainer's in format {format}, expected at most 0.001"):
        check(masters, stale, 1)


def test_a_layer_that_stayed_stale_is_named():
    check, masters, before, after = refitted()
    old = before.weights["layers"][1]
    with pytest.raises(RunError, match="_proj of layer 1"):
        check(masters, with_layer(after, 1, **old), 1)
    # one matrix is enough
    with pytest.raises(RunError, match=r"at version 1 o_proj of layer 1 is 0\.00"):
        check(masters, with_layer(after, 1, o_proj=old["o_proj"]), 1)


def test_a_norm_and_a_router_that_stayed_stale_are_named():
    check, masters, before, after = refitted()
    for name in ("input_layernorm", "router"):
        with pytest.raises(RunError, match=f"{name} of layer 0"):
            check(masters, with_layer(after, 0, **{name: before.weights["layers"][0][name]}), 1)


def test_swapped_experts_are_named():
    check, masters, _, after = refitted()
    matrix = after.weights["layers"][0]["experts_up_proj"]
    swapped = of_experts(lambda leaf: leaf[[0, 2, 1, 3]], matrix)
    with pytest.raises(RunError, match=r"experts_up_proj of layer 0, expert [12] is [12](\.\d)? of its norm away"):
        check(masters, with_layer(after, 0, experts_up_proj=swapped), 1)


def test_one_expert_that_stayed_stale_is_named():
    check, masters, before, after = refitted()

    def partly(new, old):
        return jnp.concatenate([new[:3], old[3:]])

    mixed = jax.tree.map(partly, *(of.weights["layers"][1]["experts_down_proj"] for of in (after, before)))
    with pytest.raises(RunError, match="experts_down_proj of layer 1, expert 3"):
        check(masters, with_layer(after, 1, experts_down_proj=mixed), 1)


@pytest.mark.parametrize(("factor", "size"), [(2.0, "0.[12]"), (float("nan"), "inf")])
def test_one_garbled_scale_of_many_is_named(factor, size):
    check, masters, _, after = refitted("w8a8", DENSE)
    matrix = after.weights["layers"][0]["up_proj"]
    garbled = dataclasses.replace(matrix, scale=matrix.scale.at[5].multiply(factor))
    with pytest.raises(RunError, match=f"up_proj of layer 0 is {size}"):
        check(masters, with_layer(after, 0, up_proj=garbled), 1)


def test_layers_in_another_order_are_found():
    check, masters, _, after = refitted()
    turned = dataclasses.replace(after, weights=after.weights | {"layers": after.weights["layers"][::-1]})
    with pytest.raises(RunError, match=r"of layer [01](, expert \d)? is [12](\.\d)? of its norm away"):
        check(masters, turned, 1)


@dataclasses.dataclass(frozen=True)
class Doubled(Grouped):
    """A format whose decode does not fit its encode."""

    @property
    def name(self):
        return "doubled"

    def decode(self, codes, dtype, axis):
        return 2 * super().decode(codes, dtype, axis)


def test_a_format_that_does_not_give_back_what_it_stored_is_named():
    engine = served.engine_of(Doubled(bits=4), DENSE)
    with pytest.raises(RunError, match=r"self-check of the serving format: .* in format doubled is 1"):
        check_of(engine)(tiny.masters(DENSE), engine.sync(tiny.masters(DENSE), 0), 0)


def test_weights_that_are_far_from_where_they_began_are_no_fault():
    engine = served.engine_of("int8", EXPERTS)
    far = jax.tree.map(lambda x: 1000 * x + 3, tiny.masters(EXPERTS))
    check_of(engine)(far, engine.sync(far, 5), 5)


@pytest.mark.slow
def test_mismatch_that_is_added_on_purpose_is_no_fault():
    engine = served.engine_of("int8", DENSE, mismatch=(("weight_noise", 0.5), ("rounded_masters", True)))
    check_of(engine)(tiny.masters(DENSE), engine.sync(tiny.masters(DENSE), 3), 3)


def test_sizes_are_the_norms_of_the_differences():
    """Against NumPy: what one matrix lost, of its norm; an estimate from sixteen numbers."""
    engine = served.engine_of("float32", DENSE)
    masters = tiny.masters(DENSE)
    after = engine.sync(masters, 0)
    compare = Comparison(engine.conversion, engine.mesh, make_mesh(MeshConfig()))
    sizes, expected = [], []
    for seed in range(8):
        error = 0.1 * np.random.default_rng(seed).normal(size=(DENSE.hidden_size, DENSE.intermediate_size))
        master = np.asarray(masters["layers"]["gate_proj"][1])
        matrix = after.weights["layers"][1]["gate_proj"]
        changed = jax.tree.map(lambda leaf, error=error: leaf + error.astype(np.float32), matrix)
        found = compare(masters, with_layer(after, 1, gate_proj=changed), 0).served
        assert found[:3] == ("gate_proj", 1, None)
        sizes.append(found.size)
        expected.append(np.linalg.norm(error) / np.linalg.norm(master))
    assert np.sqrt(np.mean(np.square(sizes))) == pytest.approx(np.mean(expected), rel=4 / np.sqrt(2 * 8 * 16))


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_devices_may_share_masters_and_what_is_served(apart):
    devices = jax.devices()
    training = make_mesh(MeshConfig(fsdp=2, expert=2), devices[:4])
    serving = serving_mesh(make_mesh(MeshConfig(data=4), devices[4:] if apart else devices[:4]), 2)
    sync = make_sync(EXPERTS, formats["int8"], serving, training)
    places = build.shardings(training, build.logical_axes(EXPERTS))
    masters, before = (jax.device_put(tree, places) for tree in (moved(EXPERTS), tiny.masters(EXPERTS)))
    compare = Comparison(sync.conversion, serving, training)
    assert compare(masters, sync(masters, 1), 1).served.size <= SERVED_TOLERANCE / 10
    assert compare(masters, sync(before, 1), 1).served.size > SERVED_TOLERANCE


def test_a_deep_model_whose_layers_are_looped_over_is_compared_too():
    deep = dataclasses.replace(DENSE, num_layers=8)
    engine = served.engine_of("w8a8", deep)
    assert engine.decoder.loops
    check, masters = check_of(engine), tiny.masters(deep)
    serving = engine.sync(masters, 0)
    check(masters, serving, 0)
    turned = jax.tree.map(lambda leaf: leaf[::-1], serving.weights["layers"])
    with pytest.raises(RunError, match="of layer"):
        check(masters, dataclasses.replace(serving, weights=serving.weights | {"layers": turned}), 0)


def test_what_should_be_zero_and_is_not_is_found():
    """Qwen2's biases are, before anything is learned."""
    config = served.OTHER
    masters = tiny.masters(config)
    zeros = masters | {"layers": masters["layers"] | {"q_bias": jnp.zeros_like(masters["layers"]["q_bias"])}}
    engine = served.engine_of("int8", config)
    check, after = check_of(engine), engine.sync(zeros, 0)
    check(zeros, after, 0)
    bias = after.weights["layers"][1]["q_bias"]
    with pytest.raises(RunError, match="q_bias of layer 1 is inf"):
        check(zeros, with_layer(after, 1, q_bias=bias + 1), 0)


# --- samples ---

G = 2


def samples(tokens, nats=40.0):
    """Responses of the prompt 9, with so many nats each."""
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones(tokens.shape, bool)
    return Rollout(
        tokens=np.concatenate([np.full((len(tokens), 1), 9, np.int32), tokens], axis=1),
        attention_mask=np.ones((len(tokens), tokens.shape[1] + 1), bool),
        response_mask=mask,
        rollout_logps=np.where(mask, -nats / tokens.shape[1], 0).astype(np.float32),
        temperature=np.ones(len(tokens), np.float32),
        versions=np.zeros(tokens.shape, np.int32),
        finished=np.ones(len(tokens), bool),
        log_mass=np.zeros(tokens.shape, np.float32),
    )


def test_long_responses_that_are_equal_end_a_run_and_short_ones_do_not():
    equal = [[1, 2], [1, 2], [3, 4], [5, 6]]
    SampleCheck().sampled(samples(equal, NEVER), G)
    with pytest.raises(RunError, match=r"two samples of one prompt are equal in 1 of 2 places.* exp\(-40\) or less"):
        SampleCheck().sampled(samples(equal), G)
    # those of two prompts are not compared
    SampleCheck().sampled(samples([[1, 2], [3, 4], [3, 4], [5, 6]]), G)


def test_a_batch_that_comes_again_ends_a_run_unless_the_iteration_does_too():
    check, batch = SampleCheck(), samples([[1, 2], [3, 4]])
    check.begins(4)
    check.sampled(batch, G)
    check.begins(4)
    check.sampled(batch, G)
    check.begins(5)
    with pytest.raises(RunError, match="that of the iteration before are equal in 2 of 2 places"):
        check.sampled(batch, G)


SMALL = dataclasses.replace(
    tiny.CONFIG,
    warm_start=dataclasses.replace(tiny.CONFIG.warm_start, steps=0),
    serving=dataclasses.replace(tiny.CONFIG.serving, format="float32"),
)


def test_a_seed_that_is_constant_ends_a_run(monkeypatch):
    stepper = Stepper(SMALL, Alternating())
    state, cursor = stepper.begin()
    _, following = stepper.sampler(state, cursor)
    with pytest.raises(RunError, match="self-check of random keys: two rounds of sampling in a row have the key"):
        stepper.sampler(state, dataclasses.replace(following, rollout_key=cursor.rollout_key))


def test_samples_that_share_a_key_end_a_run(monkeypatch):
    keys = dcjax.serving.rollout.sample_keys
    monkeypatch.setattr(dcjax.serving.rollout, "sample_keys", lambda key, samples: keys(key, 0 * samples))
    stepper = Stepper(SMALL, Alternating())
    with pytest.raises(RunError, match="self-check of samples: two samples of one prompt are equal"):
        stepper.sampler(*stepper.begin())


def test_a_sync_that_leaves_a_layer_stale_ends_a_run_at_once(monkeypatch):
    sync, kept = Qwen3Engine.sync, []

    def partly(self, params, version):
        serving = sync(self, params, version)
        kept.append(serving.weights["layers"][1])
        return with_layer(serving, 1, **kept[0])

    config = dataclasses.replace(SMALL, optimizer=dataclasses.replace(SMALL.optimizer, warmup_steps=0))
    stepper = Stepper(config, Alternating())
    monkeypatch.setattr(Qwen3Engine, "sync", partly)
    state, cursor, *_ = stepper.iterate(*stepper.begin())
    with pytest.raises(RunError, match=r"at version 1 \w+ of layer 1 is .* a layer left stale by a sync"):
        stepper.sampler(state, cursor)
    off = Stepper(dataclasses.replace(config, self_checks=False), Alternating())
    kept.clear()
    state, cursor, *_ = off.iterate(*off.begin())
    off.sampler(state, cursor)


# --- steps ---

METRICS = {
    "mismatch/prob_diff_mean": 0.001,
    "check/denominator_share": 1.0,
    "check/log_ratio": 0.0,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
}


def test_a_gap_may_grow_but_not_at_once_to_that_of_unrelated_policies():
    check, gap = StepCheck(SMALL), 0.0005
    for number in range(1, 9):
        check(number, METRICS | {"mismatch/prob_diff_mean": gap})
        gap = min(gap * (JUMP - 1), 0.9)
    check = StepCheck(SMALL)
    check(1, METRICS)
    with pytest.raises(RunError, match=r"at step 2 their probabilities differ by 0.3 .* at most 0.25 after 0.001"):
        check(2, METRICS | {"mismatch/prob_diff_mean": 0.3})
    with pytest.raises(RunError, match="self-check of sampled tokens: at step 1 "):
        StepCheck(SMALL)(1, METRICS | {"mismatch/prob_diff_mean": UNRELATED + 0.01})
    # nor is one judged that is added on purpose, until it jumps
    check = StepCheck(dataclasses.replace(SMALL, mismatch=MismatchConfig(logit_noise=1.0)))
    check(1, METRICS | {"mismatch/prob_diff_mean": 0.3})
    check(2, METRICS)
    with pytest.raises(RunError, match="at step 3"):
        check(3, METRICS | {"mismatch/prob_diff_mean": 0.3})
    # the one before is not known behind a checkpoint
    StepCheck(SMALL)(7, METRICS | {"mismatch/prob_diff_mean": 0.3})


@pytest.mark.parametrize("mismatch", [{"staleness": 1}, {"raw_logps": True}])
def test_a_gap_that_is_not_of_numerics_alone_is_not_judged(mismatch):
    config = dataclasses.replace(SMALL, mismatch=MismatchConfig(**mismatch))
    StepCheck(config)(1, METRICS | {"mismatch/prob_diff_mean": 0.3})


def with_updates(updates, **rollout):
    return dataclasses.replace(
        SMALL,
        optimizer=dataclasses.replace(SMALL.optimizer, updates=updates, warmup_steps=0),
        rollout=dataclasses.replace(SMALL.rollout, **rollout),
    )


def test_a_ratio_is_one_where_it_must_be_and_leaves_it_where_parameters_have_moved():
    recomputed = METRICS | {"staleness/prob_diff_max": 0.1}
    StepCheck(with_updates(1))(1, METRICS)
    with pytest.raises(RunError, match=r"the clip: at step 1 the log-ratio that it sees is up to 0\.01.* expected 0, "):
        StepCheck(with_updates(1))(1, METRICS | {"check/log_ratio": 0.01})
    with pytest.raises(RunError, match="expected more than 0, as the parameters have moved since"):
        StepCheck(with_updates(2))(1, recomputed)
    for nothing_moved in ({"learning_rate": 0.0}, {"grad_norm": 0.0}):
        StepCheck(with_updates(2))(1, recomputed | nothing_moved)
    ahead = StepCheck(with_updates(1, async_level=1))
    ahead(1, recomputed)
    with pytest.raises(RunError, match="at step 2 the log-ratio"):
        ahead(2, recomputed)


def planted(monkeypatch, config):
    """An iteration by a step that is made anew, of what is patched."""
    monkeypatch.setattr(build, "_compile_train_step", build._compile_train_step.__wrapped__)
    stepper = Stepper(config, Alternating())
    return stepper.iterate(*stepper.begin())


def test_a_normaliser_of_each_microbatch_ends_a_run(monkeypatch):
    whole = dcjax.rl.step._sum_present

    def of_microbatch(*arguments):
        total, denominator = whole(*arguments)
        return type(whole(*arguments))(total / denominator, denominator / denominator)

    monkeypatch.setattr(dcjax.rl.step, "_sum_present", of_microbatch)
    with pytest.raises(RunError, match=r"the loss's normaliser: at step 1 it is 0.0\d* of the whole minibatch's"):
        planted(monkeypatch, SMALL)


def test_old_log_probs_of_each_update_end_a_run(monkeypatch):
    loss = dcjax.rl.step._microbatch_loss

    def forgetting(spec, params, minibatch, microbatch, **settings):
        return loss(spec, params, minibatch._replace(old=None), microbatch, **settings)

    monkeypatch.setattr(dcjax.rl.step, "_microbatch_loss", forgetting)
    with pytest.raises(RunError, match="self-check of the clip: at step 1"):
        planted(monkeypatch, with_updates(2))


@pytest.mark.slow
def test_several_updates_are_right_as_they_are(monkeypatch):
    stepper = Stepper(with_updates(2), Alternating())
    metrics = stepper.iterate(*stepper.begin())[2]
    assert not [name for name in metrics if name.startswith("check/")]
