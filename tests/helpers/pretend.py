"""A run without arithmetic: NumPy draws its samples, and moves its state by what it is given.

Loop, records, checkpoints and signals are the real ones. What is drawn depends on every bit of the key and of the
norms, and what is moved on all of the state and the batch, so that a run which is resumed from anything else ends
elsewhere.
"""

import zlib

import jax
import numpy as np
import optax

import dcjax.loop.evaluate
import dcjax.loop.rollouts
import dcjax.loop.transcripts
import dcjax.recipe.build
import dcjax.reporting.run_report
import dcjax.serving.engine
import dcjax.tools.suite.answers
from dcjax.recipe.forward import Scored
from dcjax.serving.rollout import Ended
from dcjax.serving.sync import ServingParams
from dcjax.types import Rollout


def sample_responses(engine, params, prompts, *, samples_per_prompt, temperature, key, **others):
    """Responses of 3 tokens and more, digits and signs, that end."""
    width, length = engine.max_prompt_length, engine.max_response_length
    prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    given = np.asarray(params.weights["norm"]).tobytes() + np.asarray(jax.random.key_data(key)).tobytes()
    rng = np.random.default_rng(zlib.crc32(given))
    mask = np.arange(length) < rng.integers(3, length, (len(prompts), 1))
    tokens = np.zeros((len(prompts), width + length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) : width] = prompt
    tokens[:, width:] = np.where(mask, rng.integers(4, 14, mask.shape), 0)
    lengths = np.array([[len(prompt)] for prompt in prompts])
    return Rollout(
        tokens=tokens,
        attention_mask=np.concatenate([np.arange(width) >= width - lengths, mask], axis=1),
        response_mask=mask,
        rollout_logps=np.where(mask, -rng.exponential(size=mask.shape), 0).astype(np.float32),
        temperature=np.full(len(prompts), temperature, np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        finished=np.ones(len(prompts), bool),
        log_mass=np.zeros(mask.shape, np.float32),
    )


class Sampling:
    """All samples end at once."""

    def __init__(self, engine, params, prompts, **settings):
        self._rollout = sample_responses(engine, params, prompts, **settings)

    def as_they_end(self, params):
        mask, finished = self._rollout.response_mask, self._rollout.finished
        rows = zip(self._rollout.tokens[:, -mask.shape[1] :], mask, strict=True)
        yield Ended(np.arange(len(mask)), [row[real] for row, real in rows], finished)

    def rollout(self):
        return self._rollout


def step(state, batch):
    """The state, moved, and the metrics that the loop itself reads."""
    seen = np.float32(zlib.crc32(np.asarray(batch.tokens).tobytes()) % 1009 / 1009)

    def moved(leaf):
        value = np.asarray(leaf)
        value = (value / 2 + seen).astype(value.dtype) if value.dtype.kind == "f" else value + 1
        return jax.device_put(value, leaf.sharding)

    history = (*state.history, state.params)[1:] if state.history else ()
    state = jax.tree.map(moved, state).replace(history=history)
    return state, {
        "loss": seen + np.sum(batch.rewards),
        "reward": np.mean(batch.rewards),
        "response_length": np.mean(np.sum(batch.response_mask, axis=1)),
        "grad_norm": np.asarray(state.grad_norm_smoothed),
        "learning_rate_scale": np.float32(1),
        "dual/multiplier": np.asarray(optax.tree.get(state.opt_state, "multiplier")),
        "dual/discrepancy": seen,
        "dual/budget": np.float32(0),
        "nonfinite_at": np.int32(-1),
        "mismatch/prob_diff_mean": seen / 1009,
        "check/denominator_share": np.float32(1),
        "check/log_ratio": np.float32(0),
    }


def score(config, mesh, params, rollout, *, replays):
    """The sampler's own log-probs."""
    return Scored(np.where(rollout.response_mask, rollout.rollout_logps, 0.0), None)


def install_samples(patch):
    """Until the patch is undone, engines only pretend."""
    patch.setattr(dcjax.tools.suite.answers, "sample_responses", sample_responses)
    for module in (dcjax.loop.rollouts, dcjax.loop.evaluate):
        patch.setattr(module, "Sampling", Sampling)
    patch.setattr(dcjax.serving.engine, "make_sync", lambda *settings, **more: ServingParams)
    patch.setattr(dcjax.loop.rollouts, "WeightCheck", lambda *of_what: lambda *weights: None)


def install(patch):
    """Until the patch is undone, trainers only pretend, and draw no picture of what they did."""
    install_samples(patch)
    patch.setattr(dcjax.reporting.run_report, "draw_curves", lambda *of_the_run: b"picture")
    patch.setattr(dcjax.reporting.run_report, "draw_panels", lambda *of_the_run: [])
    patch.setattr(dcjax.recipe.build, "compile_train_step", lambda config, mesh: step)
    patch.setattr(dcjax.loop.transcripts, "score", score)
