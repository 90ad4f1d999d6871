"""`llama-ft compare`: finished, broken or running runs side by side, and models that were evaluated by themselves, from
what lies in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.compare_scores import Scored, read_scores, result_files, score_rows
from llama_ft.evaluate.compare_table import lines
from llama_ft.evaluate.result import SuiteResult
from llama_ft.evaluate.sweep_rank import LAST, Result, other_ground, result_of, shown
from llama_ft.recipe.diff import Value, differences, open_side, values
from llama_ft.recipe.run import Run
from llama_ft.train.page.gather import ReportView, gather
from llama_ft.train.page.html import duration, loss

MOST = 26
"""Sides of one comparison: each has a letter."""
SWEEP = "sweep.json"
IN_NATS = ("pretrain", "sft", "rejection_sampling")
"""Objectives whose loss is nats per labelled token."""
UNTOLD = ("output_dir",)
"""Keys in which runs always differ, and which say nothing."""
SURROUNDINGS = ("device", "compute_dtype", "engine", "world_size", "micro_batch", "accumulation", "commit")
"""Keys of the lock that may explain a difference which the recipes do not."""


@dataclass
class Side:
    """One run: its letter, its name, and what its folder holds. alone: a model by itself, which has results only."""

    letter: str
    name: str
    run: Run
    view: ReportView
    result: Result
    recipe: dict[str, Value] = field(default_factory=dict)
    scored: list[SuiteResult] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    alone: bool = False

    @property
    def state(self) -> str:
        """How the run stands, in words."""
        if self.alone:
            return "a model by itself"
        state = "under way, or killed" if self.result.state == "running" else self.result.state
        steps = f"{self.result.steps:,} steps"
        return f"{state}, {steps}" if self.view.status else steps


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were named. The first is what evaluations of the others are held against.

    Parts are rows of cells, the first of them the heads. A model by itself is in the evaluations alone.
    """

    sides: list[Side]

    @property
    def runs(self) -> list[Side]:
        """The sides that were trained."""
        return [side for side in self.sides if not side.alone]

    @property
    def named(self) -> str:
        """What stands side by side, in words."""
        models = len(self.sides) - len(self.runs)
        counts = ((len(self.runs), "run"), (models, "model"))
        return " and ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count)

    @cached_property
    def different(self) -> dict[str, list[Value | None]]:
        """Each key in which the recipes do not all agree, with its value in each of them."""
        found: dict[str, list[Value | None]] = {}
        for side in self.runs[1:]:
            for one in differences(self.runs[0].recipe, side.recipe):
                found.setdefault(one.key, [])
        sections = list(dict.fromkeys(key.partition(".")[0] for side in self.runs for key in side.recipe))
        keys = sorted(found, key=lambda key: sections.index(key.partition(".")[0]))
        return {key: [side.recipe.get(key) for side in self.runs] for key in keys if key not in UNTOLD}

    @property
    def in_nats(self) -> bool:
        """Whether every run's loss is a token's; one whose recipe cannot be read is taken to be."""
        return all(side.view.objective in (None, *IN_NATS) for side in self.sides)

    def counted(self) -> str:
        """How many keys differ, in words."""
        count = len(self.different)
        return f"{count} {'key differs' if count == 1 else 'keys differ'}"

    def recipes(self) -> list[list[str]]:
        """Key by key, what each recipe says."""
        rows = [[key, *("-" if one is None else str(one) for one in cells)] for key, cells in self.different.items()]
        return [["key", *(side.letter for side in self.runs)], *rows]

    def losses(self) -> list[list[str]]:
        """Run by run: the held-out loss before and after, the lowest, the training loss, what it took."""
        heads = ["run", "held-out before", "after", "lowest, at step", "training", "steps", "tokens", "time"]
        rows = [heads]
        for side in self.runs:
            held, found = side.view.series("eval_loss"), side.result
            before = f"{held[0][1]:.4f}" if held and held[0][0] == 0 else "-"
            lowest = "-" if found.best is None else f"{loss(found.best)}, {found.best_step}"
            tokens = side.view.series("tokens")
            rows.append(
                [
                    f"{side.letter} {side.name}",
                    before,
                    shown(found.held_out),
                    lowest,
                    shown(found.training),
                    f"{found.steps:,}",
                    f"{tokens[-1][1]:,.0f}" if tokens else "-",
                    "-" if found.seconds is None else duration(found.seconds),
                ]
            )
        return rows

    def surroundings(self) -> list[list[str]]:
        """What the locks say otherwise than one another: device, engine, how steps were cut, versions."""
        rows = [["of the lock", *(side.letter for side in self.runs)]]
        locks = [side.view.lock for side in self.runs]
        tables = [_map(lock.get("versions")) for lock in locks]
        for key in SURROUNDINGS:
            rows.append([key, *(str(lock.get(key, "-")) for lock in locks)])
        for name in dict.fromkeys(name for table in tables for name in table):
            rows.append([name, *(str(table.get(name, "-")) for table in tables)])
        return [rows[0], *(row for row in rows[1:] if len(set(row[1:])) > 1)]

    def evaluations(self) -> list[list[str]]:
        """Score by score, each side's value, and its difference from the first one's."""
        return score_rows([Scored(side.letter, side.scored, side.alone) for side in self.sides])

    def samples(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Questions that more than one run was asked, with (who, answer): equal answers share a line."""
        asked: dict[str, dict[tuple[int, str], list[str]]] = {}
        for side in self.sides:
            for sample in side.view.samples:
                if not isinstance(sample, dict) or not isinstance(sample.get("question"), str):
                    continue
                answers = asked.setdefault(sample["question"], {})
                for place, kind in enumerate(("reference", "before", "after")):
                    who = answers.setdefault((place, sample[kind]), []) if isinstance(sample.get(kind), str) else []
                    who += [] if side.letter in who else [side.letter]
        names = ("reference", "{} before", "{}")
        found = []
        for question, answers in asked.items():
            if len({letter for who in answers.values() for letter in who}) > 1:
                ordered = sorted(answers.items(), key=lambda one: one[0][0])
                said = [(names[place].format(", ".join(who)), text) for (place, text), who in ordered]
                found.append((question, said))
        return found

    def notes(self) -> list[str]:
        """What a reader must know of the comparison."""
        losses = "losses in nats per labelled token" if self.in_nats else "losses as each objective defines them"
        said = [f"training: the mean loss over the last 1/{LAST} of the steps; {losses}"] if self.runs else []
        keys = other_ground(list(self.different), any(side.result.holdout for side in self.sides))
        if keys:
            said.append(f"held-out losses are of different rows, tokens or aims where {', '.join(keys)} differs")
        if "training.global_batch" in self.different:
            said.append("a step is not the same amount of data in all runs: training.global_batch differs")
        for side in self.sides:
            broken = [*side.view.unreadable, *side.unreadable]
            said += [f"{side.letter}: could not be read: {', '.join(broken)}"] if broken else []
        return said


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def compare_runs(names: Sequence[str]) -> Comparison:
    """Opens runs, the runs of sweeps, and models that were evaluated by themselves.

    UserError with every name that is none of these, and for fewer than two.
    """
    problems: list[Problem] = []
    runs: list[Run] = []
    for name in names:
        try:
            runs += runs_of(name)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    runs = list(dict.fromkeys(runs))
    if not 1 < len(runs) <= MOST:
        count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        raise UserError(
            f"{count}: a comparison has 2 to {MOST}", hint="llama-ft compare runs/a runs/b, or a sweep's folder"
        )
    labels = short_names([run.path for run in runs])
    letters = [chr(ord("A") + place) for place in range(len(runs))]
    return Comparison([open_one(*one) for one in zip(letters, labels, runs, strict=True)])


def runs_of(name: str) -> list[Run]:
    """The run of a name, all runs of a sweep's folder that began, in the order of its ranking, or the folder that holds
    the results of a model by itself."""
    for folder in (Path(name), Path("runs", name)):
        file = folder / SWEEP
        if not file.is_file():
            continue
        try:
            points = json.loads(file.read_text(encoding="utf-8"))["points"]
            found = [Run((folder / point["run"]).resolve()) for point in points]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the list of the sweep's runs cannot be read: {error}", where=str(file)) from error
        return [run for run in found if run.recipe_file.is_file()]
    try:
        return [Run.open(name)]
    except UserError:
        for folder in (Path(name), Path("runs", name)):
            if result_files(folder / "eval"):
                return [Run(folder.resolve())]
        raise


def open_one(letter: str, name: str, run: Run) -> Side:
    """Reads a run folder; what is damaged is named in the notes and otherwise left out. UserError where the results of
    several models lie in one folder."""
    view = gather(run)
    side = Side(letter, name, run, view, result_of(run), alone=not run.recipe_file.is_file())
    if not side.alone:
        try:
            side.recipe = values(open_side(str(run.path)))
        except UserError:
            if run.recipe_file.name not in view.unreadable:
                side.unreadable.append(run.recipe_file.name)
    side.scored, damaged = read_scores(run.path / "eval")
    side.unreadable += damaged
    models = list(dict.fromkeys(result.subject for result in side.scored)) if side.alone else []
    if len(models) > 1:
        hint = "measure each into a folder of its own: llama-ft eval MODEL --out FOLDER"
        raise UserError(f"results of several models: {', '.join(models)}", where=str(run.path / "eval"), hint=hint)
    return side


def short_names(paths: Sequence[Path]) -> list[str]:
    """Each folder by as many of its last parts as tell it from the others."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def print_comparison(names: Sequence[str], html: Path | None) -> None:
    """Prints the tables, or writes the page and prints its place. UserError as :func:`compare_runs` raises it."""
    found = compare_runs(names)
    if html is None:
        print("\n".join(lines(found)))
        return
    from llama_ft.evaluate.compare_page import write_page

    print(write_page(found, html))
