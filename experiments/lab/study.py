"""The laboratory: claims of both papers, and this year's rivals, on two tasks. protocol.md says why each number is so.

dcjax lab                      # what is missing; the same line goes on with what a stopped one has left
dcjax lab --claims A4 --quick  # a first look at one claim
"""

from dcjax.tools.lab.study import Arm, Claim, LabTask, Study

TASKS = (
    LabTask("chains", "quickstart", ("steps=100",)),
    LabTask("legs", "leg_counting", ("steps=80", "task.heldout=1024")),
)
GRPO = "objective.algorithm=grpo"
PENALTY = ("objective.dual_lr=20", "objective.budget=auto")

ARMS = (
    Arm("grpo", (GRPO,)),
    Arm("dc", ("objective.algorithm=dc_grpo", *PENALTY)),
    Arm("dc_tight", ("objective.algorithm=dc_grpo", "objective.dual_lr=20", "objective.budget=0.0015")),
    Arm("tis", (GRPO, "objective.correction=token_tis")),
    Arm("score", (GRPO, "objective.score_centering=true")),
    Arm("centred", ("objective.algorithm=dc_grpo", "objective.penalty_form=state_centred", *PENALTY)),
    Arm("served", (GRPO, "serving.in_training=all")),
    Arm("direct", ("objective.algorithm=dc_direct", *PENALTY)),
    Arm("constant", (GRPO, "optimizer.decay=constant")),
    Arm("cosine", (GRPO, "optimizer.decay=cosine")),
    Arm("length", (GRPO, "optimizer.decay=length", "optimizer.surge_ratio=1.5")),
)

BOTH, FORMATS = ("chains", "legs"), ("int8", "int4")
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
)


def study() -> Study:
    """All of it: ten fresh seeds, two that tune, three for a first look."""
    return Study(
        name="lab",
        tasks=TASKS,
        arms=ARMS,
        formats=FORMATS,
        claims=CLAIMS,
        seeds=tuple(range(200, 210)),
        few_seeds=(200, 201, 202),
        tuning_seeds=(100, 101),
        rates=(3e-4, 6e-4, 1.2e-3),
        common=(
            *("optimizer.decay=linear", "optimizer.ema_decay=0.97", "evaluation.every=1000"),
            *("evaluation.prompts=1024", "checkpoint.every=1000", "checkpoint.keep=1"),
        ),
    )
