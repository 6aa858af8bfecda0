import base64
import hashlib
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from records import evaluation, records_of_a_run, sample, write_run

import dcjax.reporting.run_report
from dcjax.reporting.curves import draw_curves, draw_panels
from dcjax.reporting.run_report import write_report
from dcjax.reporting.statistics import wilson_interval

HOSTILE = "</div><script>alert('x')</script><img src=http://evil.test/x onerror=alert(1)> {{ 7 * 7 }} \x00 \ud800 &lt;"
BLUE, VERMILLION, BLACK = (0, 114, 178), (213, 94, 0), (0, 0, 0)


VOID_TAGS = ("meta",)
OWN_SCRIPT = (Path(dcjax.reporting.run_report.__file__).parent / "report_page" / "script.js").read_text("utf-8")


class Page(HTMLParser):
    """Collects a page's tags, attributes and texts, and checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def page_of(run_dir):
    """With no picture in it, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcjax.reporting.run_report, "draw_curves", lambda *of_the_run: b"picture")
        patch.setattr(dcjax.reporting.run_report, "draw_panels", lambda *of_the_run: [])
        _, path = write_report(run_dir)
    return path.read_text("utf-8")


def panels_of(png):
    """The picture's six panels as arrays [height, width, RGB], row by row."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return [panel for row in np.array_split(pixels, 2) for panel in np.array_split(row, 3, axis=1)]


def has_colour(panel, colour, *, at_least=100):
    return np.all(np.abs(panel.astype(int) - colour) < 12, axis=-1).sum() >= at_least


def test_the_picture_has_its_curves_in_their_panels():
    panels = panels_of(draw_curves(records_of_a_run(), "run"))
    assert all(panel.shape[0] > 300 and panel.shape[1] > 400 for panel in panels)
    reward, accuracy, discrepancy, multiplier, length, gradient = panels
    for panel in (reward, accuracy, discrepancy, multiplier, length):
        assert has_colour(panel, BLUE)
    for panel in (accuracy, discrepancy):
        assert has_colour(panel, VERMILLION)
    for panel in (reward, multiplier, length, gradient):
        assert not has_colour(panel, VERMILLION, at_least=1)
    assert has_colour(gradient, BLACK, at_least=600)


def test_panels_without_their_metrics_hold_no_curve():
    panels = panels_of(draw_curves(records_of_a_run(constrained=False), "run"))
    assert [has_colour(panel, BLUE, at_least=20) for panel in panels[:5]] == [True, True, False, False, True]


def test_one_evaluation_is_visible_with_its_interval():
    _, accuracy, *others = panels_of(draw_curves([{"step": 0, **evaluation(0.0)}], "run"))
    assert has_colour(accuracy, BLUE, at_least=30)
    assert has_colour(accuracy, VERMILLION, at_least=30)
    assert not any(has_colour(panel, BLUE, at_least=1) for panel in others)


@pytest.mark.filterwarnings("error")
def test_a_name_is_no_formula_and_accuracies_may_reach_their_ends():
    records = [{"step": 0, "eval/deployed_accuracy": 0.0, "eval/training_accuracy": 1.0, "eval/prompts": 3}]
    assert len(panels_of(draw_curves(records, r"a $\frac{ _b$ \x"))) == 6


def test_a_readers_matplotlib_settings_do_not_matter(monkeypatch):
    import matplotlib

    usual = draw_curves(records_of_a_run(steps=3), "run")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert draw_curves(records_of_a_run(steps=3), "run") == usual


def test_page_stands_alone(tmp_path):
    write_run(tmp_path, records_of_a_run(), samples=[sample(1, "see http://example.test/a")], config={"a": 1})
    picture_path, page_path = write_report(tmp_path)
    assert (picture_path, page_path) == (tmp_path / "report.png", tmp_path / "report.html")
    page = Page(page_path.read_text("utf-8"))
    resources = {name: value for name, value in page.attributes if name in ("src", "srcset", "data", "action")}
    assert not resources
    # of a panel's own parts
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert page.tags.count("svg") == 6
    # no script but the page's own may run
    digest = base64.b64encode(hashlib.sha256(OWN_SCRIPT.encode()).digest()).decode()
    (policy,) = (value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ") and policy.endswith(f"; script-src 'sha256-{digest}'")
    assert [text for text in page.texts if "querySelector" in text] == [OWN_SCRIPT.strip()]
    assert not any("url(" in text or "@import" in text for text in page.texts)
    assert picture_path.read_bytes().startswith(b"\x89PNG")
    assert "prefers-color-scheme: dark" in page_path.read_text("utf-8")
    assert "see http://example.test/a" in page.texts


def test_page_shows_final_figures_with_intervals(tmp_path):
    write_run(tmp_path / "quickstart", records_of_a_run())
    page = Page(page_of(tmp_path / "quickstart"))
    lower, upper = wilson_interval(90, 128)
    at = page.texts.index("deployed accuracy")
    assert page.texts[at : at + 3] == [
        "deployed accuracy",
        "0.7031",
        f"step 40, 95% {lower:.3f} to {upper:.3f}",
    ]
    assert "quickstart" in page.texts
    assert any(text == "step 40, budget 0.001" for text in page.texts)


def test_page_says_how_much_was_learnt(tmp_path):
    # Each end has a mean of .2 or .8 and a variance of .025: 8 degrees of freedom, t = 2.306, half width 2.306 * .1.
    rewards = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    write_run(tmp_path / "long", [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)])
    assert "step 11; last 5 less first 5: +0.600, 95% +0.369 to +0.831" in Page(page_of(tmp_path / "long")).texts
    write_run(tmp_path / "short", [{"step": step, "reward": reward} for step, reward in enumerate(rewards[:9], 1)])
    assert "step 9" in Page(page_of(tmp_path / "short")).texts
    write_run(tmp_path / "still", [{"step": step, "reward": 0.5} for step in range(1, 20)])
    still = "step 19; last 5 less first 5: +0.000, 95% +0.000 to +0.000"
    assert still in Page(page_of(tmp_path / "still")).texts


def test_table_gives_first_best_and_last(tmp_path):
    values = [(1, 0.25, 0.004, 90.0), (2, 0.75, 0.001, 120.0), (3, 0.5, 0.002, 12345.6)]
    write_run(
        tmp_path,
        [{"step": s, "reward": r, "dual/discrepancy": d, "response_length": n} for s, r, d, n in values],
    )
    texts = Page(page_of(tmp_path)).texts
    expected = {
        "Reward": ["0.25", "step 1", "0.75", "step 2", "0.5", "step 3"],
        "Discrepancy δ̄, mean over responses": ["0.004", "step 1", "0.001", "step 2", "0.002", "step 3"],
        "Response length (tokens)": ["90", "step 1", "–", "12,346", "step 3"],
    }
    for label, cells in expected.items():
        at = texts.index(label) + 1
        assert texts[at : at + len(cells)] == cells
    assert "Multiplier λ" not in texts


def test_hostile_text_stays_text(tmp_path):
    samples = [sample(1, HOSTILE, HOSTILE), sample(2, "told", HOSTILE, tokens=[(HOSTILE, 0.5, 0.25)])]
    run_dir = tmp_path / "<b>run"
    write_run(run_dir, records_of_a_run(steps=2), samples=samples, config={HOSTILE: {"k": HOSTILE}})
    html = page_of(run_dir)
    page = Page(html)
    assert page.tags.count("script") == html.count("<script") == 1
    assert not {"b>run", "img"} & set(page.tags)
    assert "\x00" not in html
    # A browser and this parser alike show a lone surrogate as the replacement character.
    shown = HOSTILE.replace("\x00", "␀").replace("\ud800", "�")
    assert page.texts.count(shown) == 4
    assert f"{shown}.k" in page.texts
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_samples_are_of_the_first_and_last_step_one_a_prompt(tmp_path):
    samples = [sample(step, f"prompt {step}{name}", more) for step in (1, 2, 3) for name in "abcde" for more in "xy"]
    samples[-1] |= {"finished": False}
    samples[-2] |= {"step": 3, "prompt": "prompt 3a"}
    write_run(tmp_path, records_of_a_run(steps=3), samples=samples)
    texts = Page(page_of(tmp_path)).texts
    shown = [text for text in texts if text.startswith("prompt ")]
    assert shown == [f"prompt {step}{name}" for step in (1, 3) for name in "abcd"]
    assert [text for text in texts if text.startswith(("Early", "Late"))] == ["Early: step 1", "Late: step 3"]


def test_a_sample_says_how_it_ended_and_its_discrepancy(tmp_path):
    tokens = [("3", 0.5, 0.375), ("7", 0.25, 0.2), ("<eos>", 1.0, 0.995)]
    samples = [sample(5, "q", "37", finished=False, reward=0.25, tokens=tokens)]
    write_run(tmp_path, records_of_a_run(steps=2), samples=samples)
    page = Page(page_of(tmp_path))
    assert "reward 0.25" in page.texts
    # (.125 + .05 + .005) / 3
    assert "cut at the length limit, policy 5, mean |p_train − p_infer| 0.06" in page.texts
    assert not any(text.startswith("Late") for text in page.texts)
    told = [value for name, value in page.attributes if name == "data-told"]
    assert told == [
        *("p_train 0.5000, p_infer 0.3750", "p_train 0.2500, p_infer 0.2000", "p_train 1.0000, p_infer 0.9950"),
    ]
    # full from a difference of .1 on
    assert [value for name, value in page.attributes if value.startswith("--strength") and name == "style"] == [
        *("--strength: 1.000", "--strength: 0.500", "--strength: 0.050"),
    ]
    at = page.texts.index("3")
    assert page.texts[at : at + 3] == ["3", "7", "<eos>"]


def test_the_text_behind_the_told_tokens_is_shown(tmp_path):
    samples = [sample(5, "q", "3 and more", tokens=[("3", 0.5, 0.5), (" and", 0.5, 0.5)])]
    write_run(tmp_path, records_of_a_run(steps=2), samples=samples)
    texts = Page(page_of(tmp_path)).texts
    at = texts.index("and")
    assert texts[at : at + 2] == ["and", "more"]


def test_a_panel_tells_the_values_of_its_steps_where_they_are():
    drawings = draw_panels(records_of_a_run(steps=4, constrained=False))
    assert [drawing.title for drawing in drawings] == ["Reward", "Accuracy", "Response length", "Gradient norm"]
    reward, accuracy, *_ = drawings
    assert [text.split(":")[0] for _, text in reward.points] == [f"step {step}" for step in range(1, 5)]
    lower, upper = wilson_interval(38, 128)
    interval = f"(95% {lower:.3f} to {upper:.3f})"
    assert accuracy.points[0][1].startswith(f"step 0: deployed policy 0.2969 {interval}, training")
    # a step has the same place in every panel's axes, and steps are evenly spaced
    gaps = np.diff([place for place, _ in reward.points])
    assert gaps == pytest.approx(gaps[0], abs=2e-4) and 0.1 < gaps[0] < 0.3
    assert all(0 < place < 1 for drawing in drawings for place, _ in drawing.points)
    assert all(drawing.svg.startswith("<svg") and "var(--blue)" in drawing.svg for drawing in drawings[:3])


def test_a_panel_of_a_long_run_tells_as_many_steps_as_can_be_pointed_at():
    (reward,) = draw_panels([{"step": step, "reward": 0.5} for step in range(3001)])
    assert 400 < len(reward.points) <= 501


def test_config_is_flattened_and_versions_stand_apart(tmp_path):
    config = {
        "opt": {"lr": 1e-6, "betas": [0.9, 0.95], "schedule": {}},
        "run_dir": "runs/x",
        "name": None,
        "versions": {"jax": "0.10.2"},
        "platform": "cpu",
    }
    write_run(tmp_path, records_of_a_run(steps=2), config=config)
    texts = Page(page_of(tmp_path)).texts
    start, middle = texts.index("Configuration"), texts.index("Versions and platform")
    assert texts[start + 1 : middle] == [
        *("opt.lr", "1e-06", "opt.betas", "[0.9, 0.95]", "opt.schedule", "{}"),
        *("run_dir", "runs/x", "name", "null"),
    ]
    assert texts[middle + 1 : -1] == ["versions.jax", "0.10.2", "platform", "cpu"]


def test_a_run_without_config_and_samples_says_so(tmp_path):
    write_run(tmp_path, records_of_a_run(steps=2))
    texts = Page(page_of(tmp_path)).texts
    assert texts[texts.index("Samples") + 1] == "not recorded"
    assert texts[texts.index("Configuration") + 1] == "not recorded"
    assert "Versions and platform" not in texts


def test_where_the_time_went_is_shown_where_a_run_was_profiled(tmp_path):
    write_run(tmp_path, records_of_a_run(steps=2))
    assert "Where the time went" not in Page(page_of(tmp_path)).texts
    iteration = {"step": 2, "seconds": 4.0, "parts": {"update": 3.0, "wait": 1.0}, "beside": {"<b>decode": 2.5}}
    (tmp_path / "profile").mkdir()
    path = tmp_path / "profile" / "times.json"
    path.write_text(json.dumps({"iterations": [iteration]}))
    texts = Page(page_of(tmp_path)).texts
    at = texts.index("Where the time went") + 1
    head = ["seconds an iteration", "share of it"]
    assert texts[at : at + 15] == [
        *("4.000 s an iteration (step 2)", "part", *head, "update", "3", "75.0%", "wait", "1", "25.0%"),
        *("meanwhile, in the thread that samples", *head, "<b>decode", "2.5"),
    ]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"times\.json is not JSON"):
        write_report(tmp_path)


def test_a_running_runs_torn_last_line_is_no_obstacle(tmp_path):
    write_run(tmp_path, records_of_a_run(steps=2))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "rew')
    assert "after step 2" in page_of(tmp_path)


def test_a_directory_that_is_no_run_is_named_with_what_would_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl; .*such as runs/NAME"):
        write_report(tmp_path)
    write_run(tmp_path / "first", records_of_a_run(steps=1))
    with pytest.raises(FileNotFoundError, match=r"one of .*first"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing/metrics\.jsonl"):
        write_report(tmp_path / "missing")


def test_empty_metrics_and_a_damaged_config_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "rew')
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no complete line"):
        write_report(tmp_path)
    write_run(tmp_path, records_of_a_run(steps=1))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
