"""Scores, intervals, pairs, and the files that results are kept in."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from llama_ft.errors import UserError
from llama_ft.evaluate.page import page
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
from llama_ft.evaluate.table import gap, print_results
from tests.train.report_runs import HOSTILE, LONG, RTL


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
    assert SuiteResult.from_dict(value).scores == [
        Score("exact", 1.0, pytest.approx(0.025), 1.0, 1, "share", "higher")  # type: ignore[arg-type]
    ]


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


def test_a_few_pairs_that_agree_are_no_proof():
    """Five questions of twenty gained and none lost: by chance once in 16, though no resample shows it."""
    left = [0.0] * 20
    five, six = ([1.0] * count + [0.0] * (20 - count) for count in (5, 6))
    assert bootstrap(five)[0] > 0, "what the resamples alone would say"
    assert paired(left, five)[:2] == (0.25, 0.0)
    assert paired(five, left)[2] == 0
    assert paired(left, six)[1] > 0
    assert paired([0.0], [1.0]) == (1.0, 0.0, 1.0)
    assert paired([0.0] * 3, [0.0] * 3) == (0.0, 0.0, 0.0)


def test_what_is_no_number_is_never_sure():
    values = [math.nan, *([1.0] * 30)]
    assert all(map(math.isnan, bootstrap(values)))
    assert all(map(math.isnan, paired([0.0] * 31, values)))
    assert all(map(math.isnan, paired([0.0] * 31, [math.inf, *([1.0] * 30)])[1:]))
    left, right = (
        result("base", dict.fromkeys("abcdefgh", 0.0)),
        result("tuned", {**dict.fromkeys("bcdefgh", 1.0), "a": math.nan}),
    )
    assert gap(compared(left, right)["exact"], "higher").verdict == ""


def test_a_terminal_shows_brackets_as_they_are():
    """A data set's name may hold what rich takes for markup."""
    one = result("base[bold]", {"a": 1.0})
    shown = SuiteResult("quick", "base[bold]", [replace(one.scores[0], name="rows[train].jsonl: nll")], [], {}, 1.0)
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    print_results([[shown]], console)
    text = console.export_text()
    assert "rows[train].jsonl: nll" in text and "base[bold]" in text


def test_an_answer_of_nothing_stands_beside_the_others(tmp_path):
    """On the page: a model that says nothing is told from one that was not asked."""
    html = []
    for said in ("llamas", ""):
        results = [
            SuiteResult("quick", name, [], [{"id": "q", "asked": "Who?", "answer": answer, "values": {}}], {}, 1.0)
            for name, answer in (("base", ""), ("tuned", said))
        ]
        html.append(page("run", [results]))
    assert html[0].count("no answer") == 1 and "<dt>base</dt>" in html[0] and "1 answer" in html[0]
    assert "no answer" not in html[1], "items of loss have no answers at all"


def test_two_thousand_rows_of_anything_make_a_page_that_opens():
    rows = [
        {"id": f"q{n}", "asked": HOSTILE + RTL, "answer": RTL + LONG + HOSTILE, "values": {"exact": 1.0}}
        for n in range(2000)
    ]
    scores = [scored(rows, "exact", "share", "higher")]
    html = page(HOSTILE, [[SuiteResult(HOSTILE, HOSTILE, scores, rows, {}, 1.0)]])
    assert len(html) < 2_000_000 and "and 1,960 more items in the JSON file" in html
    assert html.count("<script") == 1 and "<img" not in html and "\u202e" not in html and "\x1b" not in html


@pytest.mark.parametrize("count", [1, 6, 164])
def test_none_of_a_few_is_not_none_at_all(count):
    """A model that solves one task in a hundred solves none of 164 one time in five."""

    def score(value: float, unit: str = "share", weight: float = 1.0) -> Score:
        return scored([{"values": {"x": [value, weight]}}] * count, "x", unit, "higher")

    none, every = score(0.0), score(1.0)
    assert (none.low, every.high) == (0.0, 1.0)
    assert (1 - none.high) ** count == pytest.approx(0.025) and every.low == pytest.approx(1 - none.high)
    assert score(0.0, "nats").high == 0 and score(0.0, weight=3.0).high == 0 and score(0.5).high == 0.5
