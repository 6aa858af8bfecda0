"""Chat templates: what they render, what they are told, and what is wrong with them."""

import string
from datetime import datetime

import pytest

from dcjax.data.chat import chat_prompt, dated
from dcjax.data.tokenizers import byte_tokenizer

# as Qwen3's, reduced to one turn
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
ASKED = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
MOMENT = datetime(2024, 2, 3, 4, 5, 6)


def templated(text):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


# --- thinking, and a start of the answer ---


@pytest.mark.parametrize(
    ("thinking", "answer_start", "rendered"),
    [
        ("auto", "", ASKED),
        ("on", "", ASKED),
        ("off", "", f"{ASKED}<think>\n\n</think>\n\n"),
        ("auto", "<think>\nFirst, ", f"{ASKED}<think>\nFirst, "),
        ("off", "First, ", f"{ASKED}<think>\n\n</think>\n\nFirst, "),
    ],
)
def test_thinking_and_a_start_of_the_answer(thinking, answer_start, rendered):
    assert chat_prompt(templated(QWEN3), "How many?", thinking=thinking, answer_start=answer_start) == rendered


def test_without_a_template_a_message_is_bare():
    assert chat_prompt(byte_tokenizer(), "How many?", answer_start=" As many") == "How many? As many"


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_thinking_is_refused_where_it_would_change_nothing(template, thinking):
    with pytest.raises(ValueError, match=f"^thinking is '{thinking}'; .* has no chat template with enable_thinking"):
        chat_prompt(templated(template), "How many?", thinking=thinking)


# --- what is wrong with a template ---


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('System\\nfirst') }}", "cannot be rendered: TemplateError: System first; it must render"),
        ("{% for message in messages %}", "cannot be rendered: TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages | nosuch }}", "cannot be rendered: TemplateAssertionError: No filter named 'nosuch'"),
        ("{{ messages[0].parts[0] }}", "cannot be rendered: UndefinedError: "),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError: division by zero"),
        ("{% for each in range(10 ** 9) %}{% endfor %}", "cannot be rendered: OverflowError: "),
        ("", "leaves a user's message out: it renders ''; it must put the messages into the prompt"),
        ("{% if tools %}{{ messages[0].content }}{% endif %}", "leaves a user's message out: it renders ''"),
        ("<|im_start|>assistant", "leaves a user's message out: it renders '<|im_start|>assistant'"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, told):
    with pytest.raises(ValueError) as caught:
        chat_prompt(templated(template), "How many?")
    line = str(caught.value)
    assert line.startswith("the chat template of ") and told in line and "\n" not in line and len(line) < 400


def test_a_template_may_change_the_message():
    assert chat_prompt(templated("[{{ messages[0].content | trim | upper }}]"), " How?\n") == "[HOW?]"


# --- the date ---

LAYOUTS = {
    "plain": "Today: {{ strftime_now(%r) }}\n{{ messages[0].content }}",
    "asked first": "{%%- if strftime_now is defined %%}\n  {{ strftime_now(%r) }}{%% endif %%}\n"
    "{{ messages[0].content }}\n",
    "indented": "   {%% set day = strftime_now(%r) %%}\n\n  {{ day }}{{ messages[0].content }}",
    "empty lines first": "\n\n{%%- set form = %r %%}{%% macro day() %%}{{ strftime_now(form) }}{%% endmacro %%}"
    "{{ day() }}{%% for message in messages %%}{{ message.content }}{%% endfor %%}",
}


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(*MOMENT.timetuple()[:6])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%-d.%-m.%y, %A", "%H:%M:%S %p"])
def test_a_dated_template_is_rendered_as_it_was_at_that_moment(monkeypatch, layout, form):
    tokenizer = templated(layout % form)
    later = chat_prompt(dated(tokenizer, MOMENT), "How many?")
    assert MOMENT.strftime(form) in later and chat_prompt(tokenizer, "How many?") != later
    # what the library renders, its clock being at that moment
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    assert chat_prompt(tokenizer, "How many?") == later


def test_all_directives_are_known():
    form = " ".join(f"%{letter}" for letter in string.ascii_letters if letter not in "EO")
    tokenizer = dated(templated(f"{{{{ strftime_now({form!r}) }}}}{{{{ messages[0].content }}}}"), MOMENT)
    assert chat_prompt(tokenizer, "?") == f"{MOMENT.strftime(form)}?"


def test_the_tokenizer_itself_is_left_to_be_saved():
    tokenizer = templated("{{ strftime_now('%Y') }}{{ messages[0].content }}")
    assert chat_prompt(dated(tokenizer, MOMENT), "?") == "2024?"
    assert tokenizer.chat_template == "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    timeless = templated(QWEN3)
    assert dated(timeless, MOMENT) is timeless


def test_templates_that_have_names_are_dated_too():
    named = {"default": "{{ strftime_now('%Y') }}{{ messages[0].content }}", "tool_use": "x"}
    assert chat_prompt(dated(templated(named), MOMENT), "?") == "2024?"
