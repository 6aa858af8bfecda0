"""A trial: every recipe as small as the devices, the memory and the files that are there ask for."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.datasets import SAMPLES
from dcjax.data.mathematics import MathTask
from dcjax.errors import RunError
from dcjax.models.config import presets
from dcjax.models.parallel.forward import check_model
from dcjax.models.parameters import count_params
from dcjax.recipe.config import Config
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.plain import flatten, to_dict
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.recipe.trial import Available, changes, check_fits, shrink
from dcjax.sharding.mesh import MeshConfig
from dcjax.user_code import CodeFile

RECIPES = Path(__file__).parents[2] / "dcjax" / "recipes"
FILES = [path for path in sorted(RECIPES.glob("*.py")) if "def config(" in path.read_text()]
RECIPES = {path.stem: CodeFile.read(path).load().config() for path in FILES}
GIB = 2**30
LAPTOP = Available(devices=1, memory=16 * GIB, cores=2, data=False, tokens=258)
HOST = Available(devices=4, memory=64 * GIB, cores=16)
SLICE = Available(devices=64, memory=95 * GIB, cores=100, processes=16)
MACHINES = {"laptop": LAPTOP, "host": HOST, "slice": SLICE}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_on_what_is_there(recipe, machine):
    before = RECIPES[recipe]
    after = shrink(before, machine if machine is LAPTOP else replace(machine, pretrained=before.model))
    mesh = asdict(after.mesh)
    training = math.prod(mesh.values())
    assert training + after.serving.devices <= machine.devices
    check_model(after.model, mesh)  # raises where the mesh does not divide it
    copies, alone = divmod(after.serving.devices or training, after.serving.tensor)
    assert not alone and not after.serving.slots % copies and not after.model.num_kv_heads % after.serving.tensor
    assert not after.rollout.prompts % machine.processes and machine.processes <= after.evaluation.prompts
    assert after.reward.workers <= machine.cores
    # of what was 300 iterations of 4 million tokens
    assert (
        after.steps == 2
        and after.rollout.max_response_length <= 64
        and after.rollout.sequences <= 16 * max(training, machine.processes)
    )
    assert after.warm_start.steps <= 10 and after.evaluation.prompts <= max(8, machine.processes)
    assert after.checkpoint.keep == 1
    # what is learned stays
    kept = ("seed", "objective", "mismatch")
    assert {name: getattr(after, name) for name in kept} == {name: getattr(before, name) for name in kept}
    assert (after.optimizer.updates, after.optimizer.learning_rate) == (
        before.optimizer.updates,
        before.optimizer.learning_rate,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_grows_and_what_changes_is_told(recipe):
    before = RECIPES[recipe]
    after = shrink(before, LAPTOP)
    ours, theirs = flatten(to_dict(before)), flatten(to_dict(after))
    changed = {name for name in theirs if theirs[name] != ours[name]}
    assert all(theirs[name] < ours[name] for name in changed if isinstance(theirs[name], int))
    assert changes(before, after, after) == [
        f"{name} {ours[name]} -> {theirs[name]}" for name in theirs if name in changed
    ]
    assert {"steps 300 -> 2", "steps 600 -> 2", "steps 80 -> 2", "steps 100 -> 2"} & set(changes(before, after, after))


def test_what_fits_stays_and_a_second_trial_changes_nothing():
    once = shrink(RECIPES["dcmdp_qwen3_8b"], LAPTOP)
    assert shrink(once, LAPTOP) == once
    assert shrink(RECIPES["dcmdp_qwen3_8b"], SLICE).mesh == RECIPES["dcmdp_qwen3_8b"].mesh


def test_axes_of_a_mesh_shrink_to_divisors_copies_first():
    config = replace(RECIPES["dcmdp_qwen3_30b_a3b"], mesh=MeshConfig(data=2, fsdp=2, tensor=2, expert=8))
    sizes = {count: asdict(shrink(config, replace(HOST, devices=count)).mesh) for count in (64, 32, 16, 4, 3, 1)}
    shapes = {count: (each["data"], each["fsdp"], each["expert"], each["tensor"]) for count, each in sizes.items()}
    assert shapes == {
        64: (2, 2, 8, 2),
        32: (1, 2, 8, 2),
        16: (1, 1, 8, 2),
        4: (1, 1, 2, 2),
        3: (1, 1, 1, 2),
        1: (1, 1, 1, 1),
    }


@pytest.mark.parametrize(
    ("devices", "processes", "expected"),
    [
        (16, 1, (8, 8, 2)),  # as it is
        (8, 1, (4, 4, 2)),
        (2, 1, (1, 1, 2)),
        (1, 1, (1, 0, 2)),
        (8, 4, (4, 4, 2)),
        (4, 4, (4, 0, 0)),  # no device to spare, and several that train: in turns
    ],
)
def test_devices_that_only_serve_and_asynchronous_sampling_stay_while_there_are_devices(devices, processes, expected):
    config = Config(
        mesh=MeshConfig(fsdp=8),
        serving=ServingConfig(devices=8, tensor=8, slots=64),
        rollout=RolloutConfig(async_level=2),
    )
    after = shrink(config, replace(HOST, devices=devices, processes=processes))
    assert (after.mesh.fsdp, after.serving.devices, after.rollout.async_level) == expected
    assert not (after.serving.devices or after.mesh.fsdp) % after.serving.tensor


def test_devices_share_a_folders_model_as_its_own_sizes_divide():
    """Three key-value heads, nine heads and 576 columns, in a recipe for 4 × 32 heads and 128 experts."""
    config, small = RECIPES["dcmdp_qwen3_30b_a3b"], presets["smollm2-135m"]
    mesh = MeshConfig(fsdp=4, tensor=2, context=2, expert=4)
    after = shrink(replace(config, mesh=mesh), replace(HOST, devices=64, pretrained=small))
    check_model(small, asdict(after.mesh))
    # a dense model leaves the devices of experts to the batch
    assert (after.mesh, after.serving.tensor) == (MeshConfig(fsdp=4, expert=4), 1)
    assert after.pretrained == config.pretrained


KINDS = {
    "dense": presets["qwen3-8b"],
    "biased": presets["deepseek-r1-distill-qwen-1.5b"],
    "llama": presets["llama-3.1-8b"],
    "experts": presets["qwen3-30b-a3b"],
    "some dense": replace(presets["qwen3-30b-a3b"], mlp_only_layers=(0, 47), decoder_sparse_step=2),
    "only deep experts": replace(presets["qwen3-30b-a3b"], mlp_only_layers=tuple(range(40))),
}


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_a_model_that_is_too_large_becomes_a_small_one_of_its_kind(model):
    small = shrink(Config(model=model), LAPTOP).model
    assert count_params(small) < 3e6
    assert any(small.sparse_layers) == any(model.sparse_layers)
    if model.num_experts:
        assert 1 < small.num_experts_per_tok < small.num_experts
    assert small.num_heads * model.num_kv_heads == model.num_heads * small.num_kv_heads
    for name in ("family", "head_dim", "rope_theta", "rope_scaling", "tie_embeddings", "precision", "remat"):
        assert getattr(small, name) == getattr(model, name)


def test_a_model_is_kept_where_an_eighth_of_memory_holds_its_state_and_a_small_vocabulary_holds_the_tokenizers():
    config = Config(model=presets["qwen3-0.6b"])
    state = 16 * count_params(config.model)  # float32: weights, gradients and two moments
    assert shrink(config, replace(LAPTOP, memory=8 * state)).model == config.model
    assert shrink(config, replace(LAPTOP, memory=8 * state - 8)).model != config.model
    assert shrink(config, replace(LAPTOP, tokens=1000)).model.vocab_size == 1024
    # devices that share parameters hold a part each
    four = replace(HOST, memory=int(2.01 * state))
    assert shrink(replace(config, mesh=MeshConfig(fsdp=4)), four).model == config.model
    assert shrink(replace(config, mesh=MeshConfig(data=4)), four).model != config.model


def test_samples_stand_in_for_data_that_are_not_there():
    task = MathTask(subset="2.5%", index_file=Path("ids"), max_prompt_tokens=1024)
    config = replace(RECIPES["dcmdp_qwen3_8b"], task=task)
    there, missing = (shrink(config, replace(LAPTOP, data=data)) for data in (True, False))
    assert there.task == task and there.rollout.max_prompt_length == 1024
    assert missing.task == replace(task, data_dir=SAMPLES, subset="all", index_file=None, max_prompt_tokens=512)
    missing.task.check_files()


def test_arithmetic_keeps_the_lengths_that_it_needs():
    task = ArithmeticTask(max_operations=20)
    lengths = {"max_prompt_length": task.max_prompt_length + 9, "max_response_length": task.max_response_length + 9}
    assert task.max_response_length > 64
    rollout = shrink(Config(task=task, rollout=RolloutConfig(**lengths)), LAPTOP).rollout
    assert (rollout.max_prompt_length, rollout.max_response_length) == (
        task.max_prompt_length,
        task.max_response_length,
    )


@pytest.mark.parametrize(
    ("prompts", "updates", "expected"),
    [(32, 1, (4, 1)), (32, 2, (4, 2)), (30, 3, (6, 3)), (32, 16, (4, 4)), (3, 1, (3, 1))],
)
def test_updates_stay_where_a_few_prompts_divide_into_them(prompts, updates, expected):
    config = Config(rollout=RolloutConfig(prompts=prompts), optimizer=OptimizerConfig(updates=updates))
    after = shrink(config, LAPTOP)
    assert (after.rollout.prompts, after.optimizer.updates) == expected


@dataclass(frozen=True)
class EightUpdates:
    """An optimizer section whose updates and microbatches are no fields, and that has a field of its own."""

    every: int = 99

    @property
    def updates(self):
        return 8

    @property
    def tokens_per_microbatch(self):
        return None

    def build(self, objective, *, steps):
        return OptimizerConfig(updates=8).build(objective, steps=steps)


@dataclass(frozen=True)
class OwnTask(ArithmeticTask):
    """A task with files, and a field of its own."""

    data_dir: Path = Path("mine")
    prompts: int = 77


def test_of_sections_of_ones_own_the_fields_of_the_built_in_ones_shrink():
    config = Config(task=OwnTask(), optimizer=EightUpdates(), rollout=RolloutConfig(prompts=64))
    after = shrink(config, LAPTOP)
    assert after.task == OwnTask(data_dir=SAMPLES)
    assert after.optimizer == EightUpdates() and after.rollout.prompts == 8
    assert shrink(config, replace(LAPTOP, data=True)).task == OwnTask()


def test_lines_are_of_what_the_trial_changed_and_the_user_did_not():
    before = RECIPES["dcmdp_qwen3_8b"]
    after = shrink(before, LAPTOP)
    given = replace(after, rollout=replace(after.rollout, prompts=16))
    lines = changes(before, after, given)
    assert not [line for line in lines if line.startswith("rollout.prompts")]
    assert set(lines) == set(changes(before, after, after)) - {"rollout.prompts 64 -> 4"}
    # the folder's architecture counts
    lines = changes(before, after, replace(after, pretrained=Path("other")))
    assert not [line for line in lines if line.startswith(("model.", "pretrained"))]


def test_a_model_that_cannot_fit_is_refused_in_one_line():
    config = Config(model=presets["qwen3-8b"], pretrained=Path("models/Qwen3-8B"))
    with pytest.raises(RunError) as refused:
        check_fits(config, HOST)
    assert str(refused.value) == (
        f"models/Qwen3-8B has {count_params(config.model):,} parameters, of which weights, gradients and moments take "
        "122.1 GiB of a device that has 64.0; give --pretrained a smaller model, or None for random weights"
    )
    check_fits(config, replace(HOST, memory=123 * GIB))
    check_fits(replace(config, mesh=MeshConfig(fsdp=2)), replace(HOST, memory=62 * GIB))
    with pytest.raises(RunError, match=r"^the model has 8,190,\d{3},\d{3} .*; choose a smaller model$"):
        check_fits(replace(config, pretrained=None), HOST)
