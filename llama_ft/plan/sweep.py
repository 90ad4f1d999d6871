"""`plan --sweep`: every method on every card for one base, from the recipe's own data and hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_ft.plan.data import DataFacts
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import CARDS, Hardware
from llama_ft.plan.plan import make_plan
from llama_ft.plan.shape import Known
from llama_ft.recipe.schema import Recipe

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora 8": {"method": "qlora", "bits": 8},
    "qlora 4": {"method": "qlora", "bits": 4},
}


@dataclass(frozen=True)
class Cell:
    """One method on one card, with gradient checkpointing off where a document fits so, and on where it must be.

    `micro_batch` is 0 where nothing fits. Rates are those of one card; None where the time is not known.
    """

    method: str
    card: str
    checkpointing: bool
    micro_batch: int
    needed: int
    tokens_per_second: float | None
    seconds: float | None


def sweep(recipe: Recipe, known: Known, facts: DataFacts, devices: int = 1) -> list[Cell]:
    """A cell for every method and card, `devices` of each without sharding."""
    cells = []
    for method, keys in METHODS.items():
        adapter = recipe.adapter.model_copy(update=keys)
        if method == "full":
            adapter = adapter.model_copy(update={"modules_to_save": []})
        else:
            adapter = adapter.model_copy(update={"freeze": []})
        for card in CARDS.values():
            hardware = Hardware(card.name, devices, card.memory, card)
            cells.append(_cell(recipe, known, facts, hardware, method, adapter))
    return cells


def _cell(recipe: Recipe, known: Known, facts: DataFacts, hardware: Hardware, method: str, adapter: Any) -> Cell:
    engine = Engine("DDP" if hardware.devices > 1 else "", hardware.devices)
    for again in (False, True):
        keys = {"gradient_checkpointing": again, "micro_batch": "auto"}
        changed = recipe.model_copy(update={"adapter": adapter, "training": recipe.training.model_copy(update=keys)})
        plan = make_plan(changed, known, facts, hardware, engine)
        if plan.fit.largest:
            break
    taken, seen = plan.seconds, plan.steps.seen
    rate = seen.tokens / taken.training / hardware.devices if taken is not None and seen is not None else None
    fits = bool(plan.fit.largest)
    return Cell(
        method,
        hardware.name,
        again,
        plan.fit.chosen.micro_batch if fits else 0,
        plan.peak,
        rate if fits else None,
        taken.total if taken is not None and fits else None,
    )
