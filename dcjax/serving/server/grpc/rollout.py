"""Samples a `Rollout` through a server, as `serving.rollout.Sampling` does in the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import Ended, assemble, sample_keys
from dcjax.serving.scheduler import Samples
from dcjax.serving.server.contract import STOP
from dcjax.serving.server.grpc.client import Client, Request
from dcjax.serving.server.grpc.wire import Asked
from dcjax.spans import span
from dcjax.types import Rollout


class ServedSampling:
    """A batch of samples in progress at a server, with the face of `Sampling`.

    What a black box does not tell is not recorded: candidate tokens and experts.

    Args:
      client: of the server.
      engine: one with the server's limits, which checks what is asked for; it computes nothing.
      prompts: token ids, 1 to P each.
      samples_per_prompt: G.
      temperature: of every sample.
      key: a typed PRNG key; sample i is drawn with fold_in(key, i), as in the process.
    """

    def __init__(
        self,
        client: Client,
        engine: Qwen3Engine,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        temperature: float,
        key: jax.Array,
    ):
        self._client, self._engine, self._prompts, self._temperature = client, engine, prompts, temperature
        self._rows = np.repeat(np.arange(len(prompts), dtype=np.int32), samples_per_prompt)
        self._keys = np.asarray(sample_keys(key, np.arange(len(self._rows))))
        self._requests = engine.make_requests(self._keys, temperatures=temperature)
        shape = len(self._keys), engine.max_response_length
        self._samples = Samples(
            tokens=np.zeros(shape, np.int32),
            logps=np.zeros(shape, np.float32),
            versions=np.full(shape, -1, np.int32),
            log_mass=np.zeros(shape, np.float32),
            candidate_tokens=np.zeros((*shape, 0), np.int32),
            sampler_tokens=None,
            sampler_logps=None,
            experts=None,
            lengths=np.zeros(len(self._keys), np.int32),
        )

    def as_they_end(self, version: int) -> Iterator[Ended]:
        """Yields every sample once, soon after it has ended.

        Args:
          version: of the oldest weights to sample from.

        Raises:
          Interrupted: the server does not answer.
          RunError: it refuses.
        """
        samples, batches = self._samples, self._client.sample(self._asked(version))
        while True:
            with span("decode"):
                batch = next(batches, None)
            if batch is None:
                return
            batch.sort(key=lambda pair: pair[0])
            for row, response in batch:
                columns = slice(len(response.tokens))
                samples.tokens[row, columns] = response.tokens
                samples.logps[row, columns] = response.answer.log_probs
                samples.versions[row, columns] = response.answer.versions
                samples.lengths[row] = len(response.tokens)
            yield Ended(
                samples=np.array([row for row, _ in batch], int),
                responses=[np.array(response.tokens, np.int32) for _, response in batch],
                finished=np.array([response.answer.finish_reason == STOP for _, response in batch], bool),
            )

    def rollout(self) -> Rollout:
        """All samples, on the host."""
        width = self._engine.max_prompt_length
        return assemble(self._prompts, self._rows, self._requests, self._samples, None, width)

    def _asked(self, version: int) -> list[Request]:
        engine = self._engine
        return [
            Request(
                prompt=self._prompts[row],
                max_tokens=engine.max_response_length,
                asked=Asked(
                    seed=high << 32 | low,
                    temperature=self._temperature,
                    top_k=0,
                    top_p=1.0,
                    stop_token_ids=tuple(engine.end_tokens),
                    log_probs=True,
                    weights_version=version,
                ),
            )
            for row, (high, low) in zip(self._rows.tolist(), self._keys.tolist(), strict=True)
        ]
