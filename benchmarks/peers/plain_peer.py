"""The same step in plain JAX written for it (plain_jax.py), with the settings that were the fastest.

Where responses are ragged, a static batch decodes until its longest one has ended, and rows are trained on as they are.
"""

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

from dcjax.allocator import keep_freed_memory
from dcjax.models import load_hf

MICROBATCH_SIZE, SLOTS = 8, 32
CONFIG = model.config(slots=SLOTS, steps_per_call=work.RESPONSE_LENGTH)


class Trainer:
    """The state between steps."""

    def __init__(self, folder: Path):
        self._prompts = jnp.array(work.prompts(folder), jnp.int32)
        self._lengths = work.lengths(folder)
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
        inputs = (self.state["params"], self._prompts, mask, key, np.float32(1), self._lengths)
        return jax.device_get(self._rollout(*inputs))

    def step(self) -> None:
        """One RL step."""
        result = self.rollout()
        tokens, _, lengths = result
        rewards = np.array([work.reward(response) for response in responses(result)], np.float32)
        mask = np.arange(work.RESPONSE_LENGTH) < lengths[:, None]
        prompts = np.repeat(self._prompts, work.GROUP_SIZE, axis=0)
        batch = {
            "tokens": np.concatenate([prompts, tokens], axis=1),
            "attention_mask": np.concatenate([np.ones(prompts.shape, bool), mask], axis=1),
            "response_mask": mask,
            "temperature": np.ones(work.ROWS, np.float32),
            "rewards": rewards,
            "group_rewards": np.repeat(rewards.reshape(-1, work.GROUP_SIZE), work.GROUP_SIZE, axis=0),
        }
        self.state, metrics = self._update(self.state, batch)
        jax.device_get(metrics)
        self._number += 1


def responses(result: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """The tokens of the 128 responses."""
    tokens, _, lengths = result
    return work.cut(tokens, lengths)


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
        sampled=responses,
        parameters=lambda: [np.array(leaf) for leaf in jax.tree.leaves(trainer.state["params"])],
        lengths=work.lengths(folder),
    )


if __name__ == "__main__":
    main()
