"""`--resume`: from which checkpoint, whether the recipe is still the one it was written under, and what is recorded."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from llama_ft.errors import Problem, UserError
from llama_ft.files import write_json, write_text
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.emit import meant, scalar
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.agree import said_by_main
from llama_ft.train.checkpoints import newest_whole, remove_old, set_aside, tidy
from llama_ft.train.lock import recipe_hash

BESIDE_THE_CURVE = (
    # What a run is called, where it lies, and what it tells.
    r"name|output_dir|tracking(\.\d+)?|reproduces(\..+)?",
    # How often it looks and writes: an evaluation leaves the random numbers as it found them.
    r"training\.(save_every|keep_checkpoints|eval_every)",
    # Only stops a run.
    r"training\.(max_spike|join_timeout|stall_timeout)",
    # Takes effect when training has ended.
    r"export(\..+)?",
    # Contents are compared, wherever they lie (llama_ft.train.checks.check_same_data).
    r"(data|eval_data)\.\d+\.path|template|model\.tokenizer",
)
"""Keys that do not change a single bit of the losses or the weights."""
PLACES = r"output_dir|launch|(data|eval_data)\.\d+\.path"
"""Keys that machines may have each their own value of."""
EQUAL_TO_ROUNDING = (
    r"launch",
    r"model\.attention",
    r"sequence\.packing",
    r"training\.(micro_batch|gradient_checkpointing)",
)
"""Keys that say how the same step is computed: sums are rounded elsewhere, and dropout draws other random numbers."""
LENGTH = r"training\.(epochs|max_steps)"
"""Where the learning rate does not depend on how long the run is, it may become longer or shorter."""


@dataclass(frozen=True)
class Difference:
    """A key whose value is another than the checkpoint was written under; `None` where a side does not have it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {scalar(self.old)} → {scalar(self.new)}"


@dataclass
class Resumed:
    """Where a run goes on: after `step`, or from the beginning for None; what changed, what was found damaged."""

    step: int | None = None
    changed: list[Difference] = field(default_factory=list)
    damaged: dict[int, list[str]] = field(default_factory=dict)

    def keeps(self, key: str) -> bool:
        """Whether a key is as it was."""
        return all(one.key != key for one in self.changed)


def differences(old: Recipe, new: Recipe) -> list[Difference]:
    """Every dotted key whose value differs between two resolved recipes and means something in one of them."""
    before, after = (dict(_leaves(meant(recipe), "")) for recipe in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return [Difference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def differing(old: Recipe, new: Recipe) -> list[Difference]:
    """The differences that the processes of one run may not have among them: all but where things lie. One that saves
    in another step than the others waits for them for ever.
    """
    return [one for one in differences(old, new) if not re.fullmatch(PLACES, one.key)]


def check_same_recipe(old: Recipe, new: Recipe, where: Path) -> list[Difference]:
    """The differences that a run may go on with. UserError with all others, each with both values."""
    found = differences(old, new)
    harmless = [*BESIDE_THE_CURVE, *EQUAL_TO_ROUNDING]
    told = new.training.warmup_tokens is not None or new.training.warmup == 0 or new.training.warmup >= 1
    if new.training.schedule == "constant" and told:  # no share of a length
        harmless.append(LENGTH)
    refused = [one for one in found if not re.fullmatch("|".join(harmless), one.key)]
    if refused:
        hint = "put it back, or start anew with --overwrite or another output_dir"
        raise UserError(
            Problem(
                f"this run began with {scalar(one.old)}, and goes on with no other value than that: {scalar(one.new)}",
                str(where),
                one.key,
                hint if one is refused[-1] else None,
            )
            for one in refused
        )
    return found


def open_resumed(run: Run, recipe: Recipe, state: PartialState, console: Console) -> Resumed:
    """Finds the checkpoint to go on from and says which; the same for all processes, of which one looks.

    A damaged checkpoint newer than the newest whole one is kept under another name, and its steps are run again.
    Nothing is touched when the run cannot go on: UserError for no run, for one of which no checkpoint is whole, for a
    recipe that differs where it matters. A run that was killed before its first checkpoint begins again.
    """
    resumed = said_by_main(lambda: _find(run, recipe), main=state.is_main_process)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    for step, faults in resumed.damaged.items():
        say(f"checkpoint step-{step} is damaged ({'; '.join(faults)}); kept as step-{step}.damaged")
    if resumed.step is None:
        say("the run has no checkpoint yet: it begins again")
    else:
        say(f"going on from step-{resumed.step}")
    for one in resumed.changed:
        say(f"changed: {one}")
    return resumed


def _find(run: Run, recipe: Recipe) -> Resumed:
    if not run.recipe_file.exists() and not run.steps():
        raise UserError(f"{run.path} holds no run to resume", hint="start it without --resume")
    tidy(run)
    step, damaged = newest_whole(run)
    if step is None and damaged:
        hint = "no whole checkpoint is left: start anew with --overwrite"
        raise UserError(
            Problem(f"the checkpoint is damaged ({'; '.join(faults)})", str(run.checkpoint(number)), None, hint)
            for number, faults in damaged.items()
        )
    if step is None:
        if run.adapter.exists() or run.merged.exists():
            raise UserError(f"{run.path} holds a finished run without checkpoints", hint="start anew with --overwrite")
        return Resumed()
    written = run.checkpoint(step) / run.recipe_file.name
    changed = check_same_recipe(load_recipe(str(written), look_up=False), recipe, run.recipe_file)
    for number in damaged:
        set_aside(run, number)
    remove_old(run, recipe.training.keep_checkpoints)  # the run may have been killed when it was about to
    return Resumed(step, changed, damaged)


CUT = ("world_size", "micro_batch", "accumulation", "engine")


def cut_in_force(lock: dict[str, Any]) -> dict[str, Any]:
    """How steps were cut last, and by which engine: as the last resume says, else the start."""
    last = (lock.get("resumed") or [lock])[-1]
    return {name: last.get(name) for name in CUT}


def record(run: Run, recipe: Recipe, resumed: Resumed, now: tuple[int, int, int, str], console: Console) -> None:
    """Adds a resume to run.lock.json and puts the changed recipe into the run's; says what is no longer bit for bit.

    `now`: world size, micro-batch, accumulation and engine from here on. Called by one process, when the run is known
    to go on.
    """
    lock = run.lock
    before, cut = cut_in_force(lock), dict(zip(CUT, now, strict=True))
    changed = {one.key: [one.old, one.new] for one in resumed.changed}
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lock.setdefault("resumed", []).append({"step": resumed.step, "time": moment, "changed": changed, **cut})
    lock["recipe"] = recipe_hash(recipe)
    write_json(run.lock_file, lock)
    if resumed.changed:
        write_text(run.recipe_file, dump(recipe))
    rounded = [one.key for one in resumed.changed if re.fullmatch("|".join(EQUAL_TO_ROUNDING), one.key)]
    if before["world_size"] != cut["world_size"]:
        rounded.insert(0, f"{before['world_size']} → {cut['world_size']} processes")
    elif before["micro_batch"] != cut["micro_batch"] and "training.micro_batch" not in rounded:
        rounded.insert(0, f"micro-batches of {before['micro_batch']} → {cut['micro_batch']}")
    if before["engine"] != cut["engine"]:
        rounded.insert(0, f"{before['engine']} → {cut['engine']}")
    if rounded:
        noise = recipe.adapter.dropout or recipe.training.neftune_alpha
        also = ", and dropout and noise draw other random numbers" if noise else ""
        console.print(
            f"from here on the losses equal an unbroken run's to rounding{also}: {', '.join(rounded)}",
            highlight=False,
            soft_wrap=True,
        )


def note_result(run: Run, result: dict[str, Any], console: Console) -> None:
    """Writes into run.lock.json which weights became the result; says it where they are not the last."""
    run.lock["result"] = result
    write_json(run.lock_file, run.lock)
    if result["checkpoint"] == "best":
        last = result["last_held_out_loss"]
        beside = f" (the last: {last:.4f})" if last is not None else ""
        console.print(
            f"result: step-{result['step']}, held-out {result['held_out_loss']:.4f}{beside}",
            highlight=False,
            soft_wrap=True,
        )
