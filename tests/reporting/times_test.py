"""Means and shares of profiled iterations, worked by hand."""

import json

import pytest

from dcjax.reporting.times import TIMES, read_times, times_table

ITERATIONS = [
    {"step": 5, "seconds": 8.0, "parts": {"other": 1.0, "compile": 5.0, "decode": 2.0}, "beside": {}},
    {"step": 6, "seconds": 2.0, "parts": {"other": 0.5, "decode": 1.5}, "beside": {"decode": 1.0}},
]


def write(folder, content):
    (folder / TIMES).write_text(json.dumps(content))
    return folder


def test_parts_are_means_over_all_iterations_the_largest_first(tmp_path):
    times = read_times(write(tmp_path, {"iterations": ITERATIONS}))
    assert (times.first_step, times.last_step, times.seconds) == (5, 6, 5.0)
    assert times.parts == [("compile", 2.5, 0.5), ("decode", 1.75, 0.35), ("other", 0.75, 0.15)]
    assert times.beside == [("decode", 0.5, 0.1)]


def test_the_table_shows_what_overlaps_apart(tmp_path):
    assert times_table(read_times(write(tmp_path, {"iterations": ITERATIONS}))).splitlines() == [
        "where the time went: 5.000 s an iteration (steps 5 to 6, in the mean)",
        "  compile          2.500 s   50.0%",
        "  decode           1.750 s   35.0%",
        "  other            0.750 s   15.0%",
        "meanwhile in the thread that samples, which overlaps with these:",
        "  decode           0.500 s   10.0%",
    ]
    one = times_table(read_times(write(tmp_path, {"iterations": ITERATIONS[:1]}))).splitlines()
    assert one[0] == "where the time went: 8.000 s an iteration (step 5)"
    assert len(one) == 4


@pytest.mark.parametrize(
    "content", [[], {}, {"iterations": []}, {"iterations": [{}]}, {"iterations": [{**ITERATIONS[0], "parts": 1}]}]
)
def test_a_damaged_file_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=rf"{TIMES}\b"):
        read_times(write(tmp_path, content))
