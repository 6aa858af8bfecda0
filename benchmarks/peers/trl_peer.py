"""TRL's `GRPOTrainer` with rollouts by transformers: the whole step.

A batch is decoded until its longest response has ended, with all its rows; so shorter ones are cut afterwards. Against
padding this trainer has no option (its padding-free batches are for other trainers): all rows are padded to the longest
of the 128, in all microbatches.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch  # pyrefly: ignore[missing-import]
import transformers
import trl  # pyrefly: ignore[missing-import]
import work  # pyrefly: ignore[missing-import]
from datasets import Dataset  # pyrefly: ignore[missing-import]
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

MICROBATCH_SIZE = 32
"""Rows in one forward and backward pass."""


class CutTrainer(trl.GRPOTrainer):
    """Trains on responses that end at given lengths."""

    def __init__(self, lengths: np.ndarray, **settings):
        super().__init__(**settings)
        self._lengths = lengths

    def _generate_single_turn(self, *args, **kwargs):
        sampled, logps = super()._generate_single_turn(*args, **kwargs)
        self.responses = work.cut(sampled, self._lengths)
        return self.responses, logps


class Held(transformers.TrainerCallback):
    """Holds the trainer before each of its steps, the loading of its data included."""

    def __init__(self, loop: work.Loop):
        self._loop = loop

    def on_train_begin(self, *args, **kwargs):
        """Before the first step."""
        self._loop.hold()

    def on_step_end(self, *args, **kwargs):
        """Before the next step."""
        self._loop.hold()


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A character a token, and the end token. Padding, which masks know, is a token that the model has embedded."""
    characters = {character: token for token, character in enumerate(work.text(range(work.VOCABULARY)))}
    tokenizer = Tokenizer(models.WordLevel(characters | {"<end>": work.NO_TOKEN}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token=work.text([0]), clean_up_tokenization_spaces=False
    )


def settings(folder: str) -> trl.GRPOConfig:
    """One update a batch, no reference policy, nothing written or shown."""
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=MICROBATCH_SIZE,
        gradient_accumulation_steps=work.ROWS // MICROBATCH_SIZE,
        num_generations=work.GROUP_SIZE,
        max_completion_length=work.RESPONSE_LENGTH,
        temperature=1.0,
        top_k=0,
        num_iterations=1,
        beta=0.0,
        epsilon=work.CLIP,
        learning_rate=work.LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=work.BETA1,
        adam_beta2=work.BETA2,
        adam_epsilon=work.EPSILON,
        weight_decay=0.0,
        max_grad_norm=work.MAX_GRAD_NORM,
        max_steps=1_000_000,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    """Answers until its input ends."""
    folder = Path(sys.argv[1])
    lengths = work.lengths(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)

    def logits(tokens):
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    def rewards(completion_ids, **kwargs):
        return [work.reward(response) for response in completion_ids]

    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    about = {"versions": versions, "logit_error": work.check_logits(folder, logits)}
    loop, rollout = work.Loop(), work.Timed(model.generate)
    model.generate = rollout
    with tempfile.TemporaryDirectory() as output:
        trainer = CutTrainer(
            lengths,
            model=model,
            reward_funcs=rewards,
            args=settings(output),
            train_dataset=Dataset.from_dict({"prompt": [work.text(prompt) for prompt in work.prompts(folder)]}),
            processing_class=build_tokenizer(),
            callbacks=[Held(loop)],
        )
        loop.start(trainer.train)
        work.serve(
            about,
            step=loop.step,
            rollout=rollout,
            sampled=lambda tokens: trainer.responses,
            parameters=lambda: [leaf.detach().numpy().copy() for leaf in model.parameters()],
            lengths=lengths,
        )


if __name__ == "__main__":
    main()
