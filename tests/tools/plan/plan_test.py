"""`dcjax plan` on small slices: against hand counts of what a chip holds and does."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny

from dcjax.cli import main
from dcjax.models.parameters import active_params, count_params
from dcjax.sharding.mesh import MeshConfig
from dcjax.sharding.rules import RULES
from dcjax.tools.plan.chips import CHIPS, chip_of
from dcjax.tools.plan.hlo import Collective
from dcjax.tools.plan.plan import Place, make_plan, seconds_of
from dcjax.tools.plan.programs import attended, for_tpu, microbatches, response_lengths
from dcjax.tools.plan.tables import to_json, to_text

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu, which compiles for absent TPUs"),
]

SLICE, CHIPS_OF_SLICE, MEAN = "v5e:2x2", 4, 10
CONFIG = replace(tiny.CONFIG, mesh=MeshConfig(fsdp=4), serving=replace(tiny.CONFIG.serving, format="w8a8"))


@pytest.fixture(scope="module")
def plan():
    return make_plan(CONFIG, SLICE, mean_response=MEAN, told=lambda line: None)


def program(plan, name):
    (found,) = (one for one in plan.programs if one.planned.name == name)
    return found


def test_all_programs_of_an_iteration_are_compiled_and_fit(plan):
    names = [one.planned.name for one in plan.programs]
    assert names == ["train_step", "sync", "sync of a layer", "prefill", "decode"]
    assert plan.fits and not any(one.planned.refused for one in plan.programs)
    assert (plan.chips, plan.chip.name) == (CHIPS_OF_SLICE, "v5e")


def test_what_is_held_is_what_a_hand_counts(plan):
    model, serving, rollout = CONFIG.model, CONFIG.serving, CONFIG.rollout
    # float32, a quarter on each chip where it divides; Adam's two moments beside λ and counters
    assert plan.kinds["params"] == pytest.approx(4 * count_params(model) / 4, rel=0.05)
    assert plan.kinds["optimiser"] == pytest.approx(2 * plan.kinds["params"], rel=0.05)
    # int8 keys and values with a float32 scale for each token and head, two of eight slots on each chip
    capacity = rollout.max_prompt_length + rollout.max_response_length
    a_token = 2 * model.num_layers * model.num_kv_heads * (model.head_dim + 4)
    assert plan.kinds["KV cache"] == serving.slots // 4 * capacity * a_token
    # embedding, norms and scales beside int8 matrices, on each chip whole
    assert 1.0 < plan.kinds["serving weights"] / count_params(model) < 2.0
    assert plan.kinds["activations"] == program(plan, "train_step").planned.temp_bytes


def matrices(model):
    """Elements that a layer's products multiply a token by."""
    heads, kv_heads = (count * model.head_dim for count in (model.num_heads, model.num_kv_heads))
    return model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)


def test_the_update_does_what_a_hand_counts(plan):
    config = for_tpu(CONFIG)
    model, columns = config.model, config.packing().bins.columns
    assert microbatches(config, MEAN) == 1
    # forward, and twice as much backward; the products themselves are kept
    layers = 3 * 2 * columns * model.num_layers * matrices(model)
    head = 3 * 2 * columns * model.vocab_size * model.hidden_size
    # of five bins, padded to 128 queries each: two products forward, two again, and seven backward
    queries = 5 * 128 * model.num_heads * model.head_dim
    attention = model.num_layers * (2 + 2 + 7) * 2 * queries * attended(config, MEAN)
    flops = program(plan, "train_step").planned.cost.flops
    assert flops["f32"] == pytest.approx(layers + head + attention, rel=1e-6)
    rollout = CONFIG.rollout
    tokens = rollout.sequences * MEAN + rollout.prompts * rollout.max_prompt_length
    assert plan.model_operations == 6 * active_params(model) * tokens


def test_decoding_multiplies_every_slot_by_all_matrices(plan):
    model, serving, rollout = CONFIG.model, CONFIG.serving, CONFIG.rollout
    slots, flops = serving.slots // CHIPS_OF_SLICE, program(plan, "decode").planned.cost.flops
    a_token = 2 * (model.num_layers * matrices(model) + model.vocab_size * model.hidden_size)
    assert flops["s8"] == slots * serving.steps_per_call * a_token
    # responses of 1 to 19 tokens: two products with what is filled of the cache, on average over all steps
    sampled = [round(1 + 18 * row / (rollout.sequences - 1)) for row in range(rollout.sequences)]
    filled = rollout.max_prompt_length + sum(length**2 / 2 for length in sampled) / sum(sampled)
    attention = 4 * slots * serving.steps_per_call * model.num_layers * model.num_heads * model.head_dim * filled
    # keys of a cache in int8 are rotated, and queries with them
    rotated = (model.num_heads + model.num_kv_heads) * model.head_dim**2
    rotations = 2 * slots * serving.steps_per_call * model.num_layers * rotated
    assert flops["bf16"] == pytest.approx(attention + rotations, rel=1e-6)
    assert program(plan, "decode").planned.runs == rollout.sequences * MEAN / (serving.slots * serving.steps_per_call)


def test_the_training_state_is_held_while_the_engine_runs(plan):
    state, model, rollout = plan.kinds["params"] + plan.kinds["optimiser"], CONFIG.model, CONFIG.rollout
    # on every chip whole: int8 with a float32 scale
    a_token = 2 * model.num_layers * model.num_kv_heads * (model.head_dim + 4)
    assert plan.kinds["prompts' caches"] == rollout.prompts * rollout.max_prompt_length * a_token
    # a sync reads parameters of the state
    read = {name: program(plan, name).planned.argument_bytes for name in ("sync", "sync of a layer")}
    assert {one.planned.name: one.resident for one in plan.programs} == {
        "train_step": 0,
        **{name: state - size for name, size in read.items()},
        "prefill": state,
        "decode": state + plan.kinds["prompts' caches"],
    }


def test_a_plan_is_told_in_words_and_in_json(plan):
    held = json.loads(to_json(plan, price=2.0))
    assert held["fits"] and held["chips"] == CHIPS_OF_SLICE
    step = held["programs"]["train_step"]
    assert step["argument_bytes"] == program(plan, "train_step").planned.argument_bytes and step["fits"]
    assert held["price"] == pytest.approx(2 * held["chip_hours"])
    assert sum(held["iteration_seconds"][part] for part in ("prefill", "decode", "sync", "update")) == pytest.approx(
        held["iteration_seconds"]["all"]
    )
    text = to_text(plan, price=2.0)
    assert "v5e:2x2: 4 chips; a chip has 197 TFLOP/s in bf16, 16.0 GiB at 819 GB/s" in text
    assert text.count(" yes ") == 5 and "at 2 a chip-hour" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--topology", "v5q:2x2"],
            "--topology is 'v5q:2x2'; it must be a kind and a shape, such as v5p:4x4x4",
        ),
        (["--topology", "v5e:3x3x3"], "TPU slice 'v5e:3x3x3'"),
        (["--topology", SLICE], "the mesh is one device: 1 devices, and v5e:2x2 has 4; mesh.fsdp=4 would fill it"),
        (["--topology", SLICE, "mesh.fsdp=2", "mesh.tensor=4"], "fsdp 2 × tensor 4: 8 devices, and v5e:2x2 has 4"),
        (
            ["--topology", SLICE, "mesh.fsdp=1", "mesh.tensor=4", "model.num_heads=6", "model.num_kv_heads=2"],
            "mesh.tensor × mesh.context is 4, which does not divide the 6 query heads",
        ),
        (["--topology", SLICE, "mesh.fsdp=4", "serving.tensor=3"], "serving.tensor is 3; it must divide"),
        (
            ["--topology", "v5e:4x4", "mesh.fsdp=16", "rollout.prompts=2", "rollout.group_size=8"],
            "rollout.prompts is 2; it must be a multiple of the number of processes, 4",
        ),
        (["--topology", SLICE, "--mean-response-length", "99"], "--mean-response-length is 99; it must lie within"),
        (["--topology", SLICE, "mesh.fsdq=2"], "--mesh.fsdq"),
        ([], "--topology"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, told, tmp_path, capfd):
    recipe = tiny.write_recipe(tmp_path / "recipe.py")
    assert main(["plan", str(recipe), *arguments]) == 2
    assert told in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_reading_of_rollouts_is_a_program_of_its_own():
    """Of whole sequences, once an iteration, on the mesh of the engine; it multiplies what a prefill of them would."""
    config = replace(CONFIG, objective=replace(CONFIG.objective, penalty_form="state_centred"))
    place = Place.of(config, SLICE)
    found = {one.planned.name: one for one in place.plan(MEAN, lambda line: None, ("prefill", "read"))}
    read, prefill = found["read"].planned, found["prefill"].planned
    assert read.runs == 1 and found["read"].fits
    rollout = config.rollout
    tokens = rollout.sequences * (rollout.max_prompt_length + rollout.max_response_length)
    # what is read is padded to whole passes of as many copies of the model as there are
    ratio = sum(read.cost.flops.values()) / sum(prefill.cost.flops.values())
    assert ratio >= tokens / (rollout.prompts * rollout.max_prompt_length) / 2
    hidden = rollout.sequences * rollout.max_response_length * config.model.hidden_size
    assert read.output_bytes >= hidden * 2 / place.devices


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_what_would(tmp_path, capfd):
    recipe = tiny.write_recipe(tmp_path / "recipe.py", replace(CONFIG, serving=replace(CONFIG.serving, slots=2**22)))
    assert main(["plan", str(recipe), "--topology", SLICE]) == 3
    output, errors = capfd.readouterr()
    assert "an iteration is not reckoned, as the run does not fit" in output and " NO " in output
    assert "does not fit on v5e:2x2; this fits: serving.slots=" in errors.splitlines()[-1]


@pytest.mark.parametrize(("mean", "shortest", "longest"), [(1, 1, 1), (5, 1, 9), (15, 10, 20), (20, 20, 20)])
def test_responses_are_spread_about_their_mean(mean, shortest, longest):
    lengths = response_lengths(CONFIG, mean)
    assert (len(lengths), lengths.min(), lengths.max()) == (CONFIG.rollout.sequences, shortest, longest)
    assert lengths.mean() == pytest.approx(mean, abs=0.1)


@pytest.mark.slow
def test_a_sharding_rule_that_is_missing_does_not_fit(monkeypatch):
    """A billion parameters with Adam's moments and gradients are 16 GB, more than a chip's 95%; a quarter is little."""
    sizes = {"hidden_size": 2048, "intermediate_size": 16_384, "num_layers": 10, "num_heads": 4, "num_kv_heads": 4}
    model = replace(CONFIG.model, remat="full", **sizes)
    config = replace(CONFIG, model=model, mesh=MeshConfig(tensor=4))
    assert 1.0e9 < count_params(model) < 1.2e9

    def planned():
        (step,) = Place.of(config, SLICE).plan(MEAN, lambda line: None, {"train_step"})
        return step

    split = planned()
    monkeypatch.setitem(RULES, "mlp", None)
    whole = planned()
    assert split.fits and not whole.fits
    assert whole.planned.peak_bytes > 2.5 * split.planned.peak_bytes


def test_a_mean_response_needs_as_many_microbatches_as_packing_cuts():
    config = for_tpu(replace(CONFIG, optimizer=replace(CONFIG.optimizer, tokens_per_microbatch=30)))
    # four responses on each chip: no more than two fit, however short, and of the longest one with its prompt
    shortest, between, longest = [microbatches(config, mean) for mean in (1, 10, 20)]
    assert (shortest, longest) == (2, 4) and shortest <= between <= longest
    assert 0 < attended(config, 5) < CONFIG.rollout.max_prompt_length + CONFIG.rollout.max_response_length


def test_a_collectives_time_is_that_of_its_bytes_on_the_links_of_the_axes_that_it_extends_along():
    chip, coords = CHIPS["v5p"], [(x, y, 0) for x in range(4) for y in range(4)]

    def seconds(kind, members):
        return seconds_of(Collective(kind, 1e9, len(members), members, 3, ""), chip, coords)

    along_one, along_two = tuple(range(4)), tuple(range(16))
    assert seconds("all-gather", along_one) == pytest.approx(3e9 / 200e9)
    assert seconds("all-gather", along_two) == pytest.approx(3e9 / 400e9)
    assert seconds("collective-permute", (0, 1)) == pytest.approx(3e9 / 100e9)
    assert seconds("all-gather", ()) == 0


def test_every_kind_of_chip_is_known_by_libtpus_name_or_nvidias():
    kinds = {name: chip_of(f"{name}:2x2").platform for name in CHIPS}
    assert kinds == dict.fromkeys(("v5e", "v5p", "v6e", "tpu7x"), "tpu") | dict.fromkeys(
        ("a100", "h100", "h200", "b200"), "gpu"
    )
    for chip in CHIPS.values():
        assert chip.peak_of("f32") < chip.peak_of("bf16") <= chip.peak_of("f8e4m3fn") <= chip.peak_of("s8")
