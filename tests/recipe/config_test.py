import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.mathematics import MathTask
from dcjax.models import ModelConfig, Precision, presets
from dcjax.models.rope import YarnScaling
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, TrackingConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.plain import differences, flatten, from_dict, to_dict
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.rl.presets import METHODS
from dcjax.serving.formats import FormatName, formats
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.hosts import DistributedConfig
from dcjax.sharding.mesh import MeshConfig
from dcjax.user_code import CodeFile

SECTIONS = {
    "task": ArithmeticTask,
    "model": ModelConfig,
    "warm_start": WarmStartConfig,
    "rollout": RolloutConfig,
    "reward": RewardConfig,
    "serving": ServingConfig,
    "mismatch": MismatchConfig,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
    "mesh": MeshConfig,
    "distributed": DistributedConfig,
}

RECIPES = Path(__file__).parents[2] / "dcjax" / "recipes"
LONG = RolloutConfig(max_prompt_length=1024)

# The smallest value that is right and a value that is not, of each field with a lower bound.
LOWER_BOUNDS = {
    "distributed.timeout": (1, 0),
    "task.min_operations": (1, 0),
    "task.max_operand": (1, 0),
    "task.max_value": (1, 0),
    "model.vocab_size": (1, 0),
    "model.hidden_size": (1, 0),
    "model.intermediate_size": (1, 0),
    "model.num_layers": (1, 0),
    "model.num_heads": (2, 0),
    "model.num_kv_heads": (1, 0),
    "model.head_dim": (2, 0),
    "model.num_experts": (0, -1),
    "model.num_experts_per_tok": (1, 0),
    "model.moe_intermediate_size": (1, 0),
    "model.decoder_sparse_step": (1, 0),
    "model.max_position_embeddings": (1, 0),
    "model.head_chunk": (1, 0),
    "warm_start.steps": (0, -1),
    "warm_start.batch_size": (1, 0),
    "warm_start.learning_rate": (0.0, -1e-3),
    "warm_start.warmup_steps": (0, -1),
    "rollout.prompts": (1, 0),
    "rollout.group_size": (2, 1),
    "rollout.temperature": (1e-3, 0.0),
    "rollout.top_k": (0, -1),
    "rollout.max_prompt_length": (1, 0),
    "rollout.max_response_length": (1, 0),
    "reward.workers": (0, -1),
    "reward.timeout": (1e-3, 0.0),
    "reward.warm_up": (1e-3, 0.0),
    "reward.memory": (1, 0),
    "reward.overlong_buffer": (0, -1),
    "reward.overlong_factor": (0.0, -1.0),
    "serving.slots": (1, 0),
    "serving.steps_per_call": (1, 0),
    "serving.prefill_tokens": (1, 0),
    "serving.tensor": (1, 0),
    "serving.devices": (0, -1),
    "mismatch.weight_noise": (0.0, -0.1),
    "mismatch.logit_noise": (0.0, -0.1),
    "mismatch.staleness": (0, -1),
    "rollout.async_level": (0, -1),
    "rollout.patience": (0, -1),
    "objective.dual_lr": (0.0, -1.0),
    "objective.budget": (0.0, -0.0037),
    "objective.initial_multiplier": (0.0, -0.1),
    "objective.max_multiplier": (0.1, -1.0),
    "objective.eps_low": (0.0, -0.2),
    "objective.eps_high": (0.0, -0.28),
    "objective.budget_window": (1, 0),
    "objective.sampler_head": (0, -1),
    "objective.correction_bound": (1.01, 1.0),
    "objective.kl_coefficient": (0.0, -0.1),
    "optimizer.learning_rate": (0.0, -1e-6),
    "optimizer.warmup_steps": (0, -1),
    "optimizer.beta1": (0.0, -0.9),
    "optimizer.beta2": (0.0, -0.95),
    "optimizer.epsilon": (0.0, -1e-8),
    "optimizer.weight_decay": (0.0, -0.1),
    "optimizer.decay_floor": (0.0, -0.1),
    "optimizer.decay_period": (1, 0),
    "optimizer.decay_dual_lr": (0.0, -1.0),
    "optimizer.ema_decay": (0.0, -0.9),
    "optimizer.surge_ratio": (1.01, 1.0),
    "optimizer.surge_history": (7, 6),
    "optimizer.max_grad_norm": (1e-3, 0.0),
    "optimizer.updates": (1, 0),
    "evaluation.every": (1, 0),
    "evaluation.prompts": (1, 0),
    "evaluation.temperature": (0.0, -1.0),
    "checkpoint.every": (1, 0),
    "checkpoint.keep": (1, 0),
    "mesh.data": (1, 0),
    "mesh.fsdp": (1, 0),
    "mesh.tensor": (1, 0),
    "mesh.expert": (1, 0),
    "mesh.context": (1, 0),
}

UPPER_BOUNDS = {
    "warm_start.early_scratchpads": (1.0, 1.5),
    "warm_start.late_scratchpads": (1.0, 1.5),
    "rollout.top_p": (1.0, 1.1),
    "mismatch.routing_flips": (1.0, 1.1),
    "optimizer.beta1": (0.999, 1.0),
    "optimizer.beta2": (0.999, 1.0),
    "optimizer.decay_floor": (1.0, 1.1),
    "optimizer.ema_decay": (0.999, 1.0),
}

FLOATS = [
    f"{section}.{field.name}"
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if isinstance(field.default, float)
]


def build(path, value):
    """The section's config with one field set: build("mesh.fsdp", 2) is MeshConfig(fsdp=2)."""
    section, name = path.split(".")
    return SECTIONS[section](**{name: value})


def refusal(construct):
    """The message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        construct()
    message = str(caught.value)
    assert "\n" not in message
    return message


def small(**changes):
    """A run of 8 prompts × 4 responses."""
    return Config(**({"rollout": RolloutConfig(prompts=8, group_size=4)} | changes))


@pytest.mark.parametrize(("path", "bounds"), (LOWER_BOUNDS | UPPER_BOUNDS).items())
def test_a_value_at_its_bound_is_accepted(path, bounds):
    assert getattr(build(path, bounds[0]), path.split(".")[1]) == bounds[0]


@pytest.mark.parametrize(("path", "bad"), [(path, bad) for path, (_, bad) in LOWER_BOUNDS.items()])
def test_a_value_below_its_bound_is_quoted_with_what_would_be_right(path, bad):
    message = refusal(lambda: build(path, bad))
    assert f"{path} is {bad}; " in message
    _, advice = message.split("; ", 1)
    assert any(word in advice for word in ("at least", "above", "needs", "even")), advice


@pytest.mark.parametrize(("path", "bad"), [(path, bad) for path, (_, bad) in UPPER_BOUNDS.items()])
def test_a_value_above_its_bound_is_quoted_with_what_would_be_right(path, bad):
    message = refusal(lambda: build(path, bad))
    assert f"{path} is {bad}; it must " in message


@pytest.mark.parametrize("path", FLOATS)
def test_a_number_that_is_not_one_is_refused(path):
    assert f"{path} is nan; " in refusal(lambda: build(path, math.nan))


@pytest.mark.parametrize("path", [path for path in FLOATS if path != "optimizer.max_grad_norm"])
def test_an_infinite_number_is_refused(path):
    assert f"{path} is inf; " in refusal(lambda: build(path, math.inf))


def test_an_infinite_gradient_norm_means_no_clipping():
    assert OptimizerConfig(max_grad_norm=math.inf).max_grad_norm == math.inf


@pytest.mark.parametrize("path", ["model.rope_theta", "model.rms_norm_eps"])
def test_a_model_constant_that_gives_nan_is_refused(path):
    assert f"{path} is -1.0; " in refusal(lambda: build(path, -1.0))


@pytest.mark.parametrize(
    "path",
    [
        "serving.kv_cache",
        *(f"objective.{name}" for name in ("algorithm", "zero_variance", "estimator", "correction", "penalty")),
        "optimizer.decay",
    ],
)
def test_a_word_that_is_no_choice_is_quoted_with_those_there_are(path):
    section, name = path.split(".")
    message = refusal(lambda: build(path, "nonesuch"))
    assert path in message and "'nonesuch'" in message
    for choice in typing.get_args(typing.get_type_hints(SECTIONS[section])[name]):
        assert choice in message


def test_a_section_of_ones_own_with_another_default_keeps_the_choices():
    @dataclasses.dataclass(frozen=True)
    class Own(ObjectiveConfig):
        algorithm: str = "grpo"

    assert Own().algorithm == "grpo"
    message = refusal(lambda: Own(algorithm="nonesuch"))
    assert "objective.algorithm is 'nonesuch'; it must be one of grpo, dual_grpo, " in message


def test_a_format_that_is_none_is_quoted_with_those_there_are():
    message = refusal(lambda: ServingConfig(format="int3"))
    assert message == f"serving.format is 'int3'; it must be one of {', '.join(formats)}"
    assert "serving.format is 3; it must be a name or a dcjax.serving.formats.Format" in refusal(
        lambda: ServingConfig(format=3)
    )
    assert set(typing.get_args(FormatName)) == set(formats)


def test_every_number_of_every_section_has_a_bound():
    numbers = {
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if type(field.default) in (int, float)
    }
    # tested by name: one is bounded by another field, and the bounds of two are open
    others = {"task.max_operations", "model.rope_theta", "model.rms_norm_eps"}
    # by default the algorithm's own
    numbers.add("objective.max_multiplier")
    assert numbers == set(LOWER_BOUNDS) | set(UPPER_BOUNDS) | others


def test_every_section_of_the_config_is_tested():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields - {"name", "steps", "seed", "run_dir", "pretrained", "self_checks"} == set(SECTIONS)


@pytest.mark.parametrize("name", ["steps", "seed"])
def test_a_negative_count_of_the_run_is_refused(name):
    assert refusal(lambda: Config(**{name: -1})) == f"{name} is -1; it must be at least 0"


def test_a_seed_that_no_key_can_hold_is_refused():
    assert "seed is 9223372036854775808" in refusal(lambda: Config(seed=2**63))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b"])
def test_a_name_that_is_no_folder_is_refused(name):
    assert repr(name) in refusal(lambda: Config(name=name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "none"}, f"objective.method is 'none'; it must be None or one of {', '.join(METHODS)}"),
        ({"method_bound": 0.2}, "objective.method_bound is 0.2, but objective.method is None"),
        (
            {"method": "kpop", "correction": "icepop"},
            "objective.method is kpop and objective.correction icepop; set one of the two",
        ),
        (
            {"method": "vexact", "verl": "decoupled_k3_rs"},
            "objective.method is vexact and objective.verl decoupled_k3_rs; set one of the two",
        ),
        (
            {"method": "ipo", "surrogate": "gspo"},
            "objective.method is ipo, which has a loss of its own, so objective.surrogate must be left at clip, "
            "not gspo",
        ),
        (
            {"method": "m2po", "dual_clip": 3.0},
            "objective.method is m2po, which has a loss of its own, so objective.dual_clip must be left at None, "
            "not 3.0",
        ),
        *(
            (
                {"method": "dppo_tv", "method_bound": bad},
                f"objective.method_bound is {bad}; it must be a finite number above 0",
            )
            for bad in (0.0, -1.0, math.inf, math.nan)
        ),
        (
            {"method": "seq_mask_tis", "method_bound": 0.9},
            "objective.method_bound is 0.9; seq_mask_tis needs one above its lower bound, 0.999",
        ),
    ],
)
def test_a_method_that_does_not_fit_is_refused(fields, message):
    assert refusal(lambda: ObjectiveConfig(**fields)) == message


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5, math.nan])
def test_an_effective_share_is_a_share(bad):
    assert refusal(lambda: OptimizerConfig(ess_base=bad)) == (
        f"optimizer.ess_base is {bad}; it must lie within (0, 1], or be None"
    )


def test_a_run_from_before_there_were_methods_is_the_same_run():
    ours, theirs = to_dict(Config()), to_dict(Config())
    del theirs["objective"]["method"], theirs["objective"]["method_bound"], theirs["optimizer"]["ess_base"]
    assert differences(ours, theirs) == {}


def test_a_run_from_before_there_was_scaled_rope_is_the_same_run():
    theirs = to_dict(Config())
    del theirs["model"]["rope_scaling"]
    assert differences(to_dict(Config()), theirs) == {}
    assert from_dict(theirs) == Config()


def test_scalings_of_rope_differ_by_their_fields():
    plain, two, four = (
        to_dict(Config(model=ModelConfig(rope_scaling=scaling)))
        for scaling in (None, YarnScaling(2.0, 64), YarnScaling(4.0, 64))
    )
    assert differences(two, four) == {"model.rope_scaling.factor": (2.0, 4.0)}
    assert differences(plain, four)["model.rope_scaling.factor"] == (None, 4.0)


def test_a_scaling_that_a_file_gives_another_class_is_refused():
    nested = to_dict(Config(model=ModelConfig(rope_scaling=YarnScaling(2.0, 64))))
    nested["model"]["rope_scaling"] = {"class": "dcjax.models.config:Precision"}
    assert "model.rope_scaling is Precision(" in refusal(lambda: from_dict(nested))


def test_a_multiplier_that_starts_above_its_upper_bound_is_refused():
    message = refusal(lambda: ObjectiveConfig(initial_multiplier=0.7, max_multiplier=0.5))
    assert "objective.initial_multiplier is 0.7" in message and "objective.max_multiplier, 0.5" in message


def test_fewer_operations_at_most_than_at_least_are_refused():
    message = refusal(lambda: ArithmeticTask(min_operations=3, max_operations=2))
    assert "task.max_operations is 2" in message and "3" in message


def test_query_heads_that_do_not_divide_over_key_value_heads_are_refused():
    message = refusal(lambda: ModelConfig(num_heads=3, num_kv_heads=2))
    assert "model.num_heads 3" in message and "model.num_kv_heads 2" in message


def test_an_odd_head_cannot_be_rotated():
    assert "model.head_dim is 15" in refusal(lambda: ModelConfig(head_dim=15))


def test_a_prompt_limit_shorter_than_the_tasks_longest_prompt_is_refused():
    task = ArithmeticTask()
    assert small(rollout=RolloutConfig(8, 4, max_prompt_length=task.max_prompt_length))
    short = RolloutConfig(8, 4, max_prompt_length=task.max_prompt_length - 1)
    message = refusal(lambda: small(rollout=short))
    assert f"rollout.max_prompt_length is {task.max_prompt_length - 1}" in message
    assert f"needs {task.max_prompt_length} tokens" in message


def test_a_response_limit_shorter_than_the_longest_right_response_is_refused():
    task = ArithmeticTask()
    assert small(rollout=RolloutConfig(8, 4, max_response_length=task.max_response_length))
    short = RolloutConfig(8, 4, max_response_length=task.max_response_length - 1)
    message = refusal(lambda: small(rollout=short))
    assert f"rollout.max_response_length is {task.max_response_length - 1}" in message
    assert f"needs {task.max_response_length} tokens" in message


def test_prompts_that_do_not_divide_into_updates_are_refused():
    assert small(optimizer=OptimizerConfig(updates=4))
    message = refusal(lambda: small(optimizer=OptimizerConfig(updates=3)))
    assert "rollout.prompts 8" in message and "optimizer.updates 3" in message


def test_a_microbatch_that_has_no_room_for_the_longest_row_is_refused():
    rollout = RolloutConfig(prompts=8, group_size=4, max_prompt_length=30, max_response_length=60)
    # the last token is not fed, and columns are even
    packing = small(rollout=rollout, optimizer=OptimizerConfig(tokens_per_microbatch=91)).packing()
    assert packing.bins[:2] == (90, 60)
    message = refusal(lambda: small(rollout=rollout, optimizer=OptimizerConfig(tokens_per_microbatch=89)))
    assert "optimizer.tokens_per_microbatch is 89; it must be at least 90" in message


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    assert small(mesh=MeshConfig(data=2, fsdp=4), warm_start=WarmStartConfig(batch_size=16))
    message = refusal(lambda: small(mesh=MeshConfig(data=4, fsdp=4), optimizer=OptimizerConfig(updates=4)))
    assert "the 8 sequences of a minibatch" in message and "16" in message
    message = refusal(lambda: small(mesh=MeshConfig(fsdp=4), warm_start=WarmStartConfig(batch_size=6)))
    assert "warm_start.batch_size 6" in message and "4" in message


def test_a_config_cannot_be_changed_after_it_was_validated():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = -1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().objective.budget = -1


def test_the_run_directory_is_named_after_the_run_unless_it_is_given():
    assert Config(name="first").directory == Path("runs/first")
    assert Config(name="first", run_dir=Path("elsewhere")).directory == Path("elsewhere")


OTHERWISE = small(
    name="other",
    steps=7,
    seed=3,
    run_dir=Path("some/where"),
    task=ArithmeticTask(max_value=9),
    model=ModelConfig(
        tie_embeddings=False,
        rope_theta=1e6,
        rope_scaling=YarnScaling(4.0, 32_768, mscale=1.0, truncate=False),
        mlp_only_layers=(0,),
        precision=Precision(compute="bf16"),
    ),
    serving=ServingConfig(format="bf16", kv_cache="fp8", keep=("lm_head", "experts_*")),
    mismatch=MismatchConfig(logit_noise=0.1, staleness=2),
    objective=ObjectiveConfig(algorithm="grpo", budget=1 / 3),
    mesh=MeshConfig(fsdp=2),
)


@pytest.mark.parametrize("config", [Config(), OTHERWISE, Config(model=presets["llama-3.2-1b"])])
def test_a_config_comes_back_from_json_equal(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def section(fields):
    return {"class": "dcjax.recipe.objective:ObjectiveConfig"} | fields


def test_a_missing_field_takes_its_default():
    assert from_dict({"steps": 7, "objective": section({"budget": 0.5})}) == Config(
        steps=7, objective=ObjectiveConfig(budget=0.5)
    )


def test_an_unknown_field_is_named():
    assert "no field 'stepz'" in refusal(lambda: from_dict({"stepz": 7}))
    # of an earlier version
    told = refusal(lambda: from_dict({"rollout": {"ahead": 1}}))
    assert "no field 'ahead'; it is called 'async_level' now" in told
    message = refusal(lambda: from_dict({"objective": section({"budgets": 7})}))
    assert "ObjectiveConfig" in message and "'budgets'" in message


def test_a_value_out_of_range_is_refused_when_it_is_read():
    assert "objective.budget is -1" in refusal(lambda: from_dict({"objective": section({"budget": -1})}))


def test_flatten_joins_the_names_of_nested_fields_with_dots():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": None}}}) == {"a": 1, "b.c": 2, "b.d.e": None}


def test_a_config_does_not_differ_from_itself():
    assert differences(to_dict(OTHERWISE), to_dict(OTHERWISE)) == {}


def test_differences_name_each_field_with_both_values():
    ours = small(seed=1, objective=ObjectiveConfig(budget=0.5))
    theirs = small(seed=2)
    assert differences(to_dict(ours), to_dict(theirs)) == {
        "seed": (1, 2),
        "objective.budget": (0.5, ObjectiveConfig().budget),
    }


def test_where_and_how_often_a_run_is_saved_is_no_difference():
    elsewhere = small(
        run_dir=Path("elsewhere"),
        mesh=MeshConfig(fsdp=4),
        serving=ServingConfig(tensor=2, devices=2),
        checkpoint=CheckpointConfig(every=3, keep=1),
    )
    assert differences(to_dict(small()), to_dict(elsewhere)) == {}


def test_a_field_that_one_side_lacks_is_a_difference():
    theirs = to_dict(small())
    del theirs["objective"]["eps_low"]
    assert differences(to_dict(small()), theirs) == {"objective.eps_low": (0.2, None)}
    assert differences(theirs, to_dict(small())) == {"objective.eps_low": (None, 0.2)}


def test_a_mesh_that_does_not_divide_the_batch_is_refused():
    assert Config(model=presets["tiny-moe"], mesh=MeshConfig(expert=8, tensor=2)).mesh.expert == 8
    rows = refusal(lambda: Config(mesh=MeshConfig(data=3)))
    assert "must be multiples of mesh.data × mesh.fsdp × mesh.expert, 3" in rows


def test_a_budget_may_be_measured_where_a_multiplier_follows_it():
    assert ObjectiveConfig(budget="auto").budget == "auto"
    assert "objective.budget is 'some'; it must be a number or auto" in refusal(lambda: ObjectiveConfig(budget="some"))
    for changes in ({"penalty": "hinge"}, {"algorithm": "dual_grpo"}, {"algorithm": "thresholded_dual_grpo"}):
        assert "objective.budget is auto" in refusal(lambda changes=changes: ObjectiveConfig(budget="auto", **changes))


def test_a_decay_must_fit_the_gap_that_it_follows():
    signed = ObjectiveConfig(sides="signed")
    assert "needs a gap without a sign; the objective's is signed" in refusal(
        lambda: small(objective=signed, optimizer=OptimizerConfig(decay="discrepancy"))
    )
    dual = OptimizerConfig(decay="dual")
    assert "needs a number for the objective's budget" in refusal(
        lambda: small(objective=ObjectiveConfig(budget="auto"), optimizer=dual)
    )
    no_floor = dataclasses.replace(dual, decay_floor=0.0)
    assert "optimizer.decay_floor is 0" in refusal(lambda: small(optimizer=no_floor))
    assert small(optimizer=dual).optimizer.decay == "dual"


@pytest.mark.parametrize("top_p", [0.0, -0.5])
def test_a_top_p_that_leaves_nothing_is_refused(top_p):
    assert f"rollout.top_p is {top_p}; it must lie within (0, 1]" in refusal(
        lambda: RolloutConfig(top_p=top_p, top_k=4)
    )


def test_a_top_p_that_the_trainer_could_not_replay_is_refused():
    assert RolloutConfig(top_p=0.9, top_k=4).top_p == 0.9
    message = refusal(lambda: RolloutConfig(top_p=0.9))
    assert "rollout.top_p is 0.9 without rollout.top_k" in message and "set rollout.top_k too" in message


def test_routing_flips_below_0_are_refused():
    assert "mismatch.routing_flips is -0.1; it must lie" in refusal(lambda: MismatchConfig(routing_flips=-0.1))


def test_more_tokens_to_sample_from_than_there_are_are_refused():
    rollout = RolloutConfig(prompts=8, group_size=4, top_k=65)
    message = refusal(lambda: small(rollout=rollout, model=ModelConfig(vocab_size=64)))
    assert "rollout.top_k is 65; the vocabulary has 64 tokens" in message


def test_sequences_longer_than_the_model_is_made_for_are_refused():
    model = dataclasses.replace(Config().model, max_position_embeddings=60)
    assert refusal(lambda: Config(model=model)) == (
        "rollout.max_prompt_length is 13 and rollout.max_response_length 48, 61 tokens; the model is made for 60 "
        "(RoPE of theta 10000, without scaling), so shorten them"
    )
    assert Config(model=dataclasses.replace(model, max_position_embeddings=61))


def test_with_yarn_a_model_is_made_for_longer_sequences():
    model = dataclasses.replace(Config().model, max_position_embeddings=60, rope_scaling=YarnScaling(2.0, 30))
    assert "the model is made for 60 (RoPE of theta 10000, scaled by 2 (yarn) from 30 tokens), so shorten them" in (
        refusal(lambda: Config(model=model))
    )
    assert Config(model=dataclasses.replace(model, rope_scaling=YarnScaling(2.0, 31)))


def test_routing_is_replayed_only_where_there_are_experts():
    rollout = RolloutConfig(prompts=8, group_size=4, replay_routing=True)
    message = refusal(lambda: small(rollout=rollout))
    assert "rollout.replay_routing is True; it needs a model with experts" in message
    assert small(rollout=rollout, model=presets["tiny-moe"]).rollout.replay_routing


def test_sampling_is_not_held_against_a_model_that_a_folder_replaces():
    rollout = RolloutConfig(prompts=8, group_size=4, replay_routing=True, top_k=1000)
    assert small(rollout=rollout, pretrained=Path("some/where")).rollout == rollout


def test_a_section_that_may_be_of_two_kinds_comes_back_as_it_was(tmp_path):
    task = MathTask(data_dir=tmp_path, subset="25%", index_file=tmp_path / "ids")
    config = Config(task=task, rollout=LONG, reward=RewardConfig(workers=1))
    restored = from_dict(json.loads(json.dumps(to_dict(config))))
    assert restored == config
    assert from_dict(to_dict(Config())).task == ArithmeticTask()


def test_where_data_lie_does_not_change_what_a_run_computes():
    one, other = (
        to_dict(
            Config(
                task=MathTask(data_dir=Path(place), subset=share), rollout=LONG, reward=RewardConfig(workers=workers)
            )
        )
        for place, share, workers in (("a", "all", 1), ("b", "25%", 2))
    )
    assert differences(one, other) == {"task.subset": ("all", "25%")}


def test_answers_in_mathematics_need_workers_unless_the_user_judges_them():
    told = refusal(lambda: Config(task=MathTask(), rollout=LONG))
    assert told.startswith("reward.workers is 0; this task's answers may take any time and memory")
    assert Config(task=MathTask(), rollout=LONG, reward=RewardConfig(function="my:reward"))
    assert Config().reward.workers == 0


def test_no_more_tokens_are_overlong_than_there_are():
    longest = RolloutConfig().max_response_length
    assert Config(reward=RewardConfig(overlong_buffer=longest))
    told = refusal(lambda: Config(reward=RewardConfig(overlong_buffer=longest + 1)))
    assert f"reward.overlong_buffer is {longest + 1}; it must be at most rollout.max_response_length" in told


def test_every_recipe_is_one():
    recipes = [path for path in RECIPES.glob("*.py") if "def config(" in path.read_text()]
    assert {path.stem for path in recipes} >= {
        "quickstart",
        "dcmdp_qwen3_8b",
        "dcmdp_qwen3_30b_a3b",
        "case_study_1_5b",
        "length_decay_qwen3_4b",
        "length_decay_qwen3_8b",
    }
    for path in recipes:
        assert CodeFile.read(path).load().config().name == path.stem
