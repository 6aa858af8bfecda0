import numpy as np
import pytest

from dcjax.data.arithmetic import build_tokenizer
from dcjax.loop.evaluate import responses
from dcjax.types import Rollout


@pytest.fixture
def rollout():
    """Two problems with two responses each: right, wrong, right but cut at the limit, right with a scratchpad."""
    tokenizer = build_tokenizer()
    texts = [r"\boxed{7}", r"\boxed{8}", r"\boxed{1}", r"4-3=1,\boxed{1}"]
    finished = np.array([True, True, False, True])
    rows = [tokenizer(text)["input_ids"] for text in texts]
    rows = [row + [tokenizer.eos_token_id] * bool(done) for row, done in zip(rows, finished, strict=True)]
    prompt_width, width = 3, max(map(len, rows))
    tokens = np.full((4, prompt_width + width), tokenizer.pad_token_id, np.int32)
    for tokens_of_row, row in zip(tokens, rows, strict=True):
        tokens_of_row[prompt_width : prompt_width + len(row)] = row
        # what stands outside the mask is no text
        tokens_of_row[prompt_width + len(row) :] = tokenizer("9")["input_ids"][0]
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    return (
        tokenizer,
        texts,
        Rollout(
            tokens=tokens,
            attention_mask=np.concatenate([np.ones((4, prompt_width), bool), mask], axis=1),
            response_mask=mask,
            rollout_logps=np.zeros(mask.shape, np.float32),
            temperature=np.ones(4, np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
            finished=finished,
            log_mass=np.zeros(mask.shape, np.float32),
        ),
    )


def test_an_end_that_the_tokenizer_has_for_a_character_is_no_part_of_the_text_either(rollout):
    """As where generation_config.json names one; cut at the limit, a response keeps the character."""
    tokenizer, texts, sampled = rollout
    comma = tokenizer.convert_tokens_to_ids(",")
    tokens = np.where(sampled.tokens == tokenizer.eos_token_id, comma, sampled.tokens)
    assert responses(tokenizer, sampled.replace(tokens=tokens)) == texts
    cut = sampled.replace(tokens=tokens, finished=np.zeros(4, bool))
    assert responses(tokenizer, cut) == [texts[0] + ",", texts[1] + ",", texts[2], texts[3] + ","]


def test_the_text_of_a_response_is_what_its_mask_covers_without_the_end(rollout):
    tokenizer, texts, sampled = rollout
    assert responses(tokenizer, sampled) == texts
