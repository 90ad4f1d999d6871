"""Training on mixtures and on streams: the same curve however the work is cut, and after a resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_ft.errors import UserError
from llama_ft.paths import shipped_root
from llama_ft.recipe.run import Run
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT, metric, train_here

ROWS = shipped_root() / "datasets" / "llama-qa" / "train.jsonl"
SMALL = [
    "eval_data=null",
    "training.global_batch=8",
    "training.max_steps=6",
    "training.save_every=3",
    "training.learning_rate=2e-3",
    "export.merged=false",
]
STREAM = [
    "mixture.streaming=true",
    "mixture.shuffle_buffer=16",
    f"data={json.dumps([{'path': str(ROWS), 'layout': 'messages', 'limit': 30}])}",
]


@pytest.fixture
def two_sources(tmp_path: Path) -> str:
    """Twenty rows once and six rows twice per pass."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:26]]
    for name, some in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    first, second = ({"path": str(tmp_path / f"{name}.jsonl"), "layout": "messages"} for name in "ab")
    return f"data={json.dumps([first, {**second, 'epochs': 2}])}"


def curve(base: Path, folder: Path, changes: list[str], **flags: Any) -> list[float]:
    return metric(train_here([f"model.base={base}", *SMALL, f"output_dir={folder}", *changes], **flags).path)


def same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) == 6 and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1e-5


@pytest.mark.parametrize("kind", ["mixture", "stream"])
def test_the_curve_is_the_same_however_it_is_cut(small_base, tmp_path, two_sources, kind):
    data = STREAM if kind == "stream" else [two_sources]
    whole = curve(small_base, tmp_path / "whole", [*data, "training.micro_batch=8"])
    one = curve(small_base, tmp_path / "one", [*data, "training.micro_batch=1"])
    padded = curve(small_base, tmp_path / "padded", [*data, "training.micro_batch=4", "sequence.packing=false"])
    assert same(whole, one) and same(whole, padded)
    assert len(set(whole)) == 6, "every step saw other documents"


@pytest.mark.parametrize("kind", ["mixture", "stream"])
def test_resume_goes_on_where_the_run_stopped(small_base, tmp_path, two_sources, kind):
    data = STREAM if kind == "stream" else [two_sources]
    whole = curve(small_base, tmp_path / "run", data)
    run = Run(tmp_path / "run")
    shutil.rmtree(run.checkpoint(6))
    assert curve(small_base, tmp_path / "run", data, resume=True) == whole


def test_the_lock_says_what_was_mixed(small_base, tmp_path, two_sources):
    curve(small_base, tmp_path / "run", [two_sources])
    lock = Run(tmp_path / "run").lock
    assert lock["documents"] == 32
    assert [(one["drawn"], one["repeats"]) for one in lock["data"]["sources"]] == [(20, 1.0), (12, 2.0)]


def test_a_run_does_not_go_on_with_other_rows(small_base, tmp_path, two_sources):
    """Also not with a file of as many rows; a file that only moved is the same data."""
    curve(small_base, tmp_path / "run", [two_sources])
    shutil.rmtree(Run(tmp_path / "run").checkpoint(6))
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    with pytest.raises(UserError, match="the rows changed since this run began"):
        curve(small_base, tmp_path / "run", [two_sources], resume=True)
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl")
    curve(small_base, tmp_path / "run", [two_sources.replace("a.jsonl", "moved.jsonl")], resume=True)


def test_two_processes_train_on_the_same_documents(small_base, tmp_path):
    """44 documents in steps of 8: the last step of an epoch has 4, which no launcher may fill up with old ones.

    Nor may it the 7 held-out documents, of which each counts once.
    """
    changes = [f"model.base={small_base}", *SMALL, "data.0.limit=44", "training.max_steps=12", "training.micro_batch=4"]
    changes += ["eval_data=[{use: llama-qa, split: heldout, limit: 7}]", "training.eval_every=6"]
    one = metric(train_here([*changes, f"output_dir={tmp_path / 'one'}"]).path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launch, "-m", "llama_ft.train", "quickstart", *changes, f"output_dir={tmp_path / 'two'}"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    two = metric(tmp_path / "two")
    assert len(one) == len(two) == 12
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert metric(tmp_path / "two", "eval_labelled_tokens") == metric(tmp_path / "one", "eval_labelled_tokens")
    before, after = (metric(tmp_path / name, "eval_loss") for name in ("one", "two"))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= 1e-5 and len(after) >= 2
    assert Run(tmp_path / "two").lock["world_size"] == 2
