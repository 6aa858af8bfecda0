"""dcjax, as `dcjax train` runs it: sync, rollout, rewards, train step, metrics on the host."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import partial
from pathlib import Path

import jax
import model  # pyrefly: ignore[missing-import]
import numpy as np
import work  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import forward, load_hf
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.serving.rollout import sample_responses
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Batch, Rollout

SLOTS = 32
STEPS_PER_CALL, RAGGED_STEPS_PER_CALL = work.RESPONSE_LENGTH, 4
"""Tokens between two looks at which slots are free; where responses are ragged, slots become free at any time."""


class Trainer:
    """The state between steps."""

    def __init__(self, folder: Path):
        lengths = work.lengths(folder)
        ragged = lengths.min() < work.RESPONSE_LENGTH
        config = model.config(slots=SLOTS, steps_per_call=RAGGED_STEPS_PER_CALL if ragged else STEPS_PER_CALL)
        mesh = make_mesh(config.mesh)
        self._prompts = work.prompts(folder)
        self._engine = build.build_engine(config, mesh, [work.NO_TOKEN])
        # a request has a limit of its own, of which a run makes no use
        self._engine.make_requests = partial(self._engine.make_requests, limits=lengths)
        self._train_step, self._packing = build.compile_train_step(config, mesh), config.packing()
        params = load_hf(folder / "model", mesh=mesh)[1]
        self.state = build.initial_state(config, mesh, build_optimizer(config), params)
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
        self.state, metrics = self._train_step(self.state, self._packing(batch))
        build.metrics_to_host(metrics)
        self._number += 1


def responses(rollout: Rollout) -> list[np.ndarray]:
    """The tokens of the 128 responses."""
    tokens = np.asarray(rollout.tokens)[:, work.PROMPT_LENGTH :]
    return [row[mask] for row, mask in zip(tokens, np.asarray(rollout.response_mask), strict=True)]


def main() -> None:
    """Answers until its input ends."""
    keep_freed_memory()
    folder = Path(sys.argv[1])
    trainer = Trainer(folder)
    apply = jax.jit(forward, static_argnums=0)
    versions = {name: importlib.metadata.version(name) for name in ("dcjax", "jax", "flax", "optax")}
    logit_error = work.check_logits(folder, lambda tokens: apply(model.MODEL, trainer.state.params, tokens))
    work.serve(
        {"versions": versions, "logit_error": logit_error},
        step=trainer.step,
        rollout=trainer.rollout,
        sampled=responses,
        parameters=lambda: [np.array(leaf) for leaf in jax.tree.leaves(trainer.state.params)],
        lengths=work.lengths(folder),
    )


if __name__ == "__main__":
    main()
