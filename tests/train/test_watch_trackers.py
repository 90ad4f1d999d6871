"""Trackers: each files the run's name, its recipe and its numbers inside the run folder, offline; the real packages.

Weights & Biases, MLflow and Trackio are optional (`pip install llama-ft[track]`): where absent, their tests skip.
"""

from __future__ import annotations

import importlib.util
import sqlite3
from types import SimpleNamespace
from typing import Any

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from llama_ft.recipe.run import Run
from llama_ft.train.trackers import PACKAGES, check_trackers, flat, grouped, trackers
from tests.conftest import ROOT

LOSSES = [(0, {"eval_loss": 4.0}), *((step, {"loss": 4.0 - step / 4, "epoch": step / 8}) for step in range(1, 5))]


def track(
    run: Run, name: str, lines: list[tuple[int, dict[str, float]]], *, step: int = 0, finished: bool = True
) -> None:
    """Sends some lines through a tracker, as training would; from `step` on where the run is resumed."""
    (tracker,) = trackers(load_recipe("quickstart", [f"tracking=[{name}]", f"output_dir={run.path}"]), run, step)
    everything: Any = (None, SimpleNamespace(global_step=0), None)
    for number, logs in lines:
        everything[1].global_step = number
        tracker.on_log(*everything, logs)
    tracker.end(finished=finished)  # type: ignore[attr-defined]
    tracker.end(finished=finished)  # type: ignore[attr-defined]  # once more does nothing


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.setenv(name, "")  # so that what a tracker sets itself is taken back
        monkeypatch.delenv(name)
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run")


def test_tensorboard_goes_on_without_points_twice(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(run, "tensorboard", LOSSES)
    track(
        run, "tensorboard", [(step, {"loss": 9.0 + step}) for step in (3, 4, 5)], step=2
    )  # stopped at 2, other values
    found = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [
        (1, 3.75),
        (2, 3.5),
        (3, 12),
        (4, 13),
        (5, 14),
    ]
    assert [(one.step, one.value) for one in found.Scalars("eval/loss")] == [(0, 4.0)]
    assert "recipe/text_summary" in found.Tags()["tensors"]
    assert "_hparams_/session_start_info" in found.PluginTagToContent("hparams")


def test_mlflow_keeps_its_store_in_the_run(run):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    track(run, "mlflow", LOSSES, finished=False)
    client = MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    number = (run.path / "mlflow.id").read_text()
    assert client.get_run(number).info.status == "KILLED"
    track(run, "mlflow", [(5, {"loss": 2.0})], step=4)
    found = client.get_run(number)
    assert (found.info.run_name, found.info.status) == ("quickstart", "FINISHED")
    assert found.data.params["training.learning_rate"] == "0.003" and found.data.params["data.0.use"] == "llama-qa"
    steps = [one.step for one in client.get_metric_history(number, "train/loss")]
    assert steps == [1, 2, 3, 4, 5]


def test_wandb_stays_offline_without_a_login(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **_: False)  # whoever runs the tests may be signed in
    track(run, "wandb", LOSSES)
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    name = (run.path / "wandb" / "id").read_text()
    (file,) = folder.glob("*.wandb")
    assert file.name == f"run-{name}.wandb" and file.stat().st_size > 500
    assert b"quickstart" in file.read_bytes() and b"train/loss" in file.read_bytes()
    track(run, "wandb", [(5, {"loss": 2.0})], step=4)
    assert len(list((run.path / "wandb").glob(f"offline-run-*-{name}"))) == 2


def test_trackio_keeps_its_store_in_the_run(run, capsys):
    if importlib.util.find_spec("trackio") is None:  # it reads TRACKIO_DIR when it is imported
        pytest.skip("trackio is not installed")
    track(run, "trackio", LOSSES)
    store = sqlite3.connect(run.path / "trackio" / "llama_ft.db")
    assert [step for (step,) in store.execute("select step from metrics order by step")] == [0, 1, 2, 3, 4]
    assert store.execute("select distinct run_name from metrics").fetchall() == [("quickstart",)]
    assert b"llama-qa" in store.execute("select config from configs").fetchone()[0]
    assert capsys.readouterr().out == ""


def test_a_missing_package_is_said_before_anything_is_prepared(tmp_path, monkeypatch):
    """Through the trainer itself: a recipe whose data does not even exist is refused for the trackers first."""
    from llama_ft.train import start as start_module
    from llama_ft.train.run import train_recipe

    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("all trackers are installed")
    monkeypatch.setattr(start_module, "prepare_data", lambda *_, **__: pytest.fail("data was prepared first"))
    recipe = load_recipe("quickstart", [f"tracking=[tensorboard, {', '.join(absent)}]", f"output_dir={tmp_path / 'r'}"])
    with pytest.raises(UserError) as caught:
        train_recipe(recipe)
    assert [problem.key for problem in caught.value.problems] == [f"tracking.{i + 1}" for i in range(len(absent))]
    for name, problem in zip(absent, caught.value.problems, strict=True):
        assert f"'{name}', which is not installed" in problem.what and f"pip install '{PACKAGES[name]}'" in problem.hint
    assert not (tmp_path / "r").exists()
    check_trackers(load_recipe("quickstart", ["tracking=[]"]))


def test_the_packages_named_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    for needed in PACKAGES.values():
        assert f'"{needed}"' in text


def test_names_and_recipe_as_trackers_show_them():
    assert [grouped(key) for key in ("eval_loss", "loss", "grad_norm")] == [
        "eval/loss",
        "train/loss",
        "train/grad_norm",
    ]
    found = flat(load_recipe("quickstart", []))
    assert found["data.0.use"] == "llama-qa" and found["training.betas"] == "[0.9, 0.999]"
    assert found["sequence.packing"] is True and "training.max_steps" not in found
