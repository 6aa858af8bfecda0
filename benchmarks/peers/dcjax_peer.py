"""dcjax, as `dcjax train` runs it: sync, rollout, rewards, train step, metrics on the host."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import jax
import model  # pyrefly: ignore[missing-import]
import numpy as np
import work  # pyrefly: ignore[missing-import]

from dcjax.cli.allocator import keep_freed_memory
from dcjax.models import forward, load_hf
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.serving.rollout import sample_responses
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Batch, Rollout

CONFIG = model.config(slots=32, steps_per_call=work.RESPONSE_LENGTH)


class Trainer:
    """The state between steps."""

    def __init__(self, folder: Path):
        mesh = make_mesh(CONFIG.mesh)
        self._prompts = work.prompts(folder)
        self._engine = build.build_engine(CONFIG, mesh, [work.NO_TOKEN])
        self._train_step = build.compile_train_step(CONFIG, mesh)
        params = load_hf(folder / "model", mesh=mesh)[1]
        self.state = build.initial_state(CONFIG, mesh, build_optimizer(CONFIG), params)
        self.rollout = work.Timed(sample_responses)
        self._number = 0

    def step(self) -> None:
        """One RL step."""
        rollout = self.rollout(
            self._engine,
            self._engine.sync(self.state.params, self._number),
            self._prompts,
            samples_per_prompt=work.GROUP_SIZE,
            temperature=1.0,
            key=jax.random.key(self._number),
        )
        rewards = np.array([work.reward(response) for response in responses(rollout)], np.float32)
        batch = Batch.of(rollout, rewards=rewards, group_size=work.GROUP_SIZE)
        self.state, metrics = self._train_step(self.state, CONFIG.packing()(batch))
        build.metrics_to_host(metrics)
        self._number += 1


def responses(rollout: Rollout) -> np.ndarray:
    """The response tokens, [128, 64]."""
    return np.asarray(rollout.tokens)[:, work.PROMPT_LENGTH :]


def main() -> None:
    """Answers until its input ends."""
    keep_freed_memory()
    trainer = Trainer(Path(sys.argv[1]))
    apply = jax.jit(forward, static_argnums=0)
    versions = {name: importlib.metadata.version(name) for name in ("dcjax", "jax", "flax", "optax")}
    logit_error = work.check_logits(Path(sys.argv[1]), lambda tokens: apply(CONFIG.model, trainer.state.params, tokens))
    work.serve(
        {"versions": versions, "logit_error": logit_error},
        step=trainer.step,
        rollout=trainer.rollout,
        sampled=responses,
        parameters=lambda: [np.array(leaf) for leaf in jax.tree.leaves(trainer.state.params)],
    )


if __name__ == "__main__":
    main()
