"""Where a run's rollouts come from: the engine in this process, or a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax

from dcjax.errors import RunError
from dcjax.loop.run_directory import identity
from dcjax.loop.self_checks import WeightCheck
from dcjax.loop.setup import Setup
from dcjax.recipe.engine import contract_of
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.serving.rollout import Sampling
from dcjax.serving.scoring import Reading, read_hidden
from dcjax.serving.server.grpc.client import Client
from dcjax.serving.server.grpc.rollout import ServedSampling
from dcjax.serving.sync import ServingParams
from dcjax.types import Params, Rollout


class Rollouts(Protocol):
    """Samples of the policy as it is deployed."""

    def sync(self, params: Params, version: int) -> Any:
        """What serves these weights: (float32 masters, version) -> what `begin` and `as_they_end` take."""
        ...

    def begin(self, serving: Any, prompts: Sequence[Sequence[int]], key: jax.Array) -> Sampling | ServedSampling:
        """Begins to sample the responses of one iteration."""
        ...

    def read(self, serving: Any, rollout: Rollout) -> Reading:
        """What the whole distributions are made of that the responses were drawn from."""
        ...


@contextlib.contextmanager
def open_rollouts(setup: Setup) -> Iterator[Rollouts]:
    """Those that `rollout.engine` names, while the context lasts."""
    config = setup.config
    if config.rollout.engine == IN_PROCESS:
        yield InProcess(setup)
        return
    address = config.rollout.engine.removeprefix("grpc://")
    advice = f"dcjax serve {config.directory} --port {address.rpartition(':')[2]} starts it"
    with Client(address, patience=config.rollout.patience, advice=advice) as client:
        yield FromServer(setup, client)


class InProcess:
    """Rollouts of the engine in this process."""

    def __init__(self, setup: Setup):
        self._settings, self._engine, self._mesh = setup.config.rollout, setup.engines["deployed"], setup.mesh
        self._check = WeightCheck(self._engine, setup.mesh) if setup.config.self_checks else None

    def sync(self, params: Params, version: int) -> ServingParams:
        """As `Rollouts`.

        Raises:
          RunError: what serves are not these weights.
        """
        serving = self._engine.sync(params, version)
        if self._check is not None:
            self._check(params, serving, version)
        return serving

    def begin(self, serving: ServingParams, prompts: Sequence[Sequence[int]], key: jax.Array) -> Sampling:
        """As `Rollouts`."""
        settings = self._settings
        return Sampling(
            self._engine,
            serving,
            prompts,
            samples_per_prompt=settings.group_size,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            key=key,
        )

    def read(self, serving: ServingParams, rollout: Rollout) -> Reading:
        """As `Rollouts`."""
        return read_hidden(self._engine, serving, rollout, self._mesh)


class FromServer:
    """Rollouts of a server, which takes its weights from the run's checkpoints.

    Samples of an iteration come from the newest weights that were due to be saved before it, or from newer ones; each
    token carries the version that it came from.
    """

    def __init__(self, setup: Setup, client: Client):
        self._setup, self._client, self._checked = setup, client, False

    def sync(self, params: Params, version: int) -> int:
        """The version that is asked for: the newest checkpoint's at that time."""
        del params
        return version - version % self._setup.config.checkpoint.every

    def begin(self, serving: int, prompts: Sequence[Sequence[int]], key: jax.Array) -> ServedSampling:
        """As `Rollouts`.

        Raises:
          Interrupted: the server does not answer.
          RunError: it serves something else.
        """
        self._check_contract()
        settings = self._setup.config.rollout
        return ServedSampling(
            self._client,
            self._setup.engines["deployed"],
            prompts,
            samples_per_prompt=settings.group_size,
            temperature=settings.temperature,
            key=key,
        )

    def read(self, serving: int, rollout: Rollout) -> Reading:
        """Refused when the run is configured."""
        raise NotImplementedError("a server tells no whole distributions")

    def _check_contract(self) -> None:
        if self._checked:
            return
        setup, theirs = self._setup, self._client.contract()
        config, run = setup.config, identity(setup.config.directory)
        ours = contract_of(config.serving, config.rollout, config.task, setup.end_tokens, run=run, step=theirs.step)
        if differing := ours.differences(theirs):
            raise RunError(
                f"rollout.engine {config.rollout.engine} serves another policy: {differing}; dcjax serve "
                f"{config.directory} serves this run's"
            )
        self._checked = True
