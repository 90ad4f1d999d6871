"""Scores, intervals, pairs, and the files that results are kept in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.result import (
    Score,
    SuiteResult,
    bootstrap,
    compared,
    file_name,
    mean,
    paired,
    read_results,
    scored,
)


def result(subject: str, values: dict[str, object], **other) -> SuiteResult:
    rows = [{"id": item, "asked": "", "answer": "", "values": {"exact": value}} for item, value in values.items()]
    scores = [scored(rows, "exact", "share", "higher")]
    return SuiteResult("quick", subject, scores, rows, {"seed": 0}, 1.5, **other)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of 60 normal values, about 95 % of the intervals hold the true mean 0."""
    random = np.random.default_rng(0)
    held = 0
    for number in range(200):
        low, high = bootstrap(random.normal(size=60).tolist(), number)
        held += low <= 0 <= high
    assert 0.90 <= held / 200 <= 0.985


def test_an_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).normal(5, 2, size=400).tolist()
    low, high = bootstrap(values)
    assert low < mean(values) < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / 20, rel=0.1)


def test_weights_make_a_ratio_of_sums():
    values, weights = [1.0, 3.0], [9.0, 1.0]
    assert mean(values, weights) == pytest.approx(1.2)
    low, high = bootstrap(values, weights=weights)
    assert (low, high) == (1.0, 3.0)  # both rows twice the first, or twice the second
    assert bootstrap([2.0] * 9, weights=list(range(1, 10))) == (2.0, 2.0)


def test_no_values_have_no_mean_and_no_interval():
    assert math.isnan(mean([])) and all(map(math.isnan, bootstrap([])))
    assert scored([], "x", "", "lower").rows == 0


def test_the_same_seed_draws_the_same_interval():
    values = np.random.default_rng(2).normal(size=50).tolist()
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)


def test_pairs_are_surer_than_two_samples():
    """What makes a row hard is in both sides: a small gain on rows of very different cost is seen in pairs alone."""
    random = np.random.default_rng(3)
    left = random.normal(3, 2, size=80)
    right = left - 0.1 + random.normal(0, 0.05, size=80)
    difference, low, high = paired(left.tolist(), right.tolist())
    assert low < difference < high < 0
    assert difference == pytest.approx(-0.1, abs=0.02)
    assert bootstrap(right.tolist())[1] > left.mean()
    with pytest.raises(ValueError, match="80 values against 3"):
        paired(left.tolist(), [1.0, 2.0, 3.0])


def test_results_are_compared_over_the_items_they_share():
    base = result("base", {"a": 0.0, "b": 0.0, "c": 1.0, "only here": 1.0})
    tuned = result("tuned", {"c": 1.0, "b": 1.0, "a": 0.0})
    value, low, high, rows = compared(base, tuned)["exact"]
    assert (value, rows) == (pytest.approx(1 / 3), 3)
    assert low == 0 and high == 1
    assert compared(base, result("other", {"z": 1.0})) == {}


def test_items_of_another_weight_are_other_items():
    """The nats per token of a document that was cut elsewhere are not a pair."""
    left, right = result("base", {"a": [2.0, 10], "b": [1.0, 5]}), result("tuned", {"a": [1.0, 10], "b": [1.0, 6]})
    assert compared(left, right)["exact"][3] == 1


def test_a_file_gives_back_what_was_written(tmp_path):
    written = result("tuned", {"a": 1.0, "b": math.nan}, leaks={"prompts": 2, "leaked": 0})
    path = written.write(tmp_path / "eval")
    assert path.name == "quick-tuned.json"
    text = path.read_text()
    assert "NaN" not in text and json.loads(text)["scores"][0]["value"] is None
    read = SuiteResult.read(path)
    assert read.leaks == written.leaks and read.settings == written.settings and read.seconds == 1.5
    assert math.isnan(read.scores[0].value) and read.values("exact")["a"] == (1.0, 1.0)
    assert read.score("exact") == read.scores[0] and read.score("no such") is None


def test_a_later_versions_keys_are_passed_over(tmp_path):
    value = result("base", {"a": 1.0}).as_dict()
    value["novel"] = value["scores"][0]["novel"] = 1
    assert SuiteResult.from_dict(value).scores == [Score("exact", 1.0, 1.0, 1.0, 1, "share", "higher")]


def test_other_files_of_the_folder_are_no_results(tmp_path):
    result("base", {"a": 1.0}).write(tmp_path)
    (tmp_path / "samples.json").write_text("[]")
    (tmp_path / "quick-tuned.json").write_text('{"suite": "quick"')
    assert [one.subject for one in read_results(tmp_path)] == ["base"]
    with pytest.raises(UserError, match="no result of an evaluation"):
        SuiteResult.read(tmp_path / "quick-tuned.json")


def test_a_subjects_name_is_no_path():
    assert file_name("quick", "meta-llama/Llama-2-7b-hf") == "quick-meta-llama-Llama-2-7b-hf.json"
    assert file_name("quick", "../..") == "quick--.json"
