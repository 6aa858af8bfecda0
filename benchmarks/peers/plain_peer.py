"""The same step in plain JAX written for it (plain_jax.py), with the settings that were the fastest."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import model  # pyrefly: ignore[missing-import]
import numpy as np
import work  # pyrefly: ignore[missing-import]

sys.path.append(str(Path(__file__).parent.parent))
import plain_jax  # pyrefly: ignore[missing-import]

from dcjax.cli.allocator import keep_freed_memory
from dcjax.models import load_hf

MICROBATCH_SIZE, SLOTS = 8, 32
CONFIG = model.config(slots=SLOTS, steps_per_call=work.RESPONSE_LENGTH)


class Trainer:
    """The state between steps."""

    def __init__(self, folder: Path):
        self._prompts = jnp.array(work.prompts(folder), jnp.int32)
        self._rollout = plain_jax.make_rollout(
            CONFIG.model,
            group_size=work.GROUP_SIZE,
            slots=SLOTS,
            limit=work.RESPONSE_LENGTH,
            end_token=work.NO_TOKEN,
            noise_ahead=True,
        )
        self._update = plain_jax.make_update(CONFIG, microbatch_size=MICROBATCH_SIZE, skip_last_layer=True)
        self.state = plain_jax.initial_state(CONFIG.model, load_hf(folder / "model")[1])
        self.rollout = work.Timed(self._sample)
        self._number = 0

    def _sample(self):
        mask = np.ones(self._prompts.shape, bool)
        key = jax.random.key(self._number)
        return jax.device_get(self._rollout(self.state["params"], self._prompts, mask, key, np.float32(1)))

    def step(self) -> None:
        """One RL step."""
        responses, *_ = self.rollout()
        rewards = np.array([work.reward(response) for response in responses], np.float32)
        prompts = np.repeat(self._prompts, work.GROUP_SIZE, axis=0)
        batch = {
            "tokens": np.concatenate([prompts, responses], axis=1),
            "attention_mask": np.ones((len(prompts), prompts.shape[1] + responses.shape[1]), bool),
            "response_mask": np.ones(responses.shape, bool),
            "temperature": np.ones(work.ROWS, np.float32),
            "rewards": rewards,
            "group_rewards": np.repeat(rewards.reshape(-1, work.GROUP_SIZE), work.GROUP_SIZE, axis=0),
        }
        self.state, metrics = self._update(self.state, batch)
        jax.device_get(metrics)
        self._number += 1


def main() -> None:
    """Answers until its input ends."""
    keep_freed_memory()
    folder = Path(sys.argv[1])
    trainer = Trainer(folder)

    def logits(tokens):
        mask, params = np.ones(tokens.shape, bool), trainer.state["params"]
        hidden = plain_jax.hidden_states(CONFIG.model, params, tokens, mask, 0, False)
        return plain_jax.logits(CONFIG.model, params, hidden)

    work.serve(
        {
            "versions": {"jax": importlib.metadata.version("jax")},
            "logit_error": work.check_logits(folder, logits),
        },
        step=trainer.step,
        rollout=trainer.rollout,
        sampled=lambda result: result[0],
        parameters=lambda: [np.array(leaf) for leaf in jax.tree.leaves(trainer.state["params"])],
    )


if __name__ == "__main__":
    main()
