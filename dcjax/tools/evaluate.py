"""`dcjax evaluate SOURCE`: accuracy of a run's policies on its held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcjax.loop.evaluate import Accuracy, evaluate, evaluate_average
from dcjax.loop.reward_collector import check_golds, open_rewards
from dcjax.loop.setup import Setup
from dcjax.recipe.build import make_engines, open_problems, optimizer_of
from dcjax.tools.open_model import open_model, require_run


@dataclass(frozen=True)
class Evaluation:
    """The accuracies of a run's policies at one checkpoint."""

    step: int
    temperature: float
    rows: list[Accuracy]


def evaluate_source(
    source: Path,
    *,
    prompts: int | None = None,
    temperature: float | None = None,
    format: str | None = None,
    recipe_code: bool = True,
) -> Evaluation:
    """Accuracies of a run's newest checkpoint, or of one checkpoint in it; None takes the run's own setting.

    Args:
      source: a run directory, or RUN/checkpoints/STEP.
      prompts: how many held-out prompts, with one sample each.
      temperature: of sampling; 0 is greedy.
      format: the serving format.
      recipe_code: whether code of the run's own may be executed where its sections are not all of dcjax.

    Raises:
      RunError: there is no such run or checkpoint, it is damaged, or a setting is out of range.
    """
    require_run(source, "dcjax evaluate --suite takes it")
    settings = {"prompts": prompts, "temperature": temperature}
    model = open_model(source, recipe_code=recipe_code, serving={"format": format}, evaluation=settings)
    config = model.config
    opened = open_rewards(config)
    problems = open_problems(config, model.tokenizer)
    engines = make_engines(config, model.mesh, model.end_tokens)
    check_golds(config, problems)
    step = model.version
    with opened as rewards:
        setup = Setup(config, rewards, model.tokenizer, problems, model.mesh, model.end_tokens, engines)
        rows = evaluate(setup, engines, model.params(), step)
        if optimizer_of(config).ema_decay:
            rows += evaluate_average(setup, model.average(), step)
    return Evaluation(step, config.evaluation.temperature, rows)
