"""`llama-ft plan`: from a recipe, or a number of FLOP, on the command line to its plan on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    if as_json_text:
        print_json(as_json(plan, shown_line(line), price))
    else:
        print_lines(plan_lines(plan, shown_line(line), price))


def plan_compute(question: Mapping[str, Any], *, as_json_text: bool = False, chart: Path | None = None) -> None:
    """Prints the plan of a model that is to be trained from nothing, by the options of llama_ft.plan.compute_ask.ask.

    chart: a picture to write as well. Raises UserError with every mistake in the options.
    """
    from llama_ft.plan.compute_ask import ask
    from llama_ft.plan.compute_plan import answer
    from llama_ft.plan.compute_plan import as_json as compute_json
    from llama_ft.plan.compute_table import answer_lines

    found = answer(ask(**question, chart=chart))
    if chart is not None:
        from llama_ft.plan.compute_chart import draw

        draw(found, chart)
    if as_json_text:
        print_json(compute_json(found))
        return
    print("\n".join(answer_lines(found)))
    if chart is not None:
        print(f"\nchart     {chart}")


def plan_asked(
    recipe: str | None,
    overrides: list[str],
    *,
    question: Mapping[str, Any],
    hardware: str | None,
    price: float | None,
    as_json_text: bool,
    sweeping: bool,
    chart: Path | None,
) -> None:
    """A recipe's plan or a compute plan, whichever the command line is for. UserError where it is for both or neither.

    question: the options of a compute plan as they were written, None for what was not.
    """
    given = [f"--{name}" for name, value in {**question, "chart": chart}.items() if value is not None]
    if recipe is not None:
        if given:
            what = f"a recipe ('{recipe}') is not planned with {' or '.join(given)}"
            raise UserError(what, key=given[0], hint=f"leave out the recipe, or {' and '.join(given)}")
        plan_recipe(recipe, overrides, hardware=hardware, as_json_text=as_json_text, sweeping=sweeping, price=price)
        return
    if not any(question[name] is not None for name in ("compute", "tokens", "params")):
        what = f"there is nothing to plan with {' and '.join(given)} alone" if given else "nothing to plan"
        hint = "name a RECIPE, or what a model is to take: --compute 1e21, --tokens 1.4T or --params 7B"
        raise UserError(what, hint=hint if not given else "add --compute, --tokens or --params")
    if sweeping:
        raise UserError("a sweep is of a recipe's base", key="--sweep", hint="name a RECIPE, or leave --sweep out")
    plan_compute({**question, "hardware": hardware, "price": price}, as_json_text=as_json_text, chart=chart)


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
