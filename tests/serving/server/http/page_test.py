"""The page in headless Chromium, as a person uses it."""

import dataclasses

import numpy as np
import pytest
from browsing import browsing, needs_browser
from listening import listening, small_policy
from served import T

from dcjax.data.arithmetic import build_tokenizer
from dcjax.serving.continuous import rehearse
from dcjax.serving.server.http.server import serving

pytestmark = [pytest.mark.slow, needs_browser]

OFF = 0.25
"""What the training policy of these tests adds to each log-prob of `-1`."""


def trainer(tokens):
    """A training policy that gives e^-OFF to each token."""
    return 7, [-OFF] * (len(tokens) - 1)


@pytest.fixture(scope="module")
def served():
    return dataclasses.replace(small_policy(rehearse), trainer=trainer)


@pytest.fixture
def browser(tmp_path):
    # what these tests have refused
    with browsing(tmp_path, tolerated="status of 40") as driver:
        yield driver


def sampled(browser, prompt):
    """The tokens on the page once a prompt has been answered."""
    from selenium.webdriver.support.ui import WebDriverWait

    box = browser.find_element("id", "prompt")
    box.clear()
    box.send_keys(prompt + "\n")
    WebDriverWait(browser, 30).until(lambda _: browser.find_element("id", "send").is_enabled())
    return browser.find_elements("class name", "token")


def strength(token):
    """How opaque a token's colour is, 0 to 1."""
    colour = token.value_of_css_property("background-color")
    return float(colour.split(",")[3].rstrip(")")) / 0.85 if colour.startswith("rgba") else 1 / 0.85


def shown(token):
    """(p served, p train) of a token's title."""
    return [float(part.split()[-1]) for part in token.get_attribute("title").split(",")]


def test_tokens_are_coloured_by_their_probability_and_by_the_gap(served, browser):
    with listening(served, serving) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        browser.find_element("id", "seed").send_keys("3")
        tokens = sampled(browser, "1+2=")
        text = "".join(token.text for token in tokens)
        assert 0 < len(tokens) <= T and browser.find_element("id", "name").text == "tests"
        probabilities = np.array([shown(token) for token in tokens])
        np.testing.assert_allclose(probabilities[:, 1], np.exp(-OFF), rtol=1e-3)
        np.testing.assert_allclose([strength(token) for token in tokens], 1 - probabilities[:, 0], atol=0.01)
        browser.find_element("css selector", "input[value=gap]").click()
        tokens = browser.find_elements("class name", "token")
        gaps = np.abs(probabilities[:, 1] - probabilities[:, 0])
        np.testing.assert_allclose([strength(token) for token in tokens], np.minimum(gaps / 0.1, 1), atol=0.01)
        told = browser.find_element("id", "gap-told").text
        assert f"of {len(tokens)} tokens: mean {gaps.mean():.2g}"[:-1] in told
        tokens[0].click()
        rows = browser.find_elements("css selector", "#details tr")
        assert f"{probabilities[0, 0]:.3g}"[:4] in rows[1].text and len(rows) > 2
        # no wider than a phone
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        # the same seed gives the same answer
        assert "".join(token.text for token in sampled(browser, "1+2=")[-len(tokens) :]) == text


def test_a_conversation_goes_on_and_what_is_refused_is_no_part_of_it(served, browser):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}="
    with listening(dataclasses.replace(served, tokenizer=tokenizer), serving) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        sampled(browser, "1+2")
        sampled(browser, "3+4")
        turns = browser.find_elements("class name", "turn")
        assert [turn.text.split("\n")[0] for turn in turns] == ["you", "tests", "you", "tests"]
        sampled(browser, "1+" * 100)
        assert "characters; this policy takes up to" in browser.find_element("id", "problem").text
        assert browser.find_element("id", "prompt").get_attribute("value") == "1+" * 100
        assert len(browser.find_elements("class name", "turn")) == 4


def test_a_token_is_asked_for_where_one_is_needed(served, browser):
    with listening(served, serving, token="secret") as port:
        browser.get(f"http://127.0.0.1:{port}/")
        assert "a bearer token is needed" in browser.find_element("id", "problem").text
        browser.find_element("id", "secret").send_keys("secret\t")
        assert sampled(browser, "1+2=")
