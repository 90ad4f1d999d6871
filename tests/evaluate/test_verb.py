"""`llama-ft eval` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from llama_ft.errors import UserError
from llama_ft.evaluate.page import page
from llama_ft.evaluate.result import Score, SuiteResult, scored
from llama_ft.evaluate.run import Asked, evaluate_source
from llama_ft.evaluate.suites import SUITES, find_suites
from llama_ft.evaluate.table import suite_rows
from tests.tiny_run import make_run


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """A run without merged/."""
    return make_run(tmp_path_factory.mktemp("run"), tiny_base)[0].path


def command(*arguments: str, **how) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llama_ft.cli", "eval", *arguments]
    return subprocess.run(line, capture_output=True, text=True, **how)


def test_a_run_beside_its_base(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base)[0].path
    done = command(str(run), "--suite", "heldout,quick", "--limit", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (run / "eval").glob("*-*.json*"))
    assert names == ["heldout-base.json", "heldout-tuned.json", "quick-base.json", "quick-tuned.json"]
    lines = done.stdout.splitlines()
    assert lines[0] == "heldout" and lines[1].split() == ["items", "base", "tuned", "tuned", "−", "base"]
    assert any(line.strip().startswith("nll per token") and line.endswith("* better") for line in lines)
    assert "  leaks: 0 of 6 prompts in 16 training rows" in lines
    assert "quick · tuned · answers: 6 of 6" in done.stderr and "Traceback" not in done.stderr
    text = (run / "eval.html").read_text()
    assert "nll per token" in text and "quick" in text and "<script" in text


def test_what_was_measured_is_taken_over_refused_or_replaced(run, capsys):
    asked = Asked(str(run), ["heldout"], limit=5)
    evaluate_source(asked)
    table = capsys.readouterr().out
    path = run / "eval" / "heldout-tuned.json"
    written = path.read_text()
    evaluate_source(asked)
    assert capsys.readouterr().out == table and path.read_text() == written
    with pytest.raises(UserError, match="other settings") as told:
        evaluate_source(replace(asked, limit=3))
    assert "--overwrite" in str(told.value)
    evaluate_source(replace(asked, limit=3, subjects=["tuned"], overwrite=True))
    assert SuiteResult.read(path).settings["limit"] == 3


def test_ctrl_c_keeps_what_is_measured(tiny_base, tmp_path):
    """Stopped amid 4,000 questions of multiple choice: exit 130, no traceback; the same command does the rest."""
    run = make_run(tmp_path / "run", tiny_base)[0].path
    rows = [{"query": f"Question: {i} hills?", "choices": ["grass"] * 4, "gold": 0} for i in range(4000)]
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(run), "--subjects", "tuned", "--data", str(data), "--limit", "4000"]
    line = [sys.executable, "-m", "llama_ft.cli", "eval", *arguments]
    started = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    part = run / "eval" / "quick-tuned.part.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and started.poll() is None:
        if part.is_file() and part.stat().st_size > 60_000:  # the answers' rows are before them
            break
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert "the same command goes on" in said and "Traceback" not in said
    kept = part.read_text().count('"id": "many:')
    assert 0 < kept < 4000
    evaluate_source(Asked(str(run), ["quick"], subjects=["tuned"], data=[str(data)], limit=4000))
    assert not part.exists()
    result = SuiteResult.read(run / "eval" / "quick-tuned.json")
    assert result.score("many: multiple choice").rows == 4000


def test_a_model_by_itself(tiny_base, tmp_path, capsys):
    text = tmp_path / "some.txt"
    text.write_text("the llama eats grass and hay while the alpaca sleeps on a hill of stones")
    evaluate_source(Asked(str(tiny_base), ["heldout"], data=[str(text)], out=tmp_path / "found"))
    assert SuiteResult.read(tmp_path / "found" / "eval" / f"heldout-{tiny_base.name}.json").scores
    assert (tmp_path / "found" / "eval.html").is_file()
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suites": ["heldot", "quick"]}, ["no such suite 'heldot'", "did you mean 'heldout'?"]),
        ({"suites": []}, ["no suite was named"]),
        ({"subjects": ["tunde"]}, ["no such subject 'tunde'", "did you mean 'tuned'?"]),
        ({"subjects": ["merged"]}, ["has no merged/", "llama-ft export"]),
        ({"out": Path("x"), "template": "chatml"}, ["--out", "--template", "trained with"]),
        ({"layout": "alpcaa"}, ["no such layout 'alpcaa'", "did you mean 'alpaca'?"]),
        ({"data": ["no-such-file.jsonl"]}, ["there is no file"]),
        ({"data": ["{choices}"]}, ["holds choices, which heldout does not measure on", "leave it out"]),
        ({"source": "runs/nowhere"}, ["there is no run and no model 'runs/nowhere'"]),
    ],
)
def test_mistakes_are_told(run, tmp_path, changes, said):
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"query": "?", "choices": ["a", "b"], "gold": 0}))
    if "data" in changes:
        changes = {"data": [name.format(choices=choices) for name in changes["data"]]}
    asked = {"source": str(run), "suites": ["heldout"], **changes}
    with pytest.raises(UserError) as told:
        evaluate_source(Asked(**asked))
    for words in said:
        assert words in str(told.value)


def test_options_of_runs_are_not_those_of_models(tiny_base):
    with pytest.raises(UserError, match="no subjects"):
        evaluate_source(Asked(str(tiny_base), ["heldout"], subjects=["base"]))
    with pytest.raises(UserError, match="no such template 'chatlm'"):
        evaluate_source(Asked(str(tiny_base), ["heldout"], template="chatlm"))


def test_two_calls_do_not_write_into_the_same_files(run, capsys):
    with FileLock(run / "eval" / ".heldout.lock", timeout=0), pytest.raises(UserError, match="another llama-ft eval"):
        evaluate_source(Asked(str(run), ["quick", "heldout"], limit=2))
    evaluate_source(Asked(str(run), ["quick"], limit=2))
    assert "quick" in capsys.readouterr().out, "what was locked before is free again"


def test_a_run_that_held_nothing_out_says_so(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base)[0]
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text[: text.index("eval_data:")] + text[text.index("template:") :])
    with pytest.raises(UserError, match="held nothing out") as told:
        evaluate_source(Asked(str(run.path), ["heldout"]))
    assert "--data" in str(told.value)


def test_a_run_whose_training_did_not_end_has_nothing_to_measure(run, tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("recipe.yaml", "run.lock.json"):
        (tmp_path / "begun" / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="nothing trained yet"):
        evaluate_source(Asked(str(tmp_path / "begun"), ["heldout"]))


def test_every_suite_that_is_there_is_one():
    for name in SUITES:
        try:
            [suite] = find_suites([name])
        except UserError:
            continue  # its module is not installed
        assert suite.name == name and suite.about


def test_a_table_says_what_got_worse():
    def result(subject: str, values: list[float]) -> SuiteResult:
        rows = [{"id": str(i), "values": {"nll": value}} for i, value in enumerate(values)]
        return SuiteResult("s", subject, [scored(rows, "nll", "nats", "lower")], rows, {}, 0.0)

    worse = suite_rows([result("base", [1.0, 2.0, 3.0] * 2), result("tuned", [1.5, 2.6, 3.4] * 2)])[1]
    assert worse[-1].startswith("+0.500 [") and worse[-1].endswith("* worse")
    same = suite_rows([result("base", [1.0, 2.0, 3.0] * 2), result("tuned", [1.5, 1.9, 2.8] * 2)])[1]
    assert "*" not in same[-1]


def test_results_of_other_settings_in_one_folder_are_not_subtracted():
    """eval.html shows all that lies in a run: of another call perhaps, with fewer samples or other lengths."""

    def result(subject: str, count: int, **settings) -> SuiteResult:
        rows = [{"id": str(i), "values": {"x": float(i % 2)}} for i in range(count)]
        return SuiteResult("s", subject, [scored(rows, "x", "share", "higher")], rows, settings, 0.0)

    base = result("base", 20, samples=1, template=None, asked="completion")
    tuned = result("tuned", 20, samples=1, template="9f", asked="chat")
    row = suite_rows([base, tuned, result("merged", 20, samples=5)])[1]
    assert row[-2] == "0.0% [0.0%, 0.0%], asked in another template"
    assert row[-1] == "none: asked otherwise (samples)"
    perplexity = replace(base, scores=[*base.scores, Score("e", 3.0, 2.0, 4.0, 20, "", "lower")])
    assert suite_rows([perplexity, perplexity])[2][-1] == "", "no item has a perplexity"
    assert suite_rows([replace(base, scores=[]), base])[1][-1] == "", "there is nothing to subtract from"
    assert suite_rows([base, result("tuned", 12, samples=1)])[1][-1] == "0.0% [0.0%, 0.0%], over 12 of 20 items"


def test_what_a_model_says_stays_text_on_the_page():
    rows = [{"id": "0", "asked": "<b>?", "answer": "<script>alert(1)</script>", "values": {"x": 1.0}}]
    result = SuiteResult("s", "base", [scored(rows, "x", "share", "higher")], rows, {}, 0.0)
    text = page("<i>name", [[result]])
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "<i>name" not in text
