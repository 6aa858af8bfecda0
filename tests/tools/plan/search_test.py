"""The search for the nearest change that fits, with compilers that say so by arithmetic."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from dcjax.errors import RunError
from dcjax.sharding.mesh import MeshConfig
from dcjax.tools.plan import search

# a prompt and a response of the longest have 28 columns
TRAINING = replace(
    tiny.CONFIG,
    mesh=MeshConfig(data=2, fsdp=4),
    model=replace(tiny.CONFIG.model, remat="products"),
    optimizer=replace(tiny.CONFIG.optimizer, tokens_per_microbatch=128),
)
SERVING = replace(tiny.CONFIG, serving=replace(tiny.CONFIG.serving, slots=8))


def found(monkeypatch, config, program, fits, possible=lambda config: True):
    """The overrides that are found where `fits` says which configs do, and the configs that were tried."""
    tried = []

    def place_of(changed, topology):
        if not possible(changed):
            raise RunError("no such mesh")

        def plan(mean_response, told, only):
            assert only == {program}
            tried.append(changed)
            return [SimpleNamespace(fits=fits(changed))]

        return SimpleNamespace(plan=plan)

    monkeypatch.setattr(search, "place_of", place_of)
    too_big = SimpleNamespace(planned=SimpleNamespace(name=program), fits=False)
    plan = SimpleNamespace(programs=[too_big], mean_response=10)
    return search.nearest_that_fits(config, "v5e:2x4", plan, lambda line: None), tried


@pytest.mark.parametrize(
    ("fits", "overrides"),
    [
        (lambda config: config.mesh.data == 1, "mesh.data=1 mesh.fsdp=8"),
        (lambda config: config.model.remat == "full", "mesh.data=1 mesh.fsdp=8 model.remat=full"),
        (
            lambda config: config.optimizer.tokens_per_microbatch <= 32,
            "mesh.data=1 mesh.fsdp=8 model.remat=full optimizer.tokens_per_microbatch=32",
        ),
        (
            lambda config: config.mesh.tensor == 2,
            "mesh.data=1 mesh.fsdp=4 model.remat=full optimizer.tokens_per_microbatch=32 mesh.tensor=2",
        ),
        (lambda config: False, ""),
    ],
)
def test_an_update_is_made_smaller_by_what_costs_least_first(monkeypatch, fits, overrides):
    assert " ".join(found(monkeypatch, TRAINING, "train_step", fits)[0]) == overrides


@pytest.mark.parametrize(
    ("fits", "overrides"),
    [
        (lambda serving: serving.slots == 4, "serving.slots=4"),
        (lambda serving: serving.tensor == 2, "serving.tensor=2"),
        (lambda serving: serving.slots == 4 and serving.tensor == 2, "serving.slots=4 serving.tensor=2"),
    ],
)
def test_an_engine_is_made_smaller_by_few_changes_first(monkeypatch, fits, overrides):
    found_, tried = found(monkeypatch, SERVING, "decode", lambda config: fits(config.serving))
    assert " ".join(found_) == overrides
    assert len(tried) <= search.MOST


def test_meshes_that_cannot_be_are_not_among_those_that_are_tried(monkeypatch):
    overrides, tried = found(
        monkeypatch,
        SERVING,
        "decode",
        lambda config: config.serving.slots == 1,
        possible=lambda config: config.serving.tensor == 1,
    )
    assert overrides == ["serving.slots=1"]
    assert [config.serving.slots for config in tried] == [4, 2, 1]
