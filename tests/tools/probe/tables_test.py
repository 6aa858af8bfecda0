import dataclasses
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from probes import RESULT, gap

from dcjax.tools.probe.tables import draw, stage_label, to_json, to_summary, to_text, write_probe

ROUTED = dataclasses.replace(
    RESULT,
    step=None,
    sharding={"mesh": {"tensor": 2}} | gap(2e-6),
    routing={
        "changed_experts": {"any_layer": 0.125, "mean_layer": 0.0625},
        "with_replay": gap(0.01),
        "without_replay": gap(0.02),
    },
)


def row(text, start):
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line


def test_the_table_has_a_row_for_each_stage_with_its_own_and_the_whole_gap():
    line = row(to_text(RESULT), "kv cache (int8)")
    assert "0.0123" in line and "0.123" in line and "in all 0.0456" in line
    assert "0" in row(to_text(RESULT), "as sampled").split()


def test_the_table_tells_what_was_not_measured_and_not_served():
    text = to_text(RESULT)
    assert "sharding was not measured: one device" in text
    assert "int4: groups of 32 do not fit" in text
    assert "1,024 (0.250)" in text
    assert "temperature 0.7, top_k 0, top_p 1" in text
    assert "recommended budget: objective.budget=0.0684 " in text
    assert r"1+2=[\x1b[]3" in text
    assert "run $x^ at step 40, served in int8" in text
    assert "3 responses of at most 20 tokens, 17 in all" in text


def test_the_table_of_a_model_with_experts_has_their_rows():
    text = to_text(ROUTED)
    assert "12.50% of the tokens" in text and "6.25% in the mean layer" in text
    assert "0.02" in row(text, "without routing replay") and "0.01" in row(text, "with routing replay")
    assert "2e-06" in row(text, "sharding (tensor 2)")
    assert text.startswith("run $x^, served")


@pytest.mark.parametrize("result", [RESULT, ROUTED])
def test_no_line_is_wider_than_a_wide_terminal(result):
    assert max(map(len, to_text(result).splitlines())) <= 150


def test_the_summary_has_a_row_for_each_deployed_format():
    other = dataclasses.replace(RESULT, format="int4", total=gap(0.5), recommended_budget=None)
    text = to_summary([RESULT, other])
    assert row(text, "int8").split()[1] == "0.0456" and row(text, "int8").endswith("  0.0684")
    assert row(text, "int4").split()[1] == "0.5" and row(text, "int4").endswith("  none")
    assert len(text.splitlines()) == 4 and max(map(len, text.splitlines())) <= 150


def test_json_is_one_line_that_reads_back_as_the_result():
    line = to_json(RESULT)
    assert "\n" not in line
    assert json.loads(line) == json.loads(json.dumps(dataclasses.asdict(RESULT)))


def test_json_refuses_what_is_no_number():
    with pytest.raises(ValueError):
        to_json(dataclasses.replace(RESULT, recommended_budget=math.nan))


@pytest.mark.parametrize("result", [RESULT, ROUTED])
def test_the_picture_has_six_panels_in_colour(result):
    image = np.asarray(Image.open(io.BytesIO(draw(result))).convert("RGB")).astype(int)
    assert image.shape == (924, 1650, 3)
    half, third = image.shape[0] // 2, image.shape[1] // 3
    for top in (0, half):
        for left in range(0, 3 * third, third):
            panel = image[top : top + half, left : left + third]
            assert (np.ptp(panel, axis=2) > 100).sum() > 50


def test_both_files_are_written(tmp_path):
    data, picture = write_probe(RESULT, tmp_path / "a" / "b")
    assert json.loads(data.read_text()) == json.loads(to_json(RESULT))
    assert picture.read_bytes() == draw(RESULT)
    assert (data.name, picture.name) == ("probe-int8.json", "probe-int8.png")


def test_a_format_of_the_readers_own_may_be_called_what_no_file_can_be(tmp_path):
    data, _ = write_probe(dataclasses.replace(RESULT, format="e3/m2"), tmp_path)
    assert data == tmp_path / "probe-e3-m2.json" and data.exists()


def test_a_stage_reads_as_words():
    assert stage_label("stale_weights", "step 3") == "stale weights (step 3)"
    assert stage_label("as_sampled", "") == "as sampled"
