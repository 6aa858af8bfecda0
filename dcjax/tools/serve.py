"""`dcjax serve SOURCE`: a policy behind a server, as it was trained to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.run_directory import locate
from dcjax.recipe.build import abstract_state, build_engine
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import Contract, read_contract
from dcjax.serving.server.server import Served, ServerConfig, run_server
from dcjax.serving.sync import ServingParams
from dcjax.tools.open_model import OpenedModel, is_folder, open_model

FOLDER_LENGTH = 1024
"""Tokens of a prompt, and of a response, at most, where a Hugging Face folder says nothing of them."""


def serve(served: Served, server: ServerConfig, told: Callable[[str], None]) -> None:
    """Serves until the process is told to stop.

    Args:
      served: from `load_served`.
      server: how it is reached.
      told: called with lines on what is served and where.

    Raises:
      RunError: the address cannot be listened at, or the engine fails.
    """
    contract = served.contract

    def ready(port: int) -> None:
        step = "" if contract.step is None else f" step {contract.step}"
        newer = "" if served.newer is None else ", and newer checkpoints as they are saved"
        told(f"{served.name}{step} in {contract.format}, {served.engine.slots} slots{newer}")
        told(f"listening at grpc://{server.host}:{port}")

    run_server(served, server, ready)


def load_served(
    source: Path,
    *,
    serving: Mapping[str, Any],
    lengths: Mapping[str, Any],
    other_format: bool = False,
    devices: int = 1,
    recipe_code: bool = True,
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

    Raises:
      RunError: there is no such source, or it cannot be served so.
    """
    model, trained = _open(source, serving, lengths, devices, recipe_code)
    contract = model.contract()
    if trained is not None and not other_format:
        _check_numerics(contract, trained, source)
    engine = build_engine(model.config, model.mesh, model.end_tokens)
    version = model.step or 0
    params = engine.sync(model.params(), version)
    engine.rehearse(params)
    return Served(
        name=model.name,
        engine=engine,
        version=version,
        params=params,
        tokenizer=model.tokenizer,
        contract=contract,
        newer=None if model.step is None or locate(source)[1] is not None else _Newest(model, engine),
        prompts=model.config.rollout.prompts,
    )


def _open(
    source: Path, serving: Mapping[str, Any], lengths: Mapping[str, Any], devices: int, recipe_code: bool
) -> tuple[OpenedModel, Contract | None]:
    """The model as it shall be served, and the contract that it was trained under where that is known."""
    opened = {"devices": devices, "recipe_code": recipe_code}
    if not is_folder(source):
        model = open_model(source, **opened)
        trained = model.contract()
        changed = _given(serving) or _given(lengths)
        return open_model(source, **opened, serving=serving, rollout=lengths) if changed else model, trained
    try:
        trained = read_contract(source)
    except ValueError as error:
        raise RunError(str(error)) from None
    if trained is None:
        defaults = dict.fromkeys(("max_prompt_length", "max_response_length"), FOLDER_LENGTH)
        return open_model(source, **opened, serving=serving, rollout=defaults | _given(lengths)), None
    as_trained = {name: getattr(trained, name) for name in ("format", "kv_cache", "keep")}
    sampled = ("temperature", "top_k", "top_p", "max_prompt_length", "max_response_length")
    model = open_model(
        source,
        **opened,
        serving=as_trained | _given(serving),
        rollout={name: getattr(trained, name) for name in sampled} | _given(lengths),
    )
    return model, trained


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_numerics(served: Contract, trained: Contract, source: Path) -> None:
    """Refuses numerics that the policy was not trained for."""
    for name in ("format", "kv_cache", "keep"):
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
        state, _ = self._checkpoints.restore(step, abstract_state(self._model.config, self._model.mesh))
        return step, self._engine.sync(state.params, step)
