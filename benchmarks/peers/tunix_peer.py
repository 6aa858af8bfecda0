"""tunix's `GRPOLearner` with its own sampler: the whole step.

A batch is decoded until its longest response has ended, with all its rows; so shorter ones are cut afterwards. Rows are
padded to the limit, as the learner does. Its sequence packing cannot serve here: rows are kept apart only in its flash
attention, which is for TPUs, and an update follows after a fixed number of packs, not after those of one batch.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work  # pyrefly: ignore[missing-import]
from flax import nnx
from tunix.models.qwen3 import model as qwen3  # pyrefly: ignore[missing-import]
from tunix.models.qwen3 import params as qwen3_params  # pyrefly: ignore[missing-import]
from tunix.rl import rl_cluster  # pyrefly: ignore[missing-import]
from tunix.rl.grpo import grpo_learner  # pyrefly: ignore[missing-import]
from tunix.rl.rollout.base_rollout import RolloutConfig  # pyrefly: ignore[missing-import]

MICROBATCH_PROMPTS = 2
"""Prompts whose responses go through one forward and backward pass."""


class CharacterTokenizer:
    """A character a token; without a beginning token, which would double the length that prompts are padded to."""

    def encode(self, characters: str) -> list[int]:
        """Token ids."""
        return work.tokens_of(characters)

    def decode(self, tokens: list[int]) -> str:
        """Characters."""
        return work.text(tokens)

    def bos_id(self) -> None:
        """None."""

    def eos_id(self) -> int:
        """Never sampled."""
        return work.NO_TOKEN

    def pad_id(self) -> int:
        """No token, but one that finds a row of the embedding: the last."""
        return -1


def load_model(folder: Path, mesh: jax.sharding.Mesh) -> qwen3.Qwen3:
    """The model that dcjax wrote."""
    fields = json.loads((folder / "config.json").read_text())
    config = qwen3.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=fields["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
    )
    return qwen3_params.create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)


def logits(model: qwen3.Qwen3, tokens: np.ndarray) -> jax.Array:
    """Of every column."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return model(jnp.asarray(tokens), positions, None, jnp.tril(jnp.ones((rows, length, length), bool)))[0]


def make_cluster(model: qwen3.Qwen3, mesh: jax.sharding.Mesh) -> rl_cluster.RLCluster:
    """Training and sampling from the same parameters on one device; nothing written, evaluated or shown."""
    adamw = optax.adamw(work.LEARNING_RATE, work.BETA1, work.BETA2, work.EPSILON, weight_decay=0.0)
    return rl_cluster.RLCluster(
        actor=model,
        tokenizer=CharacterTokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(work.MAX_GRAD_NORM), adamw),
                mini_batch_size=work.PROMPTS,
                train_micro_batch_size=MICROBATCH_PROMPTS,
                rollout_micro_batch_size=work.PROMPTS,
                compute_logps_micro_batch_size=work.PROMPTS,
                eval_every_n_steps=1_000_000,
                max_steps=1_000_000,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=work.RESPONSE_LENGTH,
                max_prompt_length=work.PROMPT_LENGTH,
                kv_cache_size=work.PROMPT_LENGTH + work.RESPONSE_LENGTH,
                temperature=1.0,
            ),
        ),
    )


def main() -> None:
    """Answers until its input ends."""
    folder = Path(sys.argv[1])
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = load_model(folder / "model", mesh)
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax", "optax")}
    about = {"versions": versions, "logit_error": work.check_logits(folder, lambda tokens: logits(model, tokens))}
    cluster, loop = make_cluster(model, mesh), work.Loop()
    lengths, generate = work.lengths(folder), cluster.generate

    def generate_and_cut(*args, **kwargs):
        output = generate(*args, **kwargs)
        tokens = work.cut(output.tokens, lengths)
        return dataclasses.replace(output, tokens=tokens, text=[work.text(response) for response in tokens])

    rollout = cluster.generate = work.Timed(generate_and_cut)

    def leaves() -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param))

    def batches():
        texts = [work.text(prompt) for prompt in work.prompts(folder)]
        for number in range(1_000_000):
            jax.block_until_ready(leaves())
            loop.hold()
            # the sampler draws the same numbers in every call with the same seed
            cluster.cluster_config.rollout_config.seed = jax.random.key(number)
            yield {"prompts": texts}

    def rewards(prompts, completions, **kwargs):
        return [work.reward(work.tokens_of(completion)) for completion in completions]

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=work.GROUP_SIZE, num_iterations=1, beta=0.0, epsilon=work.CLIP
        ),
        reward_fns=rewards,
    )
    loop.start(lambda: learner.train(batches()))
    work.serve(
        about,
        step=loop.step,
        rollout=rollout,
        sampled=lambda output: output.tokens,
        parameters=lambda: [np.array(leaf) for leaf in leaves()],
        lengths=lengths,
    )


if __name__ == "__main__":
    main()
