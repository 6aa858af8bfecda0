"""`dcjax serve SOURCE`: a policy behind a server, as it was trained to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.run_directory import locate
from dcjax.recipe.config import check_positions
from dcjax.recipe.engine import contract_of, make_engine
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.continuous import rehearse
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import Contract, read_contract
from dcjax.serving.server.life import Serving, run_server
from dcjax.serving.server.served import Served, ServerConfig
from dcjax.serving.sync import ServingParams
from dcjax.tools.open_model import OpenedModel, open_model

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
    contract = contract_of(section, limits, model.end_tokens, run=run, step=step)
    if trained is not None and not other_format:
        _check_numerics(contract, trained, source)
    engine = make_engine(config.model, section, limits, config.mismatch, model.mesh, end_tokens=model.end_tokens)
    params = engine.sync(model.params(), version)
    (rehearse if protocol == "http" else Qwen3Engine.rehearse)(engine, params)
    return Served(
        name=model.name,
        engine=engine,
        version=version,
        params=params,
        tokenizer=model.tokenizer,
        contract=contract,
        newer=None if model.step is None or locate(source)[1] is not None else _Newest(model, engine),
        prompts=limits.prompts,
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


class _Newest:
    """Looks into a run's directory for a checkpoint that is newer than the one that is served."""

    def __init__(self, model: OpenedModel, engine: Qwen3Engine):
        self._model, self._engine = model, engine
        self._checkpoints = Checkpoints(model.directory / "checkpoints")

    def __call__(self, version: int) -> tuple[int, ServingParams] | None:
        if (step := self._checkpoints.latest()) <= version:
            return None
        return step, self._engine.sync(self._model.params(step), step)
