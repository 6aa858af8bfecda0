import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.datasets import datasets
from dcjax.data.templates import templates
from dcjax.data.tokenizers import byte_tokenizer

# as Qwen's, reduced to one turn
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = byte_tokenizer()
# what a response that follows the template ends in
ENDINGS = {
    "boxed": "So it is $\\boxed{%s}$.",
    "dapo": "So it is.\nAnswer: %s",
    "tags": "So it is.\n<answer>%s</answer>.",
    "last_line": "So it is.\n%s",
    "bare": "%s",
}
QUESTIONS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def chatty():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("name", templates)
@given(answer=st.from_regex(r"-?[0-9]{1,9}|\\frac\{[0-9]{1,3}\}\{[0-9]{1,3}\}|\([0-9],[0-9]\)", fullmatch=True))
def test_the_extractor_reads_what_its_template_asks_for(name, answer):
    template = templates[name]
    assert template.extract(ENDINGS[name] % answer) == answer


@pytest.mark.parametrize("name", templates)
def test_the_reward_judges_what_the_template_asks_for(name):
    template = templates[name]
    response = ENDINGS[name] % 34
    assert template.reward(response, "34", finished=True) == 1.0
    assert template.reward(response, "35", finished=True) == 0.0
    assert template.reward(response, "34", finished=False) == 0.0


@pytest.mark.parametrize("name", templates)
def test_an_answer_that_is_shown_is_found(name):
    assert templates[name].extract(templates[name].show("34")) == "34"


def test_one_templates_answer_is_none_to_the_other():
    assert templates["boxed"].extract(ENDINGS["dapo"] % 3) is None
    assert templates["dapo"].extract(ENDINGS["boxed"] % 3) is None


@pytest.mark.parametrize("name", templates)
@given(question=QUESTIONS)
def test_a_prompt_holds_the_question_whole(name, question):
    before, after = templates[name].message("\0").split("\0")
    prompt = templates[name].prompt(PLAIN, question)
    assert prompt == before + question + after
    asks = {"boxed": r"\boxed{}", "dapo": "Answer:", "tags": "<answer>", "last_line": "last line", "bare": ""}
    assert asks[name] in after


def test_a_chat_template_makes_a_turn_of_the_message(chatty):
    template = templates["boxed"]
    assert template.prompt(chatty, "How many?") == (
        f"<|im_start|>user\n{template.message('How many?')}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_as_published_is_rebuilt_from_the_question_that_is_stored():
    published = templates["dapo"].message("How many?")
    row = {"prompt": [{"role": "user", "content": published}], "reward_model": {"ground_truth": "3"}}
    example = datasets["dapo-math-17k"].example(row)
    assert example.question == "How many?"
    assert templates["dapo"].message(example.question) == published


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Answer: 34", "34"),
        ("Answer:34\n", "34"),
        ("answer : 5\nAnswer: $\\frac12$ \nAs said.", "\\frac12"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer: \\boxed{2}.", "2"),
        ("Answer: 1" + " " * 300, None),
        ("x" * 1000 + "Answer: 1", "1"),
        ("Answer:\n34", "34"),
        ("Answer: `$13$`", "13"),
        ("34", None),
        ("", None),
    ],
)
def test_the_last_answer_line_counts_near_the_end(text, answer):
    assert templates["dapo"].extract(text) == answer
