"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio, by the names in `tracking`.

Each keeps its files inside the run folder and asks nobody for anything, unless the user has signed in to a server or
named another place. Steps are ours, so that a run that is resumed goes on in the same curves. Each gets the run's name
and the resolved recipe.
"""

from __future__ import annotations

import importlib.util
import io
import os
import time
from abc import ABC, abstractmethod
from contextlib import redirect_stdout
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.errors import Problem, UserError
from llama_ft.recipe import dump
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

PROJECT = "llama_ft"
"""Under which name trackers gather runs, where theirs is not set."""
PACKAGES = {
    "tensorboard": "tensorboard>=2.19",
    "wandb": "wandb>=0.19",
    "mlflow": "mlflow>=3",
    "trackio": "trackio>=0.2",
}
"""What each name needs, as pyproject.toml has it."""


def check_trackers(recipe: Recipe) -> None:
    """Raises UserError, before anything is prepared, for every tracker whose package is not installed."""
    problems = [
        Problem(
            f"tracking names '{name}', which is not installed",
            key=f"tracking.{number}",
            hint=f"pip install '{PACKAGES[name]}', or leave it out: tracking=[tensorboard]",
        )
        for number, name in enumerate(recipe.tracking)
        if importlib.util.find_spec(name) is None
    ]
    if problems:
        raise UserError(problems)


def trackers(recipe: Recipe, run: Run, step: int = 0) -> list[TrainerCallback]:
    """A callback for each name in `tracking`; opened when training begins. `step`: the one a run is resumed from."""
    return [TRACKERS[name](recipe, run, step) for name in dict.fromkeys(recipe.tracking)]


class Tracker(TrainerCallback, ABC):
    """Passes a run's numbers on. Only the main process has one. Opened at the first line, maybe an evaluation's."""

    def __init__(self, recipe: Recipe, run: Run, step: int):
        self.recipe, self.run, self.resumed, self.is_open = recipe, run, step, False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        numbers = numbers_of(logs or {})
        if not self.is_open:
            self.open()
            self.is_open = True
        self.send(state.global_step, {grouped(key): value for key, value in numbers.items()})

    def end(self, *, finished: bool) -> None:
        """Called once when the run is over, however it ended; safe when nothing was logged."""
        if self.is_open:
            self.is_open = False
            self.close(finished=finished)

    @abstractmethod
    def open(self) -> None:
        """Begins, or goes on with, this run's record, and files the recipe."""

    @abstractmethod
    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Files the numbers of one line."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """Everything is written; the record is marked as finished or failed where the tracker knows the difference."""


def numbers_of(logs: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, those of its parts as `loss_by_source/wikipedia`."""
    parts = {f"{key}/{name}": one for key, of in logs.items() if isinstance(of, dict) for name, one in of.items()}
    return {key: float(value) for key, value in {**logs, **parts}.items() if isinstance(value, int | float)}


def grouped(key: str) -> str:
    """The name as trackers group it: `eval_loss` is `eval/loss`, what training logs stands under `train/`."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def flat(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The resolved recipe as dotted keys with plain values, for tables of hyper-parameters."""
    found: dict[str, bool | int | float | str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for number, inner in enumerate(value):
                walk(f"{prefix}.{number}", inner)
        elif value is not None:
            found[prefix] = value if isinstance(value, bool | int | float | str) else str(value)

    walk("", recipe.model_dump(mode="json"))
    return found


class TensorBoard(Tracker):
    """tensorboard/ in the run folder. Points after the step that a run is resumed from are taken back."""

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # TensorBoard drops what an earlier file of this folder says about this step and later ones.
        purge = self.resumed + 1 if self.resumed else None
        self.writer: Any = SummaryWriter(log_dir=str(self.run.path / "tensorboard"), purge_step=purge)
        if not self.resumed:
            self.writer.add_text("recipe", f"```yaml\n{dump(self.recipe)}\n```", 0)
            writer: Any = self.writer.file_writer
            for summary in hparams(flat(self.recipe), {"train/loss": None, "eval/loss": None}):
                writer.add_summary(summary, 0)

    def send(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self, *, finished: bool) -> None:
        self.writer.close()


class Wandb(Tracker):
    """Weights & Biases: wandb/ in the run folder, offline unless the user has signed in or set WANDB_MODE."""

    def open(self) -> None:
        import wandb

        folder = self.run.path / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "id"
        quiet = wandb.Settings(silent=True, console="off")
        wandb.setup(quiet)
        self.session: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.recipe.name,
            id=id_file.read_text(encoding="utf-8") if self.resumed and id_file.is_file() else None,
            resume="allow",
            dir=str(self.run.path),
            config=self.recipe.model_dump(mode="json"),
            mode=None if "WANDB_MODE" in os.environ or wandb.login(prompt=False) else "offline",
            settings=quiet,
        )
        id_file.write_text(self.session.id, encoding="utf-8")

    def send(self, step: int, numbers: dict[str, float]) -> None:
        self.session.log(numbers, step=step)

    def close(self, *, finished: bool) -> None:
        self.session.finish(exit_code=0 if finished else 1)


class Mlflow(Tracker):
    """MLflow: mlflow.db (SQLite) in the run folder, unless MLFLOW_TRACKING_URI names another store."""

    PARAM_LENGTH = 6000
    """Longest value of a parameter (mlflow.utils.validation.MAX_PARAM_VAL_LENGTH)."""

    def open(self) -> None:
        from mlflow import MlflowClient

        own = "MLFLOW_TRACKING_URI" not in os.environ
        store = f"sqlite:///{self.run.path / 'mlflow.db'}" if own else os.environ["MLFLOW_TRACKING_URI"]
        self.client: Any = MlflowClient(tracking_uri=store)
        id_file = self.run.path / "mlflow.id"
        if self.resumed and id_file.is_file():
            self.id = id_file.read_text(encoding="utf-8")
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        artifacts = (self.run.path / "mlflow").as_uri() if own else None
        number = experiment.experiment_id if experiment else self.client.create_experiment(name, artifacts)
        self.id = self.client.create_run(number, run_name=self.recipe.name).info.run_id
        id_file.write_text(self.id, encoding="utf-8")
        for key, value in flat(self.recipe).items():
            self.client.log_param(self.id, key, str(value)[: self.PARAM_LENGTH])

    def send(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Trackio(Tracker):
    """Trackio: trackio/ in the run folder, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a place."""

    def open(self) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(self.run.path / "trackio"))  # read once, when it is imported
        import trackio

        with redirect_stdout(io.StringIO()):  # it greets, and says how to open its page: docs/report.md does
            self.session: Any = trackio.init(
                project=PROJECT,
                name=self.recipe.name,
                config=self.recipe.model_dump(mode="json"),
                resume="allow" if self.resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def send(self, step: int, numbers: dict[str, float]) -> None:
        self.session.log(numbers, step=step)

    def close(self, *, finished: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
