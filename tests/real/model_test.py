"""The imported model computes and says what its definition says, token by token."""

from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from dcjax.data.chat import chat_prompt
from dcjax.data.task import encode
from dcjax.loop.evaluate import responses
from dcjax.models import forward, load_hf
from dcjax.recipe.build import build_engine
from dcjax.serving.rollout import sample_responses
from dcjax.tools.open_model import open_model

pytestmark = pytest.mark.slow

END = 2
CAPITAL, SUM, SKY = "What is the capital of France?", "What is 17 + 25?", "Why is the sky blue? Answer in one sentence."
LONG = f"Summarise this text.\n\n{(Path(__file__).parents[2] / 'LICENSE').read_text()}"


@pytest.fixture(scope="module")
def definition(gguf_file):
    from llama_of_gguf import Llama

    return Llama(gguf_file)


@pytest.fixture(scope="module")
def prompts(folder):
    """Token ids of the chat prompts, by the message."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = (CAPITAL, SUM, SKY, LONG)
    return dict(zip(messages, encode(tokenizer, [chat_prompt(tokenizer, each) for each in messages]), strict=True))


def test_the_tokenizer_spells_a_chat_as_published(folder, prompts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    system = [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    question = [1780, 314, 260, 3575, 282, 4649, 47]
    assert prompts[CAPITAL] == [1, 9690, 198, *system, END, 198, 1, 4093, 198, *question, END, 198, 1, 520, 9531, 198]
    assert tokenizer.eos_token_id == END
    text = "  Naïve café, 12345 ≠ 0!\n\n\t<|im_start|>日本語 🙂\r\n"
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


@pytest.mark.parametrize(("message", "length"), [(CAPITAL, 37), (LONG, 300)])
def test_logits_are_those_of_the_definition(definition, folder, prompts, message, length):
    """Within what float32 rounds: the definition in NumPy's float32 is off by 6e-5 and 2.7e-4 at the most.

    With theta a thousandth larger the root of the mean square is 5e-4, and with an epsilon of 1e-6 4e-3.
    """
    config, params = load_hf(folder)
    tokens = np.array(prompts[message][:length])
    wanted = definition.logits(tokens)
    assert wanted.shape == (length, 49_152)
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, params, tokens[None]))[0]
    off = logits - wanted
    assert np.sqrt(np.mean(off**2)) < 5e-5
    assert np.abs(off).max() < 5e-4


def test_greedy_text_is_that_of_the_definition(definition, folder, prompts):
    """Whatever the key of a sample, and to its end.

    One forward tells: where each token is the likeliest behind all before it, greedy sampling finds the same ones. The
    two largest logits are at least .04 apart in the first two texts, and .002 in the third.
    """
    sizes = {"max_prompt_length": 64, "max_response_length": 64}
    model = open_model(folder, serving={"format": "float32"}, rollout=sizes)
    engine = build_engine(model.config, model.mesh, model.end_tokens)
    asked = [prompts[message] for message in (CAPITAL, SUM, SKY)]
    settings = {"samples_per_prompt": 2, "temperature": 0.0, "key": jax.random.key(0)}
    rollout = sample_responses(engine, engine.sync(model.params(), 0), asked, **settings)
    texts = responses(model.tokenizer, rollout)
    assert texts[0::2] == texts[1::2]
    # it computes no better than other models of its size
    assert texts[0:4:2] == ["The capital of France is Paris.", "17 + 25 = 32."]
    assert texts[4].startswith("The sky is blue because")
    for prompt, tokens, mask in zip(asked, rollout.tokens[::2, -64:], rollout.response_mask[::2], strict=True):
        said = tokens[mask]
        likeliest = definition.logits(np.array([*prompt, *said[:-1]]))[len(prompt) - 1 :].argmax(axis=-1)
        np.testing.assert_array_equal(said, likeliest)
        assert said[-1] == END
