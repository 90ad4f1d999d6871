"""The simplest way to run a recipe on so many cards: the first launch config that its plan finds room for."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.paths import find_file
from llama_ft.plan.data import DataFacts
from llama_ft.plan.hardware import Hardware
from llama_ft.plan.launch_line import engine_of
from llama_ft.plan.memory import Case
from llama_ft.plan.plan import Plan, make_plan
from llama_ft.plan.shape import Known
from llama_ft.plan.weights import FLOAT
from llama_ft.recipe.engines import unfit
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.recipe.schema import Recipe

ONE = ("single_gpu", "zero3_offload")
"""On one card, the simplest first."""
MANY = ("ddp", "zero1", "zero2", "fsdp2", "fsdp2_offload", "zero3_offload")
"""On several: the fewer parts a run is cut into, the fewer bytes it exchanges and the fewer things can go wrong. FSDP2
comes before ZeRO-3, which saves as much, because it needs no package of its own and sums gradients in float32."""


@dataclass(frozen=True)
class Choice:
    """A launch config by its name, with or without gradient checkpointing, and the plan of it."""

    config: str
    checkpointing: bool
    plan: Plan

    @property
    def main_memory(self) -> int:
        """Bytes that lie in main memory, of all devices together."""
        return main_memory(self.plan.case)


def simplest(recipe: Recipe, known: Known, facts: DataFacts, hardware: Hardware) -> Choice | None:
    """The first of ONE or MANY whose plan fits `hardware`; None where none does, or the recipe goes with none of them.

    Without gradient checkpointing where that fits. But where weights travel in every pass, whichever moves fewer bytes:
    checkpointing leaves room for more documents a pass, and so makes fewer passes.
    """
    adapter, training = recipe.adapter, recipe.training
    for name in ONE if hardware.devices == 1 else MANY:
        path = find_file(f"accelerate_configs/{name}.yaml")
        launcher = read_launcher(path) if path is not None else None
        if path is None or not isinstance(launcher, Launcher):
            continue
        whole = adapter.method != "full" and bool(adapter.modules_to_save)
        if unfit(
            launcher.engine,
            method=adapter.method,
            optimizer=training.optimizer,
            dora=adapter.dora,
            whole_modules=whole,
            objective=training.objective,
            reference=recipe.preference.reference,
        ):
            continue
        engine = engine_of(str(path), launcher, hardware.devices)
        found = []
        for again in (False, True):
            changed = training.model_copy(update={"gradient_checkpointing": again, "micro_batch": "auto"})
            plan = make_plan(recipe.model_copy(update={"training": changed}), known, facts, hardware, engine)
            if plan.fit.largest:
                found.append(Choice(name, again, plan))
        if found:
            travel = engine.weight_shards > 1 or engine.offload_weights
            return min(found, key=lambda one: one.plan.exchange.sent + one.plan.exchange.host) if travel else found[0]
    return None


def main_memory(case: Case) -> int:
    """Bytes that offloading holds in main memory, of all devices together: at least this much is needed there.

    Where weights lie there: a float32 weight or master, its gradient and AdamW's two moments for each trained weight,
    frozen ones as they are held, and what DeepSpeed computes with in 16 bits beside its masters.
    """
    weights, engine = case.weights, case.engine
    if not engine.offload_optimizer:
        return 0
    trained = weights.trained
    if not engine.offload_weights:
        return 3 * FLOAT * trained
    computed = case.trained_as * trained if engine.deepspeed else 0
    frozen = 0 if weights.full else weights.held(case.held)
    return 4 * FLOAT * trained + computed + frozen
