"""Hugging Face `generate` with its cache in float32: the rollout alone.

A batch is decoded until its longest response has ended, with all its rows; so shorter ones are cut afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch  # pyrefly: ignore[missing-import]
import transformers
import work  # pyrefly: ignore[missing-import]


def main() -> None:
    """Answers until its input ends."""
    folder = Path(sys.argv[1])
    lengths = work.lengths(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.eval()
    prompts = torch.tensor(work.prompts(folder))
    repeated = prompts.repeat_interleave(work.GROUP_SIZE, dim=0)
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=None,
        max_new_tokens=int(lengths.max()),
        eos_token_id=None,
        pad_token_id=work.NO_TOKEN,
    )

    def generate():
        with torch.inference_mode():
            return model.generate(repeated, attention_mask=torch.ones_like(repeated), generation_config=settings)

    def logits(tokens):
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    rollout = work.Timed(generate)
    work.serve(
        {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "logit_error": work.check_logits(folder, logits),
        },
        step=rollout,
        rollout=rollout,
        sampled=lambda tokens: work.cut(tokens[:, work.PROMPT_LENGTH :].numpy(), lengths),
        parameters=lambda: [leaf.detach().numpy().copy() for leaf in model.parameters()],
        lengths=lengths,
    )


if __name__ == "__main__":
    main()
