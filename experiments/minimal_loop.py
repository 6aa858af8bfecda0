"""The whole of RL with dcjax on one page: a tiny Qwen3 in float32 learns arithmetic from what its int8 copy samples.

    python experiments/minimal_loop.py [--steps N] [--seed N]

It takes a minute or two on two cores, and prints a line a step. `dcjax train` takes the same steps in the same order,
and docs/walk.md follows one batch of it. What it has beside them is not here: configs, evaluation, logs, checkpoints,
several devices. In shapes, B is sequences (prompts × group size), P prompt columns, T response columns, and S = P + T.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.task import decode_responses, encode_prompts, supervised_batch
from dcjax.keys import make_key
from dcjax.models import ModelConfig, init_params, presets, token_logps
from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.dual import dual_ascent
from dcjax.rl.losses import clipped_surrogate, negative_log_likelihood
from dcjax.rl.step import ApplyFn, make_train_step
from dcjax.rl.transforms import chain, discrepancy_penalty, drop_zero_variance, group_relative_advantages
from dcjax.serving import Qwen3Engine
from dcjax.serving.rollout import sample_responses
from dcjax.types import Batch, Params, Rollout, Sequences, TrainState

TASK = ArithmeticTask(min_operations=2, max_operations=3, max_value=9)
BUDGET = 0.002  # tolerated δ̄, the mean of δ = |π_train − π_infer| over the sampled tokens
SHOWN = ("reward", "dual/discrepancy", "dual/multiplier")
ROWS = 64  # solutions that one step of the warm start imitates


def main(
    steps: int = 40,
    *,
    seed: int = 0,
    warm_start_steps: int = 300,
    prompts: int = 16,
    group_size: int = 8,
    task: ArithmeticTask = TASK,
    model: ModelConfig = presets["tiny"],
) -> list[float]:
    """Trains; returns the mean reward of each step's responses."""
    tokenizer = task.build_tokenizer(None)
    apply_fn = make_apply_fn(model)
    fresh = init_params(model, make_key(seed))
    params = warm_start(fresh, apply_fn, task, tokenizer, steps=warm_start_steps, seed=seed)

    # one optax chain holds all that the optimiser remembers: Adam's moments, and λ, which follows the gap
    ascent = dual_ascent(20.0, budget=BUDGET, init_value=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, b2=0.95), ascent)
    # the objective is a chain too: GRPO's advantages A, groups that teach nothing left out, then Ã = A − λ·δ
    objective = chain(group_relative_advantages(), drop_zero_variance(), discrepancy_penalty(probability_difference))
    surrogate = partial(clipped_surrogate, eps_low=0.2, eps_high=0.28)
    step_fn = make_train_step(apply_fn, tx, surrogate, objective, group_size=group_size, microbatch_size=16)
    train_step = jax.jit(step_fn, donate_argnums=0)
    state = initial_state(params, tx)

    # the policy that is deployed: the same weights, rounded to int8
    engine = Qwen3Engine(
        model,
        format="int8",
        slots=32,
        max_prompt_length=task.max_prompt_length,
        max_response_length=task.max_response_length,
        end_tokens=[tokenizer.eos_token_id],
        steps_per_call=8,
    )
    rollout_key, mean_rewards = make_key(seed + 1), []
    for step in range(steps):
        # 1. the newest weights, cast and quantised for the engine
        serving = engine.sync(state.params, version=step)
        # 2. B responses, and the log-probs that int8 sampled their tokens with
        problems = task.problems("train", seed, start=step * prompts, count=prompts)
        rollout = sample_responses(
            engine,
            serving,
            encode_prompts(tokenizer, problems),
            samples_per_prompt=group_size,
            temperature=1.0,
            key=jax.random.fold_in(rollout_key, step),
        )
        # 3. a reward for each response: 1 where its box holds the right number
        answers = [problem.answer for problem in problems for _ in range(group_size)]
        rewards = reward_responses(task, tokenizer, rollout, answers)
        # 4. one step of the trainer in float32: log-probs, gaps, advantages, gradient, Adam, and λ
        batch = Batch.of(rollout, rewards=rewards, group_size=group_size)
        state, metrics = train_step(state, batch)

        reward, gap, multiplier = (float(metrics[name]) for name in SHOWN)
        print(f"step {step + 1:3}  reward {reward:.3f}  δ̄ {gap:.5f}  λ {multiplier:.4f}", flush=True)
        mean_rewards.append(reward)
    return mean_rewards


def make_apply_fn(model: ModelConfig) -> ApplyFn:
    """The training policy: (params, batch) -> log-probs and entropies of the responses, [B, T], and no metrics."""

    def apply_fn(params: Params, batch: Batch):
        length = batch.response_mask.shape[1]
        scores = token_logps(
            model, params, batch.tokens, batch.attention_mask, response_length=length, temperature=batch.temperature
        )
        return scores.logps, scores.entropy, {}

    return apply_fn


def initial_state(params: Params, tx: optax.GradientTransformationExtraArgs) -> TrainState:
    """Step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), grad_norm_smoothed=jnp.zeros(()))


def warm_start(params: Params, apply_fn: ApplyFn, task: ArithmeticTask, tokenizer, *, steps: int, seed: int) -> Params:
    """Imitates solutions, so that some samples are right: the same step, with another loss and an empty chain."""
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps, alpha=0.1), b2=0.99)
    tx = optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(1.0), adam))
    step_fn = make_train_step(apply_fn, tx, negative_log_likelihood, chain(), group_size=1, microbatch_size=16)
    supervised_step, state = jax.jit(step_fn, donate_argnums=0), initial_state(params, tx)
    zeros, ones = np.zeros(ROWS, np.float32), np.ones(ROWS, np.float32)
    lengths = {"prompt_length": task.max_prompt_length, "response_length": task.max_response_length}
    for step in range(steps):
        # it learns to think aloud, and then to rarely do so: RL finds out that it pays
        share = 0.8 if step < 0.8 * steps else 0.15
        solutions = task.demonstrations(seed=seed, step=step, count=ROWS, scratchpad_fraction=share)
        examples = supervised_batch(tokenizer, solutions, **lengths)
        unsampled = np.zeros(examples["response_mask"].shape, np.float32)
        sequences = Sequences(**examples, rollout_logps=unsampled, temperature=ones)
        state, _ = supervised_step(state, Batch.of(sequences, rewards=zeros, group_size=1))
    return state.params


def reward_responses(task: ArithmeticTask, tokenizer, rollout: Rollout, answers: list[str]) -> np.ndarray:
    """Rewards [B] of sampled responses, whose tokens stand from column P on."""
    finished, columns = np.asarray(rollout.finished), rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -columns:], rollout.response_mask, strict=True)
    texts = decode_responses(tokenizer, [row[real] for row, real in rows], finished)
    scored = zip(texts, answers, finished.tolist(), strict=True)
    return np.array([task.reward(text, gold, finished=ended) for text, gold, ended in scored], np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="RL steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, problems and samples (%(default)s)")
    main(**vars(parser.parse_args()))
