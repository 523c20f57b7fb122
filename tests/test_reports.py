"""Results: numbers with their spread, Markdown tables, and JSON that every parser reads."""

import json

import numpy as np
import pytest

from transformers_sslam.evaluation.intervals import Summary, format_summary, summarize
from transformers_sslam.files import write_json
from transformers_sslam.reports import markdown_table


def test_numbers_with_their_spread():
    summary = Summary(0.8421, 0.0129, 0.8291, 0.8551, 5)
    assert format_summary(summary) == "84.2 ± 1.3 [82.9, 85.5]"
    assert format_summary(summary, scale=1, decimals=3) == "0.842 ± 0.013 [0.829, 0.855]"
    assert format_summary(summarize([0.5])) == "50.0"


def test_markdown_tables():
    assert markdown_table(["data set", "accuracy"], [["ESC-10", "84.2"], ["a|b", ""]]) == (
        "| data set | accuracy |\n|-|-|\n| ESC-10 | 84.2 |\n| a\\|b |  |"
    )
    assert markdown_table(["only"], []) == "| only |\n|-|"


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ([], [], "the header is empty"),
        (["a", "b"], [["1", "2"], ["3"]], "row 1 has 1 cells, but there are 2 columns"),
        (["a"], [["1\n2"]], "has a line break"),
    ],
)
def test_an_invalid_table_is_an_error(header, rows, message):
    with pytest.raises(ValueError, match=message):
        markdown_table(header, rows)


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    values = {"nan": float("nan"), "inside": {"list": [1.5, float("inf")], "tuple": (-np.float64("inf"), 2)}, "count": 3, "name": "NaN"}

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    write_json(tmp_path / "results.json", values)
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert written == {"nan": None, "inside": {"list": [1.5, None], "tuple": [None, 2]}, "count": 3, "name": "NaN"}
    assert np.isnan(values["nan"])  # what was given is left as it was


def test_json_is_a_file_that_people_can_read_and_compare(tmp_path):
    write_json(str(tmp_path / "results.json"), {"b": [1], "a": True})
    assert (tmp_path / "results.json").read_text() == '{\n  "b": [\n    1\n  ],\n  "a": true\n}\n'


def test_what_json_cannot_hold_is_an_error_and_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "results.json", {"accuracy": 0.5})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "results.json", {"accuracy": np.zeros(2)})
    assert json.loads((tmp_path / "results.json").read_text()) == {"accuracy": 0.5}
