"""What objectives take from the sampler's distributions: a penalty's and the score's mean in each state, gaps."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dcjax.rl import distributions
from dcjax.rl.discrepancy import Signal, probability_difference
from dcjax.rl.objective import HeadQuantity, Objective, Requirements
from dcjax.rl.penalties import PenaltyShape, linear
from dcjax.rl.transforms import LossTransform, chain, report_quantities, score_centering

EXPECTED_PENALTY, ERROR_BOUND = "expected_penalty", "expected_penalty_error_bound"
"""Names of quantities: a penalty's mean under μ in the state, and the most by which it can be wrong."""
GAPS = {
    "total_variation": distributions.TOTAL_VARIATION,
    "kl_from_sampler": distributions.KL_FROM_SAMPLER,
    "kl_to_sampler": distributions.KL_TO_SAMPLER,
}
"""The δ's of whole distributions by name."""
MOST_PROBABLE_DIFFERS = HeadQuantity("most_probable_differs", distributions.most_probable_differs, old=True)
EXPECTED_SCORE = "expected_score"
"""The name of a quantity: C of score centering."""


class StateBaseline(NamedTuple):
    """The mean of a penalty under μ in each state, for a penalty that is centred on the state."""

    requires: Requirements
    """The quantity `EXPECTED_PENALTY`, and what it is computed from."""

    @classmethod
    def exact(cls, signal: Signal = probability_difference, shape: PenaltyShape = linear) -> StateBaseline:
        """Σ_v μ_v pen(δ_v) over the whole vocabulary.

        Args:
          signal: δ of one token; `sided` gives it other sides. It must be the penalty's.
          shape: pen, the penalty's.
        """
        quantity = HeadQuantity(EXPECTED_PENALTY, distributions.expected_penalty(signal, shape), old=True)
        return cls(Requirements(quantities=(quantity,), sampler_distributions=True))

    @classmethod
    def of_head(cls, size: int) -> StateBaseline:
        """Σ_v μ_v |π_v − μ_v| from the sampler's `size` most probable tokens, with a bound of what is then wrong.

        Raises:
          ValueError: a size below 1.
        """
        if size < 1:
            raise ValueError(f"size is {size}; the sampler's head must have at least 1 token")
        quantities = {
            EXPECTED_PENALTY: distributions.expected_penalty_of_head,
            ERROR_BOUND: distributions.head_error_bound,
        }
        held = tuple(HeadQuantity(name, compute, old=True) for name, compute in quantities.items())
        return cls(Requirements(quantities=held, sampler_head=size))

    @property
    def report(self) -> LossTransform:
        """What logs the bound, as `centred/error_bound`, where there is one."""
        return report_quantities({"centred/error_bound": ERROR_BOUND} if self.requires.sampler_head else {})


def with_distribution_metrics(objective: Objective) -> Objective:
    """The objective that logs how far whole distributions are apart, at the rollout's weights.

    Per-row metrics, each the mean over the response: `distribution/total_variation`, `distribution/kl_from_sampler`
    and `distribution/kl_to_sampler` (nats), and `distribution/most_probable_differs`, the share of states in which the
    two policies' most probable tokens are not the same.
    """
    held = Requirements.joined(*map(Requirements.of, GAPS.values()), Requirements(quantities=(MOST_PROBABLE_DIFFERS,)))
    names = {f"distribution/{name}": name for name in held.of_old_head}
    return dataclasses.replace(
        objective,
        transform=chain(objective.transform, report_quantities(names)),
        requires=Requirements.joined(objective.requires, held),
    )


def with_score_centering(
    objective: Objective, *, weight: distributions.Weight = distributions.unweighted, head: int = 0
) -> Objective:
    """The objective with L += Ã · C, which takes the score's mean under μ out of each state (arXiv 2609.20807).

    On small models it gains from the mismatch at int4, and nothing that could be told at int8 (docs/findings.md, N6).

    Args:
      objective: what sets the advantages, with a penalty or without; its surrogate should be unclipped at ratio 1.
      weight: of the objective's importance correction, as a function of a token's ratio π/μ.
      head: how many of the sampler's most probable tokens C is computed from, as published; 0 is all tokens.
    """
    compute = distributions.expected_score_of_head(weight) if head else distributions.expected_score(weight)
    quantity = HeadQuantity(EXPECTED_SCORE, compute)
    needed = Requirements(quantities=(quantity,), sampler_distributions=not head, sampler_head=head)
    return dataclasses.replace(
        objective,
        transform=chain(objective.transform, score_centering(EXPECTED_SCORE)),
        requires=Requirements.joined(objective.requires, needed),
    )
