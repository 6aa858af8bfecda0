"""`dcjax serve SOURCE`: a policy behind a server, as it was trained to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.run_directory import locate
from dcjax.recipe.config import check_positions
from dcjax.recipe.engine import contract_of, make_engine
from dcjax.recipe.forward import score
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.continuous import rehearse
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import CHAT, Contract, read_contract
from dcjax.serving.server.life import Serving, run_server
from dcjax.serving.server.served import Served, ServerConfig
from dcjax.serving.sync import ServingParams
from dcjax.tools.open_model import OpenedModel, open_model
from dcjax.types import Params, Rollout

FOLDER_LENGTH = 1024
"""Tokens of a prompt, and of a response, at most, where a Hugging Face folder says nothing of them."""

NUMERICS = ("format", "kv_cache", "keep")
SAMPLING = ("temperature", "top_k", "top_p", "max_prompt_length", "max_response_length")
"""The fields of a contract that are of the recipe's sections `serving` and `rollout`."""


def serve(served: Served, server: ServerConfig, protocol: str, told: Callable[[str], None]) -> None:
    """Serves until the process is told to stop.

    Args:
      served: from `load_served`.
      server: how it is reached.
      protocol: grpc or http.
      told: called with lines on what is served and where.

    Raises:
      RunError: the address cannot be listened at, what serves this protocol is not installed, or the engine fails.
    """
    contract = served.contract

    def ready(port: int) -> None:
        step = "" if contract.step is None else f" step {contract.step}"
        newer = "" if served.newer is None else ", and newer checkpoints as they are saved"
        told(f"{served.name}{step} in {contract.format}, {served.engine.slots} slots{newer}")
        told(f"listening at {protocol}://{server.host}:{port}")

    run_server(_serving_by(protocol), served, server, ready)


def _serving_by(protocol: str) -> Serving:
    if protocol == "grpc":
        from dcjax.serving.server.grpc.server import serving

        return serving
    try:
        from dcjax.serving.server.http.server import serving
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is needed to serve over HTTP: pip install 'dcjax[serve]'") from None
    return serving


def load_served(
    source: Path,
    *,
    serving: Mapping[str, Any],
    lengths: Mapping[str, Any],
    other_format: bool = False,
    devices: int = 1,
    recipe_code: bool = True,
    protocol: str = "grpc",
    train_logprobs: bool = False,
) -> Served:
    """Loads a policy and compiles the programs that serve it.

    Args:
      source: a run directory, whose newer checkpoints replace the one that is served; one of its checkpoints; or a
        Hugging Face folder.
      serving: fields of the recipe's section; those that are None are as trained.
      lengths: `max_prompt_length` and `max_response_length` likewise.
      other_format: whether a format other than the one that the policy was trained for may be served.
      devices: how many share the model.
      recipe_code: whether code of a run's own may be executed.
      protocol: that it will be served by, whose programs are compiled.
      train_logprobs: whether the training policy is kept beside the served one, to tell what it gives to tokens.

    Raises:
      RunError: there is no such source, or it cannot be served so.
    """
    model = open_model(source, devices=devices, recipe_code=recipe_code)
    config, version = model.config, model.version
    try:
        trained = model.contract() if model.step is not None else read_contract(model.directory)
        section, limits = _sections(model, trained, _given(serving), _given(lengths))
        check_positions(config.model, limits)
        if protocol == "http":  # which keeps a prompt for each slot
            limits = replace(limits, prompts=section.slots)
    except ValueError as error:
        raise RunError(str(error)) from None
    run, step = (None, None) if trained is None else (trained.run, trained.step)
    contract = contract_of(section, limits, config.task, model.end_tokens, run=run, step=step)
    if trained is not None:  # a folder's task is nobody's
        contract = replace(contract, **{name: getattr(trained, name) for name in CHAT})
    if trained is not None and not other_format:
        _check_numerics(contract, trained, source)
    engine = make_engine(config.model, section, limits, config.mismatch, model.mesh, end_tokens=model.end_tokens)
    masters = model.params()
    params = engine.sync(masters, version)
    trainer = _Trainer(model, version, masters) if train_logprobs else None
    (rehearse if protocol == "http" else Qwen3Engine.rehearse)(engine, params)
    return Served(
        name=model.name,
        engine=engine,
        version=version,
        params=params,
        tokenizer=model.tokenizer,
        contract=contract,
        newer=None if model.step is None or locate(source)[1] is not None else _Newest(model, engine, trainer),
        prompts=limits.prompts,
        trainer=trainer,
    )


def _sections(
    model: OpenedModel, trained: Contract | None, serving: dict[str, Any], lengths: dict[str, Any]
) -> tuple[ServingConfig, RolloutConfig]:
    """The sections to serve by: those of the run, or what a folder's contract says, but for what is given."""
    numerics: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    if model.step is None and trained is None:
        sampling.update(max_prompt_length=FOLDER_LENGTH, max_response_length=FOLDER_LENGTH)
    elif model.step is None:
        numerics, sampling = ({name: getattr(trained, name) for name in names} for names in (NUMERICS, SAMPLING))
    sampling |= lengths
    return replace(model.config.serving, **numerics | serving), replace(model.config.rollout, **sampling)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_numerics(served: Contract, trained: Contract, source: Path) -> None:
    """Refuses numerics that the policy was not trained for."""
    for name in NUMERICS:
        ours, theirs = getattr(served, name), getattr(trained, name)
        if ours != theirs:
            raise RunError(
                f"--{name.replace('_', '-')} is {ours!r}, and {source} was trained to be served with {theirs!r}; leave "
                "the option out, or add --other-format to serve another policy than the one that was trained for"
            )


class _Trainer:
    """The training policy: the masters' own forward, for one sequence at a time."""

    def __init__(self, model: OpenedModel, version: int, params: Params):
        self._config, self._mesh = model.config, model.mesh
        self._version, self._params = version, params

    def replace(self, version: int, params: Params) -> None:
        """Reads with these masters from now on."""
        self._version, self._params = version, params

    def __call__(self, tokens: Sequence[int]) -> tuple[int, list[float]]:
        """The version of the masters, and the natural logs that they give to all tokens but the first."""
        count, version, params = len(tokens), self._version, self._params
        # a power of two, so that few programs serve all
        width = 1 << (count - 1).bit_length()
        held, real = np.zeros((1, width), np.int32), np.arange(width)[None] >= width - count
        held[0, width - count :] = tokens
        row = _unscored(held, real, real[:, 1:] & real[:, :-1])
        logps = score(self._config, self._mesh, params, row).logps[0, width - count :]
        if not np.isfinite(logps).all():
            raise RunError(f"the training policy of version {version} gives log-probs that are not finite")
        return version, logps.tolist()


def _unscored(tokens: np.ndarray, attention_mask: np.ndarray, response_mask: np.ndarray) -> Rollout:
    """Tokens at temperature 1 of which no sampler has told anything."""
    nothing = np.zeros(response_mask.shape, np.float32)
    return Rollout(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=response_mask,
        rollout_logps=nothing,
        temperature=np.ones(len(tokens), np.float32),
        versions=np.zeros(response_mask.shape, np.int32),
        finished=np.zeros(len(tokens), bool),
        log_mass=nothing,
    )


class _Newest:
    """Looks into a run's directory for a checkpoint that is newer than the one that is served."""

    def __init__(self, model: OpenedModel, engine: Qwen3Engine, trainer: _Trainer | None):
        self._model, self._engine, self._trainer = model, engine, trainer
        self._checkpoints = Checkpoints(model.directory / "checkpoints")

    def __call__(self, version: int) -> tuple[int, ServingParams] | None:
        if (step := self._checkpoints.latest()) <= version:
            return None
        masters = self._model.params(step)
        served = self._engine.sync(masters, step)
        if self._trainer is not None:
            self._trainer.replace(step, masters)
        return step, served
