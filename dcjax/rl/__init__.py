"""What is optimised and how: pure functions over arrays, which never import models or serving."""

from dcjax.rl.advantages import batch_baseline, group_relative, leave_one_out
from dcjax.rl.averaging import averaged_params, params_ema
from dcjax.rl.by_response import opsm, seq_mask_tis, vexact
from dcjax.rl.corrections import (
    geometric_mis,
    geometric_tis,
    icepop_mask,
    masked_importance_weights,
    sequence_mis,
    sequence_tis,
    token_mis,
    token_tis,
    truncated_importance_weights,
)
from dcjax.rl.discrepancy import log_probability_difference, measure, probability_difference, probability_ratio
from dcjax.rl.dual import dual_ascent
from dcjax.rl.learning_rate import (
    Surge,
    discrepancy_decay,
    dual_learning_rate,
    length_decay,
    scale_by_sequence_ess,
)
from dcjax.rl.loss_scale import dynamic_loss_scale
from dcjax.rl.losses import cispo, clipped_surrogate, gspo, kl_estimate, policy_gradient, unit_ratio
from dcjax.rl.masked import seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_mean
from dcjax.rl.metrics import mismatch_metrics
from dcjax.rl.objective import HeadQuantity, Iteration, IterationQuantity, MinibatchQuantity, Objective, Requirements
from dcjax.rl.packing import Packing
from dcjax.rl.penalties import as_published, centred_on_response, gate, hinge, linear, penalize, shifted
from dcjax.rl.presets import dc_direct, dc_grpo, dual_grpo, grpo, thresholded_dual_grpo, verl_correction, with_method
from dcjax.rl.step import PolicyOutputs, make_train_step
from dcjax.rl.transforms import (
    Context,
    Terms,
    batch_baseline_advantages,
    chain,
    direct_penalty,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
    kl_penalty,
    leave_one_out_advantages,
)
from dcjax.rl.trust_regions import dppo_kl, dppo_tv, drpo, ipo, kpop, m2po

__all__ = [
    "Context",
    "HeadQuantity",
    "Iteration",
    "IterationQuantity",
    "MinibatchQuantity",
    "Objective",
    "Packing",
    "PolicyOutputs",
    "Requirements",
    "Surge",
    "Terms",
    "as_published",
    "averaged_params",
    "batch_baseline",
    "batch_baseline_advantages",
    "centred_on_response",
    "chain",
    "cispo",
    "clipped_surrogate",
    "dc_direct",
    "dc_grpo",
    "direct_penalty",
    "discrepancy_decay",
    "discrepancy_penalty",
    "dppo_kl",
    "dppo_tv",
    "drop_zero_variance",
    "drpo",
    "dual_ascent",
    "dual_grpo",
    "dual_learning_rate",
    "dynamic_loss_scale",
    "gate",
    "geometric_mis",
    "geometric_tis",
    "group_relative",
    "group_relative_advantages",
    "grpo",
    "gspo",
    "hinge",
    "icepop_mask",
    "ipo",
    "kl_estimate",
    "kl_penalty",
    "kpop",
    "leave_one_out",
    "leave_one_out_advantages",
    "length_decay",
    "linear",
    "log_probability_difference",
    "m2po",
    "make_train_step",
    "masked_importance_weights",
    "measure",
    "mismatch_metrics",
    "opsm",
    "params_ema",
    "penalize",
    "policy_gradient",
    "probability_difference",
    "probability_ratio",
    "scale_by_sequence_ess",
    "seq_mask_tis",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "sequence_mis",
    "sequence_tis",
    "shifted",
    "thresholded_dual_grpo",
    "token_mean",
    "token_mis",
    "token_tis",
    "truncated_importance_weights",
    "unit_ratio",
    "verl_correction",
    "vexact",
    "with_method",
]
