"""DC-GRPO of a tiny Qwen3 on reasoning-gym's leg_counting (`pip install 'dcjax[tasks]'`), whose responses grow.

A warm start teaches it to answer mostly at once, and now and then animal by animal; RL finds out that this pays.
"""

import functools
import re
from dataclasses import dataclass, replace

from dcjax.data.gym import GymTask
from dcjax.data.templates import TemplateName
from dcjax.models import ModelConfig
from dcjax.recipe.config import Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig

TOKEN = r" ?[A-Za-z]+|[\s\S]"
"""A word with the space before it, or one character."""


@dataclass(frozen=True)
class LegCounting(GymTask):
    """Legs of some animals, as of "3 dogs, 2 crabs", with a token for each word and digit."""

    datasets: tuple[str, ...] = ("leg_counting(min_animals=2, max_animals=4, max_instances=3)",)
    template: TemplateName = "last_line"
    heldout: int = 512
    max_prompt_tokens: int = 52

    @property
    def asked(self):
        """The question alone: a warm start shows where the answer stands."""
        return replace(super().asked, after="")

    def reasoning(self, entry):
        """`3*4=12,2*10=20,12+20=32,` and a new line."""
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        total, written = 0, ""
        for animal, count in entry["metadata"]["animals"].items():
            legs = count * ANIMALS[animal]
            written += f"{count}*{ANIMALS[animal]}={legs},"
            written += f"{total}+{legs}={total + legs}," if total else ""
            total += legs
        return written + "\n"

    def build_tokenizer(self, pretrained):
        """Words of the questions, digits and signs."""
        return _tokenizer()


@functools.cache
def _tokenizer():
    from reasoning_gym.arithmetic.leg_counting import ANIMALS, QUESTION_TEMPLATE
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = QUESTION_TEMPLATE + "".join(f" {name}, {name}s" for name in ANIMALS) + "0123456789+*=,"
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(re.findall(TOKEN, text)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def config() -> Config:
    """The quickstart's settings, for longer prompts and responses."""
    return Config(
        name="leg_counting",
        steps=80,
        task=LegCounting(),
        model=ModelConfig(vocab_size=128),
        warm_start=WarmStartConfig(steps=400),
        rollout=RolloutConfig(max_prompt_length=52, max_response_length=72),
        objective=ObjectiveConfig(budget="auto", zero_variance="drop"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        evaluation=EvaluationConfig(every=20),
    )
