"""The built wheel, away from the checkout: it lists, validates, shows what the model will see, and trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.train.conftest import small_base  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the unpacked wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "llama_ft.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    code = "import llama_ft, llama_ft.paths; print(llama_ft.__file__, llama_ft.paths.shipped_root())"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [
        str(installed / "llama_ft" / "__init__.py"),
        str(installed / "llama_ft" / "_shipped"),
    ]


def test_lists_validates_and_previews(installed, tmp_path, smollm2):
    listed = run(installed, tmp_path, "recipes")
    assert listed.returncode == 0, listed.stderr
    assert "quickstart" in listed.stdout
    assert "alpaca/llama-7b-full" in listed.stdout
    valid = run(installed, tmp_path, "validate", "quickstart", "alpaca/llama-7b-full")
    assert valid.returncode == 0, valid.stderr
    wrong = run(installed, tmp_path, "validate", "quickstart", "training.lerning_rate=1")
    assert wrong.returncode == 2
    assert "learning_rate" in wrong.stderr
    seen = run(installed, tmp_path, "preview", "quickstart", "--json", "--limit", "2")
    assert seen.returncode == 0, seen.stderr
    assert [json.loads(line)["row"] for line in seen.stdout.splitlines()] == [0, 1]
    job = run(
        installed, tmp_path, "launch", "alpaca/llama-7b-full", "--on", "slurm", "--hardware", "8xH100", "--dry-run"
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.startswith("#!/bin/bash") and "one_node() {" in job.stdout


def test_trains(installed, tmp_path, small_base):  # noqa: F811
    done = run(
        installed,
        tmp_path,
        "train",
        "quickstart",
        f"model.base={small_base}",
        "data.0.limit=16",
        "eval_data=null",
        "training.max_steps=2",
        "training.learning_rate=1e-2",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "quickstart" / "export.json").read_text())["ok"] is True
