"""`llama-ft compare`: what differs between runs, and nothing else; whole, damaged and hostile folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.compare import Comparison, compare_runs, short_names
from llama_ft.evaluate.compare_curves import COLOURS, Line, lines_html
from llama_ft.evaluate.compare_page import page
from llama_ft.evaluate.compare_table import aligned, lines
from llama_ft.evaluate.result import Score, SuiteResult, bootstrap
from llama_ft.files import write_json, write_text
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.run import Run
from llama_ft.train.page.curves import Curve
from tests.conftest import ROOT
from tests.train.report_runs import HOSTILE, RTL, make_aligned_run, make_run, metrics


def changed_run(folder: Path, *overrides: str, less: float = 0.0, said: str = "an answer") -> Run:
    """A finished run of 24 steps whose losses lie `less` below the usual ones."""
    run = make_run(folder, said=said)
    write_text(run.recipe_file, dump(load_recipe("quickstart", [*overrides, f"output_dir={folder}"])))
    found = [{key: v - less if key in ("loss", "eval_loss") else v for key, v in line.items()} for line in metrics()]
    write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in found))
    return run


def scored(run: Run, values: list[float], *, subject: str = "tuned", **settings: Any) -> SuiteResult:
    """An evaluation whose score is the mean of one value per row."""
    low, high = bootstrap(values)
    score = Score("accuracy", float(np.mean(values)), low, high, len(values), "share", "higher")
    rows = [
        {"id": f"q{n}", "asked": "?", "answer": "!", "values": {"accuracy": value}} for n, value in enumerate(values)
    ]
    found = SuiteResult("quick", subject, [score], rows, {"weights": str(run.path), **settings}, 1.0)
    found.write(run.path / "eval")
    return found


@pytest.fixture
def two(tmp_path: Path) -> list[Run]:
    first = changed_run(tmp_path / "first")
    return [
        first,
        changed_run(tmp_path / "second", "adapter.r=8", "training.learning_rate=1e-4", less=0.5, said="more"),
    ]


def opened(*runs: Run) -> Comparison:
    return compare_runs([str(run.path) for run in runs])


def test_only_what_differs_is_told(two: list[Run]) -> None:
    found = opened(*two)
    assert found.recipes() == [
        ["key", "A", "B"],
        ["adapter.r", "16", "8"],
        ["training.learning_rate", "0.003", "0.0001"],
    ]
    first, second = found.losses()[1:]
    assert first[:4] == ["A first", "4.1000", "3.1000", "3.100, 24"]
    assert second[:4] == ["B second", "3.6000", "2.6000", "2.600, 24"]
    training = [line["loss"] for line in metrics() if "loss" in line][-2:]
    assert first[4] == f"{np.mean(training):.4f}", "the mean of the last tenth of the steps"
    assert found.surroundings() == [["of the lock", "A", "B"], ["device", "an answer", "more"]]


def test_three_runs_of_which_two_agree(two: list[Run], tmp_path: Path) -> None:
    found = opened(*two, changed_run(tmp_path / "third", "adapter.dropout=0.1"))
    assert found.recipes()[1:] == [
        ["adapter.r", "16", "8", "16"],
        ["adapter.dropout", "0.0", "0.0", "0.1"],
        ["training.learning_rate", "0.003", "0.0001", "0.003"],
    ]


def test_scores_are_paired_over_the_rows_that_both_answered(two: list[Run]) -> None:
    generator = np.random.default_rng(1)
    left = (generator.random(200) < 0.5).astype(float).tolist()
    right = [1.0 if generator.random() < 0.3 else value for value in left]
    scored(two[0], left)
    scored(two[1], right)
    (_, (name, a, b)) = opened(*two).evaluations()
    assert name == "quick, tuned, accuracy"
    assert a.startswith(f"{np.mean(left):.1%} [")
    gaps = np.subtract(right, left)
    low, high = bootstrap(gaps.tolist())
    assert low > 0 and b.endswith(f"; Δ +{gaps.mean():.1%} [+{low:.1%}, +{high:.1%}] * better")


def test_what_was_asked_otherwise_is_not_subtracted(two: list[Run], tmp_path: Path) -> None:
    third = changed_run(tmp_path / "third")
    scored(two[0], [1.0, 0.0, 1.0])
    scored(two[1], [1.0, 0.0, 0.0], shots=5)
    scored(third, [1.0], subject="base")
    rows = opened(*two, third).evaluations()
    assert rows[1][2].endswith("; Δ none: asked otherwise (shots)") and rows[1][3] == "-"
    assert rows[2][0] == "quick, base, accuracy" and rows[2][1:3] == ["-", "-"] and "Δ" not in rows[2][3]


def test_no_evaluation_is_no_fault(two: list[Run]) -> None:
    assert len(opened(*two).evaluations()) == 1
    assert "evaluations" not in "\n".join(lines(opened(*two)))
    assert 'id="evaluations"' not in page(opened(*two))


def test_a_run_under_way_is_no_finished_one(two: list[Run]) -> None:
    write_json(two[1].path / "status.json", {"state": "running", "steps": 24})
    assert [side.state for side in opened(*two).sides] == ["finished, 24 steps", "under way, or killed, 24 steps"]


def test_answers_stand_side_by_side_and_equal_ones_together(two: list[Run]) -> None:
    asked = {"question": "Q?", "reference": "R", "before": "old"}
    write_json(two[0].samples_file, [{**asked, "after": "x"}, {**asked, "question": "only here", "after": "z"}])
    write_json(two[1].samples_file, [{**asked, "after": "y"}])
    assert opened(*two).samples() == [("Q?", [("reference", "R"), ("A, B before", "old"), ("A", "x"), ("B", "y")])]
    write_json(two[1].samples_file, [{**asked, "after": "x"}])
    assert opened(*two).samples()[0][1][-1] == ("A, B", "x")


def test_losses_of_different_things_are_told(tmp_path: Path) -> None:
    a, b = changed_run(tmp_path / "a"), changed_run(tmp_path / "b", "sequence.max_length=64", "training.global_batch=8")
    said = "\n".join(opened(a, b).notes())
    assert "held-out losses are of different rows, tokens or aims where sequence.max_length differs" in said
    assert "training.global_batch differs" in said


def test_what_is_damaged_is_named_and_the_rest_is_shown(two: list[Run]) -> None:
    two[0].recipe_file.write_text("name: [")
    two[1].lock_file.write_text("{")
    (two[1].path / "eval" / "quick-base.json").write_text("[1]")
    two[1].metrics_file.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    found = opened(*two)
    notes = "\n".join(found.notes())
    assert "A: could not be read: recipe.yaml" in notes
    assert "run.lock.json" in notes and "eval/quick-base.json" in notes
    assert found.losses()[2][4] == "1.5000"
    assert page(found) and list(lines(found))


def test_a_loss_of_pairs_is_not_told_in_nats(two: list[Run], tmp_path: Path) -> None:
    third = make_aligned_run(tmp_path / "third", "dpo")
    assert " nats at step" in page(opened(*two))
    assert "nats" not in page(opened(two[0], third)).partition("Answers</h2>")[0]
    assert "training.objective" in dict.fromkeys(row[0] for row in opened(two[0], third).recipes())


def test_names_that_are_no_runs_are_told_together(two: list[Run]) -> None:
    with pytest.raises(UserError) as caught:
        compare_runs([str(two[0].path), "runs/nowhere", "runs/neither"])
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="one run: a comparison has 2 to 26"):
        compare_runs([str(two[0].path), str(two[0].path / ".." / "first")])


def test_a_sweep_stands_for_its_runs_in_their_order(two: list[Run], tmp_path: Path) -> None:
    points = [{"run": "second"}, {"run": "never-begun"}, {"run": "first"}]
    write_json(tmp_path / "sweep.json", {"points": points})
    assert [side.name for side in compare_runs([str(tmp_path)]).sides] == ["second", "first"]
    write_text(tmp_path / "sweep.json", "{")
    with pytest.raises(UserError, match="the list of the sweep's runs cannot be read"):
        compare_runs([str(tmp_path)])


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]


def test_lines_lie_where_their_values_are() -> None:
    """The highest value of all runs is highest on the page, at its own step; every run has a line of its own."""
    kind = Curve("Held-out loss", [])
    html = lines_html(kind, [Line("A", 0, [(0, 1.0), (10, 3.0)]), Line("B", 1, [(5, 2.0), (10, 1.0)])])
    drawn = re.findall(
        r'<path stroke="(#\w+)"[^>]* stroke-width="2" d="M([\d. L]+)"/>', html.partition('class="steps"')[0]
    )
    (first, a), (second, b) = [one for one in drawn if "h" not in one[1]][-2:]
    assert (first, second) == COLOURS[:2]
    places = [[tuple(map(float, pair.split())) for pair in path.split("L")] for path in (a, b)]
    assert places == [[(0.0, 400.0), (1000.0, 0.0)], [(500.0, 200.0), (1000.0, 400.0)]]
    told = json.loads(re.search(r'data-points="([^"]*)"', html)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert told == [[0, "A 1"], [5, "B 2"], [10, "A 3 · B 1"]]


def test_thirty_runs_have_lines_that_differ() -> None:
    assert len({Line("x", place, []).stroke for place in range(26)}) == 26


def test_values_that_are_no_numbers_are_not_drawn() -> None:
    assert lines_html(Curve("x", []), [Line("A", 0, [(1, float("nan"))]), Line("B", 1, [])]) == ""
    assert "nan" not in lines_html(Curve("x", []), [Line("A", 0, [(1, float("nan")), (2, 1.0), (3, float("inf"))])])


def test_columns_are_aligned_and_a_long_cell_moves_its_own_line_alone() -> None:
    assert aligned([["a", "b", "c"], ["aaa", "x" * 80, "c"], ["a", "b"]]) == [
        "a    b  c",
        f"aaa  {'x' * 80}  c",
        "a    b",
    ]


def test_a_terminal_is_not_steered_by_what_a_model_says(tmp_path: Path) -> None:
    hostile = RTL + HOSTILE + "\x1b[2J\r"
    runs = [changed_run(tmp_path / name, said=hostile) for name in "ab"]
    text = "\n".join(lines(opened(*runs)))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u2066]", text)


def test_the_command_writes_a_page_and_prints_tables(two: list[Run], tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "llama_ft.cli", "compare", *(str(run.path) for run in two), *more]
        return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    printed = run()
    assert printed.returncode == 0, printed.stderr
    assert "recipes: 2 keys differ" in printed.stdout and "B second" in printed.stdout
    target = tmp_path / "page.html"
    assert run("--html", str(target)).stdout.strip() == str(target)
    assert target.read_text().count("<figure") >= 4
    (tmp_path / "file").write_text("")
    refused = run("--html", str(tmp_path / "file" / "page.html"))
    assert refused.returncode == 2 and "the page cannot be written" in refused.stderr


def alone(folder: Path, values: list[float], **settings: Any) -> SuiteResult:
    """What `llama-ft eval MODEL` leaves of a model that answered the same questions."""
    return scored(Run(folder), values, subject="smollm2-135m", **settings)


def test_a_model_by_itself_is_the_base_of_what_was_trained(two: list[Run], tmp_path: Path) -> None:
    """It has no recipe, no losses and no samples; its one subject is held against every subject of a run."""
    alone(tmp_path / "eval-model", [1.0, 0.0, 1.0, 0.0], template="own")
    scored(two[0], [1.0, 1.0, 1.0, 1.0], template="own")
    scored(two[1], [0.0, 0.0, 1.0, 0.0], template="other")
    scored(two[1], [1.0, 0.0, 1.0, 0.0], template="own", subject="base")
    found = compare_runs([str(tmp_path / "eval-model"), *(str(run.path) for run in two)])
    assert found.sides[0].state == "a model by itself" and found.named == "2 runs and 1 model"
    heads, tuned, base = found.evaluations()
    assert heads[1:] == ["A", "B", "C"] and tuned[0] == "quick, tuned, accuracy" and base[0] == "quick, base, accuracy"
    assert tuned[1] == base[1] and tuned[1].startswith("50.0% [") and "Δ" not in tuned[1]
    assert "; Δ +50.0% [" in tuned[2] and "template" not in tuned[2]
    assert "; Δ -25.0% [" in tuned[3] and tuned[3].endswith("], asked in another template")
    assert base[2] == "-" and base[3].endswith("; Δ 0.0% [0.0%, 0.0%]")
    assert found.recipes()[0] == ["key", "B", "C"] and len(found.losses()) == 3
    assert found.surroundings()[0] == ["of the lock", "B", "C"]
    assert not [note for note in found.notes() if "could not be read" in note]
    assert "2 runs and 1 model side by side" in page(found) and "a model by itself" in "\n".join(lines(found))


def test_a_model_and_one_run_have_no_recipes_to_compare(two: list[Run], tmp_path: Path) -> None:
    alone(tmp_path / "eval-model", [1.0, 0.0])
    found = compare_runs([str(tmp_path / "eval-model"), str(two[0].path)])
    assert found.recipes() == [["key", "B"]] and len(found.surroundings()) == 1
    assert "The recipes are equal" not in page(found) and "recipes" not in "\n".join(lines(found))


def test_models_alone_are_held_against_each_other(tmp_path: Path) -> None:
    scored(Run(tmp_path / "eval-a"), [1.0, 0.0], subject="a")
    scored(Run(tmp_path / "eval-b"), [1.0, 1.0], subject="b")
    found = compare_runs([str(tmp_path / "eval-a"), str(tmp_path / "eval-b")])
    ((_, a, b),) = [row[:3] for row in found.evaluations()[1:]]
    assert found.evaluations()[1][0] == "quick, model, accuracy" and "; Δ +50.0%" in b and "Δ" not in a
    assert found.notes() == [] and "losses" not in "\n".join(lines(found)) and "2 models side by side" in page(found)


@pytest.mark.parametrize(
    ("left", "right", "key"),
    [
        ({"max_tokens": 128}, {"max_tokens": 512}, "max_tokens"),
        ({"limit": 10}, {"limit": None}, "limit"),
        ({"seed": 0}, {"seed": 1}, "seed"),
        ({"data": {"a.jsonl": "9 1"}}, {"data": {"a.jsonl": "9 2"}}, "data"),
        ({"files": {"a.jsonl": "9f"}}, {"files": {"a.jsonl": "8e"}}, "files"),
    ],
)
def test_a_model_that_was_asked_otherwise_is_not_subtracted(
    two: list[Run], tmp_path: Path, left: dict[str, Any], right: dict[str, Any], key: str
) -> None:
    alone(tmp_path / "eval-model", [1.0, 0.0], template="own", **left)
    scored(two[0], [1.0, 0.0], template="other", **right)
    found = compare_runs([str(tmp_path / "eval-model"), str(two[0].path)])
    assert found.evaluations()[1][2].endswith(f"; Δ none: asked otherwise ({key})")


def test_a_file_is_the_same_wherever_it_was_named_from(two: list[Run]) -> None:
    scored(two[0], [1.0, 0.0], data={"x/a.jsonl": "9 1"})
    scored(two[1], [1.0, 1.0], data={"/y/x/a.jsonl": "9 1"})
    assert "; Δ +50.0%" in opened(*two).evaluations()[1][2]
    scored(two[0], [1.0, 0.0], data={"a.jsonl": "9 1"}, files={"a.jsonl": "9f"}, answers="1")
    scored(two[1], [1.0, 1.0], data={"a.jsonl": "9 2"}, files={"x/a.jsonl": "9f"}, answers="2")
    assert "; Δ +50.0%" in opened(*two).evaluations()[1][2]


def test_other_questions_of_the_same_number_are_no_pair(two: list[Run]) -> None:
    """Two runs' held-out rows may come from two files of one name."""
    scored(two[0], [1.0, 0.0, 0.0])
    other = scored(two[1], [1.0, 1.0, 1.0])
    other.rows[0]["asked"] = other.rows[2]["asked"] = "another question"
    other.write(two[1].path / "eval")
    assert opened(*two).evaluations()[1][2].endswith("; Δ +100.0% [0.0%, +100.0%], over 1 of 3 items")


def test_results_of_several_models_in_one_folder_are_refused(two: list[Run], tmp_path: Path) -> None:
    for name in "ab":
        scored(Run(tmp_path / "mixed"), [1.0], subject=name)
    with pytest.raises(UserError, match="results of several models: a, b"):
        compare_runs([str(tmp_path / "mixed"), str(two[0].path)])
    (tmp_path / "empty" / "eval").mkdir(parents=True)
    with pytest.raises(UserError, match="empty is not a run"):
        compare_runs([str(tmp_path / "empty"), str(two[0].path)])
