"""`llama-ft sweep`: a grid as it is written, judged as a whole, trained point by point, gone on with, ranked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.sweep import run_sweep
from llama_ft.evaluate.sweep_grid import Point, cut, plain, points, read_grid, short_keys
from llama_ft.evaluate.sweep_rank import Result, ranked, table
from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        ("1e-4,2e-4", ["1e-4", "2e-4"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ("{holdout: 0.1},{holdout: 0.2, x: [1, 2]},null", ["{holdout: 0.1}", "{holdout: 0.2, x: [1, 2]}", "null"]),
        ('\'a, b\',"c, \\" d"', ["'a, b'", '"c, \\" d"']),
        ("'it''s, so',don't,won't", ["'it''s, so'", "don't", "won't"]),
        ("['],', \"]\"],b", ["['],', \"]\"]", "b"]),
        ("one", ["one"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_a_value_ends_at_a_comma_outside_of_brackets_and_quotes(raw: str, values: list[str]) -> None:
    assert cut(raw) == values


def test_all_that_is_wrong_with_the_writing_is_told_at_once() -> None:
    words = ["training.seed=1,,2", "x", "adapter.r=", "output_dir=a,b", "adapter.dropout=0,0.1,0", "data.0.limit=1"]
    with pytest.raises(UserError) as caught:
        read_grid([*words, "data.0.limit=2"])
    assert [problem.where for problem in caught.value.problems] == [f"override {n}" for n in (1, 2, 3, 4, 5, 7)]
    assert "--out FOLDER" in str(caught.value) and "a value stands twice: 0" in str(caught.value)


def test_points_are_named_by_their_swept_values() -> None:
    found = points(read_grid(["training.learning_rate=1e-4,2e-4", "training.max_steps=3", "adapter.r=8,16"]))
    names = ["learning_rate-1e-4_r-8", "learning_rate-1e-4_r-16", "learning_rate-2e-4_r-8", "learning_rate-2e-4_r-16"]
    assert [point.name for point in found] == names
    assert found[1].overrides == ("training.learning_rate=1e-4", "training.max_steps=3", "adapter.r=16")
    assert found[1].values == {"training.learning_rate": "1e-4", "adapter.r": "16"}
    assert [point.name for point in points(read_grid(["adapter.r=8"]))] == ["only"]


def test_names_are_told_apart_and_fit_a_disk() -> None:
    assert short_keys(["data.0.limit", "data.1.limit", "adapter.r"]) == {
        "data.0.limit": "0-limit",
        "data.1.limit": "1-limit",
        "adapter.r": "r",
    }
    strange = ["[q_proj, v_proj]", "[q_proj,v_proj]", "a/b", "a-b", "../..", "x" * 300, "x" * 301, "ä", "ö"]
    names = [plain(value) for value in strange]
    assert len(set(names)) == len(strange)
    assert all(name and len(name) < 60 and "/" not in name and not name.startswith(".") for name in names)
    assert plain("a-b") == "a-b" and plain("3.0e-4") == "3.0e-4"


def test_mistakes_of_all_points_come_before_the_first_start(tmp_path: Path) -> None:
    grid = ["training.lerning_rate=1e-3,3e-3", "adapter.r=8,0,x", "training.objective=sft,pretrain"]
    with pytest.raises(UserError) as caught:
        run_sweep("quickstart", grid, out=tmp_path / "out", dry_run=False, overwrite=False, flags=[])
    told = [(problem.where, problem.key) for problem in caught.value.problems]
    assert told.count(("override 1", "training.lerning_rate")) == 1
    assert told.count(("override 2", "adapter.r")) == 2
    assert not (tmp_path / "out").exists()


def test_one_recipe_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learning_rate-0\.001 is the same recipe as learning_rate-1e-3"):
        run_sweep(
            "quickstart", ["training.learning_rate=1e-3,0.001"], out=tmp_path, dry_run=True, overwrite=False, flags=[]
        )


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the sweep's folder cannot be made"):
        out = tmp_path / "file" / "sweep"
        run_sweep("quickstart", ["adapter.r=4,8"], out=out, dry_run=False, overwrite=False, flags=[])
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="is a run, not a folder of runs"):
        run_sweep("quickstart", ["adapter.r=4,8"], out=tmp_path, dry_run=False, overwrite=False, flags=[])


def result(state: str = "finished", **values: float | None) -> Result:
    return Result(state, 3, **values)  # type: ignore[arg-type]


def point(name: str, key: str = "adapter.r") -> Point:
    return Point(name, {key: name}, (f"{key}={name}",))


def test_the_lowest_held_out_loss_comes_first() -> None:
    found = [
        (point("a"), result(held_out=2.0, training=1.0)),
        (point("b"), result("failed", status=1)),
        (point("c"), result(held_out=1.5, training=3.0)),
        (point("d"), result("waiting")),
    ]
    by, order = ranked(found)
    assert by == "held-out loss" and [one.name for one, _ in order] == ["c", "a", "b", "d"]
    lines = table(found)
    assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "failed", "waiting"]
    assert "ranked by held-out loss, best first" in lines
    assert lines[-1] == "b failed: status 1; what it said stands above"


def test_the_training_loss_takes_over_where_one_run_has_no_held_out_rows() -> None:
    found = [(point("a"), result(held_out=1.0, training=2.0)), (point("b"), result(training=1.0))]
    by, order = ranked(found)
    assert by == "training loss" and [one.name for one, _ in order] == ["b", "a"]
    assert any("a lower training loss may be a worse model" in line for line in table(found))


@pytest.mark.parametrize(
    ("key", "holdout", "told"),
    [
        ("adapter.r", False, False),
        ("template", False, True),
        ("sequence.max_length", False, True),
        ("preference.beta", False, True),
        ("training.seed", False, False),
        ("training.seed", True, True),
        ("data.0.limit", True, True),
    ],
)
def test_losses_of_different_things_are_told(key: str, holdout: bool, told: bool) -> None:
    found = [(point(name, key), Result("finished", 3, held_out=1.0, holdout=holdout)) for name in "ab"]
    assert (
        any(line.startswith(f"losses are of different rows, tokens or aims where {key}") for line in table(found))
        == told
    )


@pytest.fixture(scope="module")
def small(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart on a tiny base: seconds a run."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"Llama {n} eats."}]}
        for n in range(48)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[40:]))
    return [
        f"model.base={tiny_base}",
        f"data=[{{path: {folder / 'train.jsonl'}, layout: messages}}]",
        f"eval_data=[{{path: {folder / 'held.jsonl'}, layout: messages}}]",
        "training.eval_every=100",
        "export.merged=false",
        "tracking=[]",
    ]


def sweep(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llama_ft.cli", "sweep", "quickstart", *words, "--out", str(out)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=400)


def listed(out: Path) -> list[dict]:
    return json.loads((out / "sweep.json").read_text())["points"]


def test_a_sweep_trains_ranks_goes_on_and_repeats_nothing(small: list[str], tmp_path: Path) -> None:
    steps = "training.max_steps=4"
    rates = tmp_path / "rates"
    one = sweep(rates, *small, steps, "training.learning_rate=1e-6,3e-2")
    assert one.returncode == 0, one.stderr
    best = listed(rates)[0]
    assert best["values"] == {"training.learning_rate": "3e-2"}, "a rate that moves nothing is no better"
    assert best["held_out"] < listed(rates)[1]["held_out"]
    assert re.findall(r"^(\d)  +(\S+)  +\d\.\d{4}  ", one.stdout, re.M) == [("1", "3e-2"), ("2", "1e-6")]
    assert best["rank"] == 1 and best["steps"] == 4 and best["seconds"] > 0
    before = {path: path.stat().st_mtime_ns for path in rates.glob("*/metrics.jsonl")}
    assert len(before) == 2

    again = sweep(rates, *small, steps, "training.learning_rate=1e-6,3e-2,1e30")
    assert again.returncode, "the status of a point that failed is the sweep's"
    assert again.stderr.count("done before") == 2 and "the others go on" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [(one["rank"], one["state"]) for one in listed(rates)] == [
        (1, "finished"),
        (2, "finished"),
        (None, "failed"),
    ]
    assert f"learning_rate-1e30 failed: {listed(rates)[2]['message'].splitlines()[0]}" in again.stdout

    other = sweep(rates, *small, "training.max_steps=5", "training.learning_rate=1e-6,3e-2")
    assert other.returncode == 2
    assert other.stderr.count("training.max_steps: this point was trained with 4, not 5") == 2
    assert "--overwrite" in other.stderr
    dry = sweep(rates, *small, steps, "training.learning_rate=1e-6,5e-3", "--dry-run")
    assert [line.split()[1] for line in dry.stdout.splitlines()[:2]] == ["finished", "new"]


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_goes_on(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = [*small, "training.max_steps=400", "training.save_every=1000", "training.learning_rate=1e-3,2e-3"]
    line = [sys.executable, "-m", "llama_ft.cli", "sweep", "quickstart", *words, "--out", str(out)]
    metrics = out / "learning_rate-1e-3" / "metrics.jsonl"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(line, stdout=said, stderr=said, env=ENVIRONMENT, start_new_session=True)
        try:
            limit = time.monotonic() + 200
            while not (metrics.exists() and '"loss"' in metrics.read_text()):
                assert process.poll() is None and time.monotonic() < limit, (tmp_path / "said").read_text()
                time.sleep(0.05)
            second = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=100)
            assert second.returncode == 2 and "another sweep is under way" in second.stderr
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=100) == 130, (tmp_path / "said").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [one["state"] for one in listed(out)] == ["stopped", "waiting"]
    assert "the same command goes on from here" in (tmp_path / "said").read_text()
    reached = max(int(path.name.removeprefix("step-")) for path in metrics.parent.glob("checkpoints/step-*"))
    done = sweep(out, *words)
    assert done.returncode == 0, done.stderr
    assert f"going on from step-{reached}" in done.stdout + done.stderr
    assert [(one["rank"], one["steps"]) for one in listed(out)] == [(1, 400), (2, 400)]
    steps = [json.loads(text)["step"] for text in metrics.read_text().splitlines() if '"loss"' in text]
    assert steps == list(range(1, 401)), "no step is lost and none is trained twice"


def test_a_training_that_a_killed_sweep_left_behind_is_not_written_over(small: list[str], tmp_path: Path) -> None:
    """kill -9 of the sweep alone: its training goes on, and the lock is free."""
    out = tmp_path / "sweep"
    words = [*small, "training.max_steps=4000", "training.learning_rate=1e-3,2e-3"]
    line = [sys.executable, "-m", "llama_ft.cli", "sweep", "quickstart", *words, "--out", str(out)]
    metrics = out / "learning_rate-1e-3" / "metrics.jsonl"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(line, stdout=said, stderr=said, env=ENVIRONMENT, start_new_session=True)
        try:
            limit = time.monotonic() + 200
            while not (metrics.exists() and '"loss"' in metrics.read_text()):
                assert process.poll() is None and time.monotonic() < limit, (tmp_path / "said").read_text()
                time.sleep(0.05)
            process.kill()
            process.wait()
            again = sweep(out, *words)
            assert again.returncode == 2, again.stderr
            assert re.search(r"learning_rate-1e-3: process \d+ still trains it", again.stderr)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
