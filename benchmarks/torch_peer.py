"""Hugging Face's model in PyTorch, timed on request by models.py in an interpreter that has torch and transformers.

    python torch_peer.py FOLDER TOKENS.npy CORES

For each line read, "forward" or "update", it runs that once and answers with a line of JSON: cpu and wall (seconds) and
loss, the mean negative log-likelihood of every token but the first (NaN for a forward).
"""

import json
import math
import sys
import time

import numpy as np
import torch  # pyrefly: ignore[missing-import]  (the extra parity)
from transformers import AutoModelForCausalLM


def main() -> None:
    """Answers until its input ends."""
    folder, tokens, cores = sys.argv[1:]
    torch.set_num_threads(int(cores))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(np.load(tokens)).long()
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = forward(model, ids) if line.strip() == "forward" else update(model, ids)
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "loss": loss}
        print(json.dumps(answer), flush=True)


def forward(model, ids) -> float:
    """Logits of every column."""
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return math.nan


def update(model, ids) -> float:
    """The loss and its gradients."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
