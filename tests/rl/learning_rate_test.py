import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rl.learning_rate import (
    Surge,
    detect_surge,
    discrepancy_decay,
    dual_learning_rate,
    learning_rate_scale,
    length_decay,
    scale_by_sequence_ess,
)


def factors(tx, name=None, values=None, *, iterations=None):
    """What an update of ones becomes, update by update."""
    iterations = len(values) if iterations is None else iterations

    def advance(state, extra):
        updates, state = tx.update(jnp.ones(()), state, None, **extra)
        return state, updates

    extra = {} if name is None else {name: np.asarray(values, np.float32)}
    return np.asarray(jit(lambda: jax.lax.scan(advance, tx.init(jnp.ones(())), extra, length=iterations)[1])())


# --- a given period ---


def test_halving_by_hand():
    seen = factors(length_decay(3), iterations=14)
    assert seen.tolist() == [1, 1] + [0.5] * 3 + [0.25] * 3 + [0.125] * 3 + [np.float32(0.1)] * 3


@pytest.mark.parametrize(("period", "floor"), [(1, 0.0), (7, 0.1), (125, 0.0), (204, 0.1), (7, 1.0)])
def test_halving_by_its_formula(period, floor):
    iterations = np.arange(1, 450)
    expected = np.maximum(0.5 ** (iterations // period).astype(float), floor)
    np.testing.assert_allclose(
        factors(length_decay(period, floor=floor), iterations=449), expected, rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_update_of_an_iteration_has_the_same_factor(every):
    seen = factors(length_decay(2, every=every), iterations=4 * every)
    assert seen.tolist() == [1.0] * every + [0.5] * (2 * every) + [0.25] * every


# --- the period of a surge ---

FAST = Surge(recent=1, history=3)


def test_a_surge_by_hand():
    # the usual length is 10; 30 is over twice that, after an iteration 3 that is not over √2 times it: the onset is
    # 4, and the period 1.8 · 4 = 7.2, to the nearest 7. What comes later changes nothing.
    lengths = [10.0, 11.0, 10.0, 30.0, 30.0, 5.0, 5.0, 5.0, 99.0, 99.0, 99.0, 99.0, 99.0, 99.0]
    assert factors(length_decay(FAST), "response_length", lengths).tolist() == [1.0] * 6 + [0.5] * 7 + [0.25]


def test_the_state_tells_the_period_once_it_is_known():
    lengths = np.zeros((1, 60), np.float32)
    lengths[0, :5] = [10.0, 11.0, 10.0, 30.0, 30.0]
    assert compiled(FAST, 60)(lengths)[0, :5].tolist() == [0, 0, 0, 7, 7]
    assert int(optax.tree.get(length_decay(204).init(jnp.ones(())), "decay_period")) == 204


def test_a_surge_that_began_earlier_is_dated_back():
    # 8 steps at 10, then 15, 18, 21, …: the median of three exceeds 20 at step 12, and 15 was the first over 14.1
    lengths = [10.0] * 8 + [15.0, 18.0, 21.0, 24.0, 27.0]
    state = run(length_decay(Surge()), lengths)
    assert int(state.decay_period) == round(1.8 * 9)


def test_only_the_last_update_of_an_iteration_counts():
    tx = length_decay(FAST, every=2)
    lengths = np.stack([np.full(5, 99.0), [10.0, 11.0, 10.0, 30.0, 30.0]], axis=1).ravel()
    assert int(run(tx, lengths).decay_period) == 7


def run(tx, lengths):
    """The last state."""

    def advance(state, length):
        return tx.update(jnp.ones(()), state, None, response_length=length)[1], None

    return jit(lambda: jax.lax.scan(advance, tx.init(jnp.ones(())), jnp.asarray(lengths, jnp.float32))[0])()


def oracle(lengths, surge):
    """Iteration of detection and onset, from the definition; None without a surge."""
    for t in range(1, len(lengths) + 1):
        window = lengths[max(0, t - surge.history) : t]
        usual = np.median(window)
        if np.median(window[-surge.recent :]) > surge.ratio * usual:
            calm = [i for i in range(t - len(window) + 1, t + 1) if lengths[i - 1] <= np.sqrt(surge.ratio) * usual]
            return t, max(calm) + 1
    return None


@pytest.mark.parametrize(("recent", "ratio"), [(1, 2.0), (2, 1.25), (3, 1.5)])
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_against_the_definition(recent, ratio, lengths):
    surge = Surge(ratio=ratio, recent=recent, history=2 * recent + 3)
    found = oracle(lengths, surge)
    # of one size for all, so that it is compiled once
    padded = np.ones((1, 60), np.float32)
    padded[0, : len(lengths)] = lengths
    periods = np.asarray(compiled(surge, 60)(padded))[0, : len(lengths)]
    detected, period = (len(lengths) + 1, 0) if found is None else (found[0], round(surge.period_factor * found[1]))
    assert periods.tolist() == [0] * (detected - 1) + [max(period, 1)] * (len(lengths) - detected + 1)


@functools.cache
def compiled(surge, iterations):
    """Curves [N, iterations] -> the period after each iteration."""
    tx = length_decay(surge)

    def advance(state, length):
        state = tx.update(jnp.ones(()), state, None, response_length=length)[1]
        return state, optax.tree.get(state, "decay_period")

    def follow(curve):
        return jax.lax.scan(advance, tx.init(jnp.ones(())), curve, length=iterations)[1]

    return jit(jax.vmap(follow))


# --- curves of the published shape ---

ITERATIONS = 300
FEW, MANY = 50, 200
seeds = pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def flat(rng, noise):
    """800 to 1200 tokens, drifting by up to a quarter either way."""
    drift = np.exp(rng.uniform(-0.25, 0.25) * np.arange(ITERATIONS) / ITERATIONS)
    return rng.uniform(800, 1200) * drift * np.exp(noise * rng.standard_normal(ITERATIONS))


def surging(rng, noise, onset):
    """Flat, then within 3 to 7 iterations, the first of them `onset`, at 3000 to 4000 tokens."""
    risen = np.clip((np.arange(1, ITERATIONS + 1) - onset + 1) / rng.integers(3, 8), 0, 1)
    calm = flat(rng, 0.0)
    return (calm + (rng.uniform(3000, 4000) - calm) * risen) * np.exp(noise * rng.standard_normal(ITERATIONS))


def periods(curves, surge=None):
    """Iteration of detection (0: never) and the period, for each curve."""
    after = np.asarray(compiled(surge or Surge(), ITERATIONS)(np.asarray(curves, np.float32)))
    return np.where(after[:, -1] > 0, np.argmax(after > 0, axis=1) + 1, 0), after[:, -1]


@seeds
@pytest.mark.parametrize("onset", [90, 110])
def test_a_surge_of_the_published_shape_sets_the_period(onset, seeds):
    curves = [surging(np.random.default_rng(seed), noise, onset) for noise in (0.05, 0.1) for seed in range(seeds)]
    detected, period = periods(curves)
    assert (detected >= onset).all()
    assert (detected <= onset + 7).all()
    assert np.median(detected) <= onset + 3
    np.testing.assert_allclose(period, 1.8 * onset, rtol=0.1)


def growing(rng, noise):
    """Fourfold within 150 to 300 iterations."""
    return flat(rng, noise) * 4 ** (np.arange(ITERATIONS) / rng.uniform(150, 300))


def other_data(rng, noise):
    """Half as long again from some iteration on."""
    return flat(rng, noise) * np.where(np.arange(ITERATIONS) < rng.integers(30, 250), 1, rng.uniform(1.3, 1.5))


def outlier(rng, noise):
    """One batch five times as long."""
    return flat(rng, noise) * np.where(np.arange(ITERATIONS) == rng.integers(0, ITERATIONS), 5, 1)


def walking(rng, noise):
    """A slow random walk in logarithms."""
    return flat(rng, noise) * np.exp(0.02 * rng.standard_normal(ITERATIONS).cumsum())


@seeds
@pytest.mark.parametrize("curve", [flat, growing, other_data, outlier, walking])
def test_what_is_no_surge_is_not_taken_for_one(curve, seeds):
    curves = [curve(np.random.default_rng(seed), noise) for noise in (0.05, 0.1) for seed in range(seeds)]
    assert not periods(curves)[1].any()


def quickstart(rng):
    """8 to 33 tokens within 20 iterations, from the third on."""
    risen = np.clip((np.arange(1, ITERATIONS + 1) - 2) / 20, 0, 1)
    return (8 + 25 * risen) * np.exp(0.03 * rng.standard_normal(ITERATIONS))


def test_a_rise_from_the_start_has_nothing_usual_to_rise_from():
    """The quickstart's lengths rise from its first iterations on: it needs a given period, or a smaller ratio."""
    curves = [quickstart(np.random.default_rng(seed)) for seed in range(2 * FEW)]
    assert not periods(curves)[1].any()
    detected, period = periods(curves, Surge(ratio=1.5))
    assert ((detected >= 8) & (detected <= 22)).all()
    assert ((period >= 10) & (period <= 30)).all()


def test_a_slow_rise_after_a_flat_start_is_found_within_its_first_half():
    flat_start = np.full(28, 8.0)
    curves = [np.append(flat_start, quickstart(np.random.default_rng(seed)))[:ITERATIONS] for seed in range(2 * FEW)]
    detected, period = periods(curves)
    assert (detected >= 31).all()
    assert (detected <= 31 + 9).all()
    np.testing.assert_allclose(period, 1.8 * 31, rtol=0.1)


def test_detection_says_when_it_began():
    detect = jit(functools.partial(detect_surge, FAST))
    surged, onset = detect(np.array([11.0, 10.0, 30.0], "f"), np.int32(9))
    assert (bool(surged), int(onset)) == (True, 9)
    # of three, one was not yet seen
    surged, _ = detect(np.array([0.0, 10.0, 11.0], "f"), np.int32(2))
    assert not bool(surged)


# --- rates that follow the discrepancy ---


def test_discrepancy_decay_by_hand():
    # means of two: -, 4, 3 (best), 3.5 > 3.15: halve; -, 3.1, 3.5: halve; -, 4: halve; -, 4: to the floor
    tx = discrepancy_decay(window=2)
    after = factors(tx, "discrepancy", [4.0, 4.0, 2.0, 5.0, 3.1, 3.1, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    assert after.tolist() == [1.0] * 4 + [0.5] * 3 + [0.25] * 2 + [0.125] * 2 + [np.float32(0.1)] * 2


@pytest.mark.parametrize("window", [1, 2, 5])
@settings(max_examples=40)
@given(discrepancies=st.lists(st.integers(1, 64), max_size=40))
def test_discrepancy_decay_against_lists(window, discrepancies):
    scale, best, held, expected = 1.0, np.inf, [], []
    for discrepancy in discrepancies:
        expected.append(scale)
        held.append(discrepancy)
        if len(held) < window:
            continue
        mean = np.mean(held[-window:])
        if mean > 1.25 * best:
            scale, held = max(scale / 2, 0.1), []
        best = min(best, mean)
    padded = discrepancies + [1] * (40 - len(discrepancies))
    seen = np.asarray(discrepancy_follower(window)(np.asarray(padded, np.float32)))
    np.testing.assert_allclose(seen[: len(discrepancies)], expected, rtol=1e-6)


@functools.cache
def discrepancy_follower(window):
    tx = discrepancy_decay(window=window, tolerance=1.25)

    def advance(state, discrepancy):
        updates, state = tx.update(jnp.ones(()), state, None, discrepancy=discrepancy)
        return state, updates

    return jit(lambda discrepancies: jax.lax.scan(advance, tx.init(jnp.ones(())), discrepancies)[1])


def test_a_dual_learning_rate_by_hand():
    # s: 0 → 1 → 3 → 2 → 0, by 2 · (δ̄ − 1)
    seen = factors(dual_learning_rate(2.0, budget=1.0), "discrepancy", [1.5, 2.0, 0.5, -9.0, 1.0])
    np.testing.assert_allclose(seen, [1, 1 / 2, 1 / 4, 1 / 3, 1], rtol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_a_dual_learning_rate_against_projected_ascent(every):
    discrepancies = np.random.default_rng(0).uniform(0, 0.02, 60)
    slowdown, expected = 0.0, []
    for iteration in range(60 // every):
        expected += [1 / (1 + slowdown)] * every
        slowdown = min(max(slowdown + 200 * (discrepancies[iteration * every + every - 1] - 0.009), 0), 4)
    tx = dual_learning_rate(200.0, budget=0.009, max_slowdown=4.0, every=every)
    np.testing.assert_allclose(factors(tx, "discrepancy", discrepancies), expected, rtol=1e-4)


def test_a_large_discrepancy_leaves_a_tenth():
    seen = factors(dual_learning_rate(1e6, budget=0.001), "discrepancy", [0.5, 0.5, 0.5])
    np.testing.assert_allclose(seen, [1, 0.1, 0.1], rtol=1e-6)


# --- all of them ---


def test_after_adam_it_is_the_learning_rate():
    params, grads = {"w": np.array([1.0, -2.0], "f")}, {"w": np.array([0.3, -0.1], "f")}
    plain, slowed = optax.adam(0.01), optax.chain(optax.adam(0.02), length_decay(1, floor=0.5))
    expected, updates = jit(lambda: [tx.update(grads, tx.init(params), params)[0] for tx in (plain, slowed)])()
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


def test_the_scales_of_a_chain_are_multiplied():
    tx = optax.chain(optax.adam(0.1), dual_learning_rate(1.0, budget=0.0), length_decay(1))

    @jit
    def scales():
        before = tx.init(jnp.ones(2))
        _, after = tx.update(jnp.ones(2), before, jnp.ones(2), discrepancy=1.0)
        return [learning_rate_scale(state) for state in (before, after, optax.adam(0.1).init(jnp.ones(2)))]

    assert [float(scale) for scale in scales()] == [0.5, 0.125, 1.0]


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (length_decay(Surge()), "response_length"),
        (discrepancy_decay(), "discrepancy"),
        (dual_learning_rate(1.0, budget=0.1), "discrepancy"),
        (scale_by_sequence_ess(), "sequence_ess"),
    ],
)
def test_without_what_it_follows_it_cannot_update(tx, name):
    with pytest.raises(TypeError, match=f"extra argument '{name}'"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: length_decay(0), "decay_period 0"),
        (lambda: length_decay(10, every=0), "every 0"),
        (lambda: length_decay(10, floor=1.5), r"floor 1.5 must lie within \[0, 1\]"),
        (lambda: length_decay(10, floor=float("nan")), "floor nan"),
        (lambda: Surge(ratio=1.0), "ratio 1.0"),
        (lambda: Surge(period_factor=0.0), "period_factor 0.0"),
        (lambda: Surge(recent=0), "recent 0"),
        (lambda: Surge(recent=3, history=6), "history 6"),
        (lambda: discrepancy_decay(window=0), "window 0"),
        (lambda: discrepancy_decay(tolerance=0.5), "tolerance 0.5"),
        (lambda: discrepancy_decay(floor=-0.5), "floor -0.5"),
        (lambda: dual_learning_rate(-1.0, budget=0.1), "dual_lr -1.0"),
        (lambda: dual_learning_rate(1.0, budget=-0.1), "budget -0.1"),
        (lambda: dual_learning_rate(1.0, budget=0.1, max_slowdown=-1.0), "max_slowdown -1.0"),
        (lambda: dual_learning_rate(1.0, budget=0.1, every=0), "every 0"),
        (lambda: scale_by_sequence_ess(0.0), r"base 0.0 must lie within \(0, 1\]"),
        (lambda: scale_by_sequence_ess(1.5), "base 1.5"),
    ],
)
def test_values_out_of_range_are_quoted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_surge_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Surge().ratio = 3.0


@pytest.mark.parametrize(("base", "shares"), [(1.0, [1.0, 0.25, 0.01]), (0.55, [0.8, 0.55, 0.1])])
def test_an_update_is_scaled_by_the_root_of_its_own_effective_share(base, shares):
    adam = optax.chain(optax.adamw(0.1, weight_decay=0.1), scale_by_sequence_ess(base))
    plain = optax.adamw(0.1, weight_decay=0.1)
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    state, other = adam.init(params), plain.init(params)
    for share in shares:
        ours, state = adam.update(grads, state, params, sequence_ess=jnp.float32(share))
        theirs, other = plain.update(grads, other, params)
        # the learning rate of this update alone: moments are those of the plain chain, and weight decay is scaled too
        np.testing.assert_allclose(ours, min(1, share / base) ** 0.5 * theirs, rtol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "ess_scale"), min(1, share / base) ** 0.5, rtol=1e-6)
