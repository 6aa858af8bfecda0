"""The report in headless Chromium, on a phone and on a laptop, with a pointer and with the keyboard."""

import numpy as np
import pytest
from browsing import browsing, needs_browser
from records import records_of_a_run, sample, write_run

from dcjax.reporting.run_report import WIDEST_GAP, write_report

pytestmark = [pytest.mark.slow, needs_browser]

TOKENS = [("4", 0.5, 0.45), ("2", 0.9, 0.7), ("<eos>", 1.0, 1.0)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    config = {"a_setting_with_a_long_name": "a value without spaces that is longer than a phone is wide" * 3}
    write_run(run, records_of_a_run(), samples=[sample(1, "6*7=", tokens=TOKENS)], config=config)
    _, page = write_report(run)
    return page.as_uri()


@pytest.fixture
def browser(address, tmp_path):
    with browsing(tmp_path) as driver:
        driver.get(address)
        yield driver


def told(figure):
    return figure.find_element("tag name", "output").text


def luminance(colour):
    """Of a CSS colour, from 0 to 255."""
    return np.mean([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]])


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_cut_off_or_scrolls_sideways(browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.find_elements("tag name", "figure")
    assert len(figures) == 6
    assert all(figure.size["width"] >= 300 for figure in figures)
    # side by side where there is room
    assert (figures[0].location["y"] == figures[1].location["y"]) == (width > 600)
    table = browser.find_element("class name", "metrics")
    assert table.size["width"] <= width
    cells = table.find_elements("css selector", "td")
    assert all(cell.location["x"] + cell.size["width"] <= width for cell in cells)
    # letters of a figure are no smaller than these of 9 pixels
    drawing = figures[0].find_element("tag name", "svg")
    assert drawing.size["width"] / float(drawing.get_dom_attribute("viewBox").split()[2]) * 9 >= 9


def test_values_are_read_with_a_pointer(browser):
    from selenium.webdriver import ActionChains

    accuracy = browser.find_elements("tag name", "figure")[1]
    picture = accuracy.find_element("class name", "picture")
    assert told(accuracy).startswith("step 40: deployed policy 0.7031 (95% ")
    ActionChains(browser).move_to_element_with_offset(picture, -picture.size["width"] // 2 + 2, 0).perform()
    assert told(accuracy).startswith("step 0: deployed policy 0.2969 (95% ")
    assert "training policy" in told(accuracy)


def test_values_are_read_with_the_keyboard(browser):
    from selenium.webdriver import Keys

    reward = browser.find_element("tag name", "figure")
    reward.send_keys(Keys.ARROW_LEFT)
    assert told(reward).startswith("step 39: reward ")
    reward.send_keys(Keys.HOME, Keys.ARROW_LEFT)
    assert told(reward).startswith("step 1: reward ")
    reward.send_keys(Keys.END)
    assert told(reward).startswith("step 40: reward 0.6748")
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("aria-label") == "Gradient norm"


def test_tokens_are_coloured_by_the_gap_and_tell_both_probabilities(browser):
    from selenium.webdriver import ActionChains, Keys

    response = browser.find_element("css selector", ".response")
    tokens = response.find_elements("class name", "token")
    assert "".join(token.text for token in tokens) == "42<eos>"
    strengths = [float(token.value_of_css_property("background-color").split(",")[3][:-1]) / 0.75 for token in tokens]
    expected = [min(abs(train - sampler) / WIDEST_GAP, 1) for _, train, sampler in TOKENS]
    np.testing.assert_allclose(strengths, expected, atol=0.01)
    output = browser.find_element("css selector", ".response + output")
    ActionChains(browser).move_to_element(tokens[1]).perform()
    assert output.text == '"2": p_train 0.9000, p_infer 0.7000'
    response.send_keys(Keys.ARROW_LEFT)
    assert output.text == '"4": p_train 0.5000, p_infer 0.4500'


def test_it_is_dark_where_the_system_is(browser):
    for scheme, dark in (("dark", True), ("light", False)):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        body = browser.find_element("tag name", "body")
        page, ink = (luminance(body.value_of_css_property(name)) for name in ("background-color", "color"))
        assert (page < 60 and ink > 200) if dark else (page > 200 and ink < 60)
        # the letters of the figures too, which are drawn
        drawn = browser.find_elements("css selector", "figure [style*='fill: var(--ink)']")
        assert (luminance(drawn[0].value_of_css_property("fill")) > 200) == dark
