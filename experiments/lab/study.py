"""The laboratory: claims of both papers, and this year's rivals, on two tasks. protocol.md says why each number is so.

dcjax lab                      # what is missing; the same line goes on with what a stopped one has left
dcjax lab --claims A4 --quick  # a first look at one claim
"""

from dataclasses import replace

from dcjax.tools.lab.study import Arm, Claim, LabTask, Study

CORRECTIONS = ("token_tis", "token_mis", "sequence_tis", "sequence_mis")
PERIODS, HEATS, HALVES = (12, 24, 48, 96), (0.6, 1.2), ("bf16", "fp16")
LONG = (
    "task.min_operations=6",
    "task.max_operations=9",
    "rollout.max_prompt_length=21",
    "rollout.max_response_length=80",
)
EXPERTS = ("model.num_experts=8", "model.num_experts_per_tok=2", "model.moe_intermediate_size=96")
TASKS = (
    LabTask("chains", "quickstart", ("steps=100",)),
    LabTask("legs", "leg_counting", ("steps=80", "task.heldout=1024")),
    LabTask("long", "quickstart", ("steps=100", *LONG)),
    LabTask("updates", "quickstart", ("steps=100", "optimizer.updates=4")),
    LabTask("experts", "quickstart", ("steps=100", *EXPERTS)),
    *(
        LabTask(half, "quickstart", ("steps=100", f"model.precision.compute={half}", f"model.precision.head={half}"))
        for half in HALVES
    ),
)
GRPO = "objective.algorithm=grpo"
AUTO = "objective.budget=auto"
PENALTY = ("objective.dual_lr=20", AUTO)
DC = ("objective.algorithm=dc_grpo", "objective.dual_lr=20")
THIS_YEAR = ("dppo_tv", "dppo_kl", "ipo", "ipo_squared", "kpop", "drpo", "opsm", "vexact", "seq_mask_tis", "m2po")

ARMS = (
    Arm("grpo", (GRPO,)),
    Arm("dc", (*DC, AUTO)),
    Arm("dc_tight", (*DC, "objective.budget=0.0015")),
    Arm("tis", (GRPO, "objective.correction=token_tis")),
    Arm("score", (GRPO, "objective.score_centering=true")),
    Arm("centred", (*DC, AUTO, "objective.penalty_form=state_centred")),
    Arm("served", (GRPO, "serving.in_training=all")),
    Arm("direct", ("objective.algorithm=dc_direct", *PENALTY)),
    Arm("constant", (GRPO, "optimizer.decay=constant")),
    Arm("cosine", (GRPO, "optimizer.decay=cosine")),
    Arm("length", (GRPO, "optimizer.decay=length", "optimizer.surge_ratio=1.5")),
    # looked at with three seeds, without verdicts
    *(Arm(name, (GRPO, f"objective.correction={name}")) for name in ("sequence_tis", "token_mis", "sequence_mis")),
    *(Arm(f"dc_{budget}", (*DC, f"objective.budget={budget}")) for budget in (0.0005, 0.005, 0.015)),
    *(
        Arm(shape, (*DC, "objective.budget=0.005", f"objective.penalty={shape}"))
        for shape in ("shifted", "hinge", "gate")
    ),
    *(Arm(f"dc_{signal}", (*DC, AUTO, f"objective.signal={signal}")) for signal in ("ratio", "log_probability")),
    Arm("fixed", ("objective.algorithm=dual_grpo", "objective.initial_multiplier=0.3")),
    *(Arm(f"dc_start_{start}", (*DC, AUTO, f"objective.initial_multiplier={start}")) for start in (0.05, 0.2)),
    *(Arm(f"dc_dual_{rate}", (*DC, AUTO, f"objective.dual_lr={rate}")) for rate in (10, 40)),
    *(Arm(method, (GRPO, f"objective.method={method}")) for method in THIS_YEAR),
    *(
        Arm(f"direct_{signal}", ("objective.algorithm=dc_direct", *PENALTY, f"objective.signal={signal}"))
        for signal in ("total_variation", "kl_from_sampler")
    ),
    *(Arm(f"by_{what}", (GRPO, f"optimizer.decay={what}")) for what in ("discrepancy", "dual")),
    Arm("ess", (GRPO, "optimizer.ess_base=1.0")),
    *(
        Arm(f"constant_{name}", (GRPO, "optimizer.decay=constant", f"objective.correction={name}"))
        for name in CORRECTIONS
    ),
    *(Arm(f"prompts_{prompts}", (GRPO, f"rollout.prompts={prompts}")) for prompts in (8, 16)),
    *(
        Arm(f"period_{period}", (GRPO, "optimizer.decay=period", f"optimizer.decay_period={period}"))
        for period in PERIODS
    ),
    *(
        Arm(f"{name}_{temperature}", (*settings, f"rollout.temperature={temperature}"))
        for name, settings in (("grpo", (GRPO,)), ("dc", (*DC, AUTO)))
        for temperature in HEATS
    ),
    Arm("replay", (GRPO, "rollout.replay_routing=true")),
)

BOTH, FORMATS = ("chains", "legs"), ("int8", "int4")
METHODS = ("dc", "centred", "score", "served", "direct", "tis", "length")


def look(key: str, hypothesis: str, arms, against, *, task="chains", formats=FORMATS, **others) -> Claim:
    """A claim without a verdict: few seeds, all at the rate that is GRPO's best without a mismatch."""
    return Claim(key, hypothesis, arms, against, (task,), formats, verdict=False, rate=6e-4, **others)


CLAIMS = (
    Claim("A4", "DC-GRPO ends better than GRPO under mismatch.", ("dc", "dc_tight"), ("grpo",), BOTH, FORMATS),
    Claim(
        *("N6", "Score centering ends better than GRPO, published DC and TIS."),
        *(("score",), ("grpo", "dc", "tis"), BOTH, FORMATS),
    ),
    Claim(
        *("N10", "The state-centred penalty ends better than GRPO, published DC and TIS."),
        *(("centred",), ("grpo", "dc", "tis"), BOTH, FORMATS),
    ),
    Claim("N7", "Training in the served format ends better than GRPO.", ("served",), ("grpo",), BOTH, FORMATS),
    Claim(
        *("B4", "A rate that decays after the surge of length ends better than other schedules."),
        *(("length",), ("constant", "grpo", "cosine"), BOTH, FORMATS),
    ),
    Claim("N1", "A differentiable constraint ends better than GRPO.", ("direct",), ("grpo",), BOTH, FORMATS),
    look("B3", "Corrections end better.", ("tis", "sequence_tis", "token_mis", "sequence_mis"), ("grpo",)),
    look("A3", "The penalty needs a tolerance.", ("dc_0.0005", "dc_tight", "dc_0.005", "dc_0.015"), ("grpo",)),
    look("A3s", "Its shape matters.", ("shifted", "hinge", "gate"), ("dc_0.005",)),
    look("A1", "The difference of probabilities is the best signal.", ("dc",), ("dc_ratio", "dc_log_probability")),
    look("A7", "A budget from the run itself does as well as a given one.", ("dc",), ("dc_tight", "dc_0.005")),
    look("A2", "A penalty without condition does harm.", ("fixed",), ("grpo", "dc")),
    look(
        *("A5", "λ0 and its rate hardly matter."),
        *(("dc_start_0.05", "dc_start_0.2", "dc_dual_10", "dc_dual_40"), ("dc",)),
    ),
    look("N9", "This year's methods end better.", THIS_YEAR, ("grpo",)),
    look(
        *("N8", "Whole distributions are the better constraint."),
        *(("direct_total_variation", "direct_kl_from_sampler"), ("direct",)),
    ),
    look("N3", "Rates that react end better.", ("by_discrepancy", "by_dual", "ess"), ("grpo",)),
    look(
        *("B6", "At a constant rate, corrections only postpone the collapse."),
        *(tuple(f"constant_{name}" for name in CORRECTIONS), ("constant",)),
        drawn=True,
    ),
    look("D1", "What pays where the gap is that of fp8?", METHODS, ("grpo",), formats=("fp8",)),
    look("D2", "What pays with four updates an iteration?", METHODS, ("grpo",), task="updates"),
    look("D3", "What pays with responses twice as long?", METHODS, ("grpo",), task="long"),
    look("N4", "Replaying the engine's choice of experts ends better.", ("replay",), ("grpo",), task="experts"),
    look(
        *("B1", "The gap grows with the noise of gradients."),
        *(("prompts_8", "prompts_16", "constant"), ("grpo",)),
        metric="gap",
    ),
    look(
        *("B5", "A rate that is halved often enough ends better than a constant one."),
        *(tuple(f"period_{period}" for period in PERIODS), ("constant",)),
        drawn=True,
    ),
    *(look("A6", f"The penalty pays at temperature {heat}.", (f"dc_{heat}",), (f"grpo_{heat}",)) for heat in HEATS),
    *(
        look("B7", f"A rate that decays ends better in {half}.", ("length",), ("constant",), task=half, formats=(half,))
        for half in HALVES
    ),
)

EIGHT, FOUR, EXPERT = "dcmdp_qwen3_8b", "length_decay_qwen3_4b", "dcmdp_qwen3_30b_a3b"
FULL = {
    "A4": (f"{EIGHT} serving.format=int8 {AUTO}", f"{EXPERT} serving.format=int8 {AUTO}"),
    "N6": (f"{EIGHT} {GRPO} objective.score_centering=true serving.format=int8",),
    "N10": (f"{EIGHT} objective.penalty_form=state_centred serving.format=int8 {AUTO}",),
    "N7": (f"{EIGHT} {GRPO} serving.in_training=all serving.format=int8",),
    "B4": (f"{FOUR} optimizer.decay=length",),
    "N1": (f"{EIGHT} objective.algorithm=dc_direct serving.format=int8 {AUTO}",),
    "B3": (f"{FOUR} objective.correction=token_tis",),
    "A3": (f"{EIGHT} objective.budget=0.0027",),
    "A3s": (f"{EIGHT} objective.penalty=hinge",),
    "A1": (f"{EIGHT} objective.signal=ratio",),
    "A7": (f"{EIGHT} {AUTO}",),
    "A2": (f"{EIGHT} objective.algorithm=dual_grpo",),
    "A5": (f"{EIGHT} objective.initial_multiplier=0.05",),
    "N9": (f"{EIGHT} {GRPO} objective.method=dppo_tv",),
    "N8": (f"{EIGHT} objective.algorithm=dc_direct objective.signal=total_variation {AUTO}",),
    "N3": (f"{FOUR} optimizer.decay=discrepancy",),
    "B6": (f"{FOUR} optimizer.decay=constant objective.correction=sequence_mis",),
    "D1": (f"{EIGHT} serving.format=fp8 {AUTO}",),
    "D2": (f"{EIGHT} optimizer.updates=8 {AUTO}",),
    "D3": (f"{EIGHT} rollout.max_response_length=16384 optimizer.tokens_per_microbatch=34816 {AUTO}",),
    "N4": (f"{EXPERT} {GRPO} rollout.replay_routing=true",),
    "B1": (f"{FOUR} rollout.prompts=16",),
    "B5": (f"{FOUR} optimizer.decay_period=125",),
    "A6": ("case_study_1_5b rollout.temperature=0.6", "case_study_1_5b rollout.temperature=1.2"),
    "B7": (
        FOUR,
        f"{FOUR} model.precision.compute=fp16 model.precision.head=fp16 serving.format=fp16",
    ),
}
"""The same question at the papers' scale: a recipe and its fields, by claim."""


def study() -> Study:
    """All of it: ten fresh seeds, two that tune, three for a first look."""
    return Study(
        name="lab",
        tasks=TASKS,
        arms=ARMS,
        formats=FORMATS,
        claims=tuple(replace(claim, full=FULL[claim.key]) for claim in CLAIMS),
        seeds=tuple(range(200, 210)),
        few_seeds=(200, 201, 202),
        tuning_seeds=(100, 101),
        rates=(3e-4, 6e-4, 1.2e-3),
        metric="deployed",
        common=(
            # a number, which arms without a multiplier need; those that ascend say their own
            *("objective.budget=0.0015", "optimizer.decay=linear", "optimizer.ema_decay=0.97", "evaluation.every=1000"),
            *("evaluation.prompts=1024", "checkpoint.every=1000", "checkpoint.keep=1"),
        ),
    )
