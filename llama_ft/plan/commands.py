"""`llama-ft plan`: from a recipe on the command line to its plan on the screen."""

from __future__ import annotations

from dataclasses import asdict

from llama_ft.errors import UserError
from llama_ft.plan.data import data_facts
from llama_ft.plan.hardware import Hardware, parse_hardware, these_gpus, this_cpu
from llama_ft.plan.launch_line import accelerate_line, engine_of, launch_for, short, shown_line, torchrun_line
from llama_ft.plan.plan import make_plan
from llama_ft.plan.shape import known_shape
from llama_ft.plan.show import as_json, plan_lines, print_json, print_lines, sweep_lines
from llama_ft.plan.sweep import sweep
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.load import resolve
from llama_ft.recipe.trainable import untrainable


def plan_recipe(
    path: str,
    overrides: list[str],
    *,
    hardware: str | None = None,
    as_json_text: bool = False,
    sweeping: bool = False,
    price: float | None = None,
) -> None:
    """Prints the plan of a recipe, or with `sweeping` a table of methods and cards.

    price: of one device and hour. Raises UserError for a recipe or hardware that is not valid, and for a base whose
    sizes nothing on this machine says.
    """
    if price is not None and price < 0:
        raise UserError("a price is not negative", key="--price")
    resolved = resolve(path, overrides)
    recipe = resolved.recipe
    named = parse_hardware(hardware) if hardware is not None else None
    known, facts = known_shape(recipe.model), data_facts(recipe)
    if sweeping:
        cells = sweep(recipe, known, facts, named.devices if named is not None else 1)
        if as_json_text:
            print_json([asdict(cell) for cell in cells])
        else:
            print("\n".join(sweep_lines(cells)))
            print("one device each unless --hardware says how many; estimated, not yet run on a GPU by us")
        return
    config, launcher = launch_for(recipe.launch, resolved.launcher, named)
    target = named or hardware_of(launcher)
    engine = engine_of(config, launcher, target.devices)
    plan = make_plan(recipe, known, facts, target, engine)
    processes = target.devices if named is not None and target.devices != launcher.processes else None
    use_cpu = not target.on_gpu
    if launcher.torchrun:
        line = torchrun_line(path, overrides, [], launcher=launcher)
    else:
        line = accelerate_line(path, overrides, [], config=short(config), use_cpu=use_cpu, processes=processes)
    faults = [problem.what for problem in untrainable(recipe, resolved.origins)]
    if as_json_text:
        print_json(as_json(plan, shown_line(line), price, faults))
    else:
        print_lines(plan_lines(plan, shown_line(line), price, faults))


def hardware_of(launcher: Launcher) -> Hardware:
    """What a launch config runs on, here: this CPU, this machine's GPUs, or so many GPUs of unknown memory."""
    if launcher.use_cpu:
        here = this_cpu()
        shared = (here.memory or 0) // launcher.processes
        return Hardware(here.name, launcher.processes, shared, None, on_gpu=False)
    found = these_gpus()
    if found is None:
        return Hardware(f"{launcher.processes} GPUs that are not named", launcher.processes, None)
    return Hardware(found.name, launcher.processes, found.memory, found.card)
