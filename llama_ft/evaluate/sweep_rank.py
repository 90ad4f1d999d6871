"""What the runs of a sweep came to: their losses in order, best first, in sweep.json and as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_ft.evaluate.compare_table import aligned
from llama_ft.evaluate.sweep_grid import Point
from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.train.page.gather import ReportView, gather
from llama_ft.train.page.html import duration, loss

LAST = 10
"""One step's loss says little of a run: the training loss told is the mean over this part of its steps, the last."""
HELD_OUT, TRAINING = "held-out loss", "training loss"
MEASURES = re.compile(
    r"(eval_data|template|sequence|preference|reward_model|rewards|sampling|policy)(\..+)?|training\.objective"
    r"|model\.(base|revision|tokenizer)"
)
"""Keys that change what a held-out loss is a loss of: points that differ in one of them stand on different ground."""
HOLDOUT = re.compile(r"(data|mixture)(\..+)?|training\.seed")
"""Keys that change which rows are held out, where `eval_data` takes them from the training rows."""


@dataclass(frozen=True)
class Result:
    """What a run's folder shows; `state` as status.json has it, or waiting.

    Losses are in nats per labelled token, or what the objective has in their place.
    held_out: of the weights that the run kept; best: the lowest, at step best_step; training: the mean over the last
    tenth of the steps. None where there is none. status: how the training ended, where this sweep saw it fail.
    """

    state: str
    steps: int
    held_out: float | None = None
    best: float | None = None
    best_step: int | None = None
    training: float | None = None
    seconds: float | None = None
    status: int | None = None
    message: str | None = None
    holdout: bool = False


def result_of(run: Run, status: int | None = None) -> Result:
    """Reads a run folder, be it finished or not; a folder that is not there is `waiting`."""
    if not run.recipe_file.exists():
        return Result("failed" if status else "waiting", 0, status=status)
    view = gather(run)
    held = finite(view, "eval_loss")
    trained = finite(view, "loss")
    tail = [value for _, value in trained[-max(1, len(trained) // LAST) :]]
    best = min(held, key=lambda pair: pair[1], default=(None, None))
    state = str(view.status.get("state", "waiting"))
    taken = sum(value for key in ("seconds", "eval_seconds") for _, value in finite(view, key))
    return Result(
        "failed" if status else state,
        view.step,
        held_out=kept_loss(view, held),
        best=best[1],
        best_step=best[0],
        training=sum(tail) / len(tail) if tail else None,
        seconds=taken or None,
        status=status,
        message=view.status.get("message") if state == "failed" else None,
        holdout=view.recipe is not None and hasattr(view.recipe.eval_data, "holdout"),
    )


def finite(view: ReportView, key: str) -> list[tuple[int, float]]:
    """(step, value) of a key's finite values."""
    return [(step, value) for step, value in view.series(key) if math.isfinite(value)]


def kept_loss(view: ReportView, held: Sequence[tuple[int, float]]) -> float | None:
    """The held-out loss of the weights that became the result: the last ones, unless the recipe keeps the best."""
    kept: Any = view.lock.get("result")
    if isinstance(kept, dict) and isinstance(kept.get("held_out_loss"), int | float):
        return float(kept["held_out_loss"])
    return held[-1][1] if held else None


def ranked(results: Sequence[tuple[Point, Result]]) -> tuple[str, list[tuple[Point, Result]]]:
    """By which loss, and the points: finished ones best first, then the rest in their order.

    The training loss takes over where a finished run has no held-out one: two kinds of loss make no order.
    """
    done = [pair for pair in results if pair[1].state == "finished"]
    by = HELD_OUT if all(result.held_out is not None for _, result in done) else TRAINING
    of = lambda pair: pair[1].held_out if by == HELD_OUT else pair[1].training  # noqa: E731
    done.sort(key=lambda pair: math.inf if of(pair) is None else of(pair))
    return by, [*done, *(pair for pair in results if pair[1].state != "finished")]


def notes(results: Sequence[tuple[Point, Result]], by: str) -> list[str]:
    """What a reader of the ranking must know of it."""
    said = []
    if by == TRAINING:
        said.append(
            "ranked by training loss, the mean over the last tenth of the steps: not every run has held-out rows, "
            "and a lower training loss may be a worse model"
        )
    other = other_ground(list(results[0][0].values) if results else [], any(result.holdout for _, result in results))
    if other:
        said.append(
            f"losses are of different rows, tokens or aims where {', '.join(other)} differs: the order says little"
        )
    failed = [(point, result) for point, result in results if result.state == "failed"]
    said += [f"{point.name} failed: {first_line(result)}" for point, result in failed]
    return said


def other_ground(keys: Sequence[str], holdout: bool) -> list[str]:
    """Those of the keys that change what a held-out loss is a loss of. holdout: held-out rows are training's own."""
    return [key for key in keys if MEASURES.fullmatch(key) or (holdout and HOLDOUT.fullmatch(key))]


def first_line(result: Result) -> str:
    """Why a run failed, in a line."""
    lines = (result.message or "").strip().splitlines()
    return lines[0] if lines else f"status {result.status}; what it said stands above"


def table(results: Sequence[tuple[Point, Result]]) -> list[str]:
    """The ranking as lines of plain text."""
    by, order = ranked(results)
    keys = list(results[0][0].values) if results else []
    head = ["", *(keys or ["point"]), HELD_OUT, "lowest, at step", TRAINING, "steps", "time", "run"]
    rows = [head]
    for place, (point, result) in enumerate(order, 1):
        done = result.state == "finished"
        lowest = "-" if result.best is None else f"{loss(result.best)}, {result.best_step}"
        rows.append(
            [
                str(place) if done else result.state,
                *([point.values[key] for key in keys] or [point.name]),
                shown(result.held_out),
                lowest,
                shown(result.training),
                str(result.steps),
                "-" if result.seconds is None else duration(result.seconds),
                point.name,
            ]
        )
    return [*aligned(rows), f"ranked by {by}, best first", *notes(results, by)]


def shown(value: float | None) -> str:
    """A loss in four decimals: neighbours in a sweep lie close."""
    return "-" if value is None else f"{value:.4f}"


def write_sweep(out: Path, recipe: str, results: Sequence[tuple[Point, Result]]) -> None:
    """sweep.json: the recipe, by which loss the points are ranked, and the points in that order."""
    by, order = ranked(results)
    found = [
        {"rank": place if result.state == "finished" else None, "run": point.name, "values": point.values}
        | {"overrides": list(point.overrides)}
        | {key: value for key, value in asdict(result).items() if key != "holdout"}
        for place, (point, result) in enumerate(order, 1)
    ]
    write_json(
        out / "sweep.json", {"version": 1, "recipe": recipe, "by": by, "notes": notes(results, by), "points": found}
    )
