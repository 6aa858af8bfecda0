"""Makes hf_tiny_llama, hf_tiny_qwen3_yarn and rope_frequencies.json: what PyTorch and transformers compute.

    python tests/data/make_hf_tiny.py

It needs torch (any 2.x, on a CPU) and transformers 5, which dcjax itself does not. A folder holds a random float32
model as transformers saves it, the same config in the style before transformers 5 (config_classic.json), and
reference.npz: ids, as they are and with padding on the right and on the left, masks, logits, and 16 greedy tokens
after a prompt. The sequences are longer than original_max_position_embeddings, and queries and keys large, so that
scaled RoPE is far from plain RoPE. rope_frequencies.json has the frequencies and the factor of sines and cosines, for
scalings of released models and for extreme ones.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, __version__
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DATA = Path(__file__).parent
ROWS, COLUMNS, PROMPT, GREEDY = 2, 40, 24, 16

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 6.0, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={**LLAMA3, "rope_theta": 100.0, "original_max_position_embeddings": 24},
    ),
    "qwen3_yarn": Qwen3Config(
        **SIZES,
        head_dim=32,
        tie_word_embeddings=False,
        rope_parameters={**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 16},
    ),
}


def rescale(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: norms about 1, the rest so that logits and scores are about 1."""
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * drawn
        else:
            value = drawn * parameter.shape[-1] ** -0.5 * (1.5 if "q_proj" in name or "k_proj" in name else 0.7)
        parameter.data.copy_(value)


def classic(fields: dict) -> dict:
    """A config.json in the style before transformers 5."""
    fields = dict(fields)
    rope = dict(fields.pop("rope_parameters"))
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_theta"] = rope.pop("rope_theta")
    return fields | {"rope_scaling": rope, "transformers_version": "4.51.0"}


def reference(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Ids, masks, logits and greedy tokens by name."""

    def logits(ids, mask):
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        given = (torch.tensor(x, dtype=torch.long) for x in (ids, mask, positions))
        return model(**dict(zip(("input_ids", "attention_mask", "position_ids"), given, strict=True))).logits.numpy()

    ids = rng.integers(3, SIZES["vocab_size"], (ROWS, COLUMNS)).astype(np.int32)
    real = COLUMNS - np.arange(ROWS)[:, None] * 7
    right = (np.arange(COLUMNS) < real).astype(np.int32)
    left = right[:, ::-1].copy()
    arrays = {"input_ids": ids, "logits": logits(ids, np.ones_like(ids))}
    for side, mask in (("right", right), ("left", left)):
        padded = np.zeros_like(ids)
        for row, length in enumerate(real[:, 0]):
            padded[row, mask[row] == 1] = ids[row, :length]
        arrays |= {f"{side}_input_ids": padded, f"{side}_attention_mask": mask, f"{side}_logits": logits(padded, mask)}
    tokens = ids[:, :PROMPT]
    for _ in range(GREEDY):
        tokens = np.concatenate([tokens, logits(tokens, np.ones_like(tokens))[:, -1:].argmax(-1)], axis=1)
    return arrays | {"greedy_prompt": ids[:, :PROMPT], "greedy_tokens": tokens[:, PROMPT:].astype(np.int32)}


QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK_YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    # Llama 3.2 and 3.1, Qwen3, DeepSeek-V3, gpt-oss
    (5e5, 64, LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
    (5e5, 128, LLAMA_3 | {"factor": 8.0, "original_max_position_embeddings": 8192}),
    (1e6, 128, QWEN_YARN),
    (1e4, 64, DEEPSEEK_YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    (1.5e5, 64, QWEN_YARN | {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
    # what multiplies sines and cosines
    (1e4, 16, DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}),
    (1e4, 16, DEEPSEEK_YARN | {"mscale": 0.707}),
    (1e4, 16, DEEPSEEK_YARN | {"attention_factor": 1.25}),
    # all frequencies divided, all but one kept, one step between two pairs, and no scaling at all
    (1e4, 32, LLAMA_3 | {"factor": 2.5, "original_max_position_embeddings": 3}),
    (1e4, 32, LLAMA_3 | {"factor": 2.5, "original_max_position_embeddings": 2**20}),
    (1e4, 32, QWEN_YARN | {"original_max_position_embeddings": 4}),
    (2.0, 32, QWEN_YARN | {"original_max_position_embeddings": 2**20}),
    (1e4, 32, QWEN_YARN | {"beta_fast": 5.0, "beta_slow": 5.0, "truncate": False}),
    (1e4, 8, QWEN_YARN | {"original_max_position_embeddings": 6, "beta_fast": 1.0}),
    (1e4, 32, QWEN_YARN | {"factor": 1.0}),
    (1e4, 32, LLAMA_3 | {"factor": 1.0, "original_max_position_embeddings": 64}),
]


def frequencies(theta: float, head_dim: int, scaling: dict) -> dict:
    """A row of rope_frequencies.json."""
    parameters = {"rope_theta": theta, **scaling}
    sizes = {"hidden_size": head_dim, "num_attention_heads": 1, "head_dim": head_dim}
    config = SimpleNamespace(**sizes, rope_parameters=parameters, standardize_rope_params=lambda: None)
    inverse, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    return {"head_dim": head_dim, **parameters, "frequencies": inverse.tolist(), "amplitude": amplitude}


def main() -> None:
    for number, (name, config) in enumerate(CONFIGS.items()):
        folder = DATA / f"hf_tiny_{name}"
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        rescale(model, torch.Generator().manual_seed(number))
        model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config_classic.json").write_text(json.dumps(classic(fields), indent=1) + "\n")
        with torch.no_grad():
            np.savez_compressed(folder / "reference.npz", **reference(model, np.random.default_rng(number)))
    rows = [json.dumps(frequencies(*case)) for case in SCALINGS]
    head = json.dumps({"transformers": __version__, "torch": torch.__version__})[1:-1]
    (DATA / "rope_frequencies.json").write_text(f'{{{head}, "cases": [\n' + ",\n".join(rows) + "\n]}\n")


if __name__ == "__main__":
    main()
