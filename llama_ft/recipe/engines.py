"""What an engine that cuts up weights, or an optimizer's states, cannot train; by the names of launchers.py."""

from __future__ import annotations

from typing import NamedTuple

from llama_ft.recipe.objectives import ONLINE

CUT_WEIGHTS = ("FSDP2", "ZeRO-3")
"""Every process has a part of each weight and gathers a layer while it computes."""
CUT_STATES = (*CUT_WEIGHTS, "ZeRO-1", "ZeRO-2")
"""Every process steps a part of the weights."""


class Unfit(NamedTuple):
    """A key of the recipe that does not go with the engine, the reason, and what to do."""

    key: str
    what: str
    hint: str


def unfit(
    engine: str,
    *,
    method: str,
    optimizer: str,
    dora: bool = False,
    whole_modules: bool = False,
    objective: str = "sft",
    reference: str = "auto",
) -> list[Unfit]:
    """What does not go with an engine.

    `whole_modules`: embedding, head or norms are trained beside an adapter; `reference`: preference.reference.
    """
    found = []
    if engine == "FSDP":
        what = "FSDP of version 1 is not supported: it flattens weights that are trained with weights that are not"
        found.append(Unfit("launch", what, "write fsdp_version: 2 into the launch config, or take fsdp2.yaml"))
    if engine in CUT_WEIGHTS and method == "qlora":
        what = f"{engine} cannot cut up 4- and 8-bit weights: bitsandbytes packs them, with scales that lie beside them"
        found.append(Unfit("adapter.method", what, "take ddp.yaml or zero2.yaml, or method: lora"))
    if engine in CUT_STATES and optimizer != "adamw":
        what = f"{optimizer} looks at whole matrices or blocks, and {engine} gives every process pieces of them"
        found.append(Unfit("training.optimizer", what, "write adamw, or take ddp.yaml"))
    if engine == "ZeRO-3" and dora:
        what = "ZeRO-3 cannot train DoRA: PEFT measures the rows of a weight while they are in pieces"
        found.append(Unfit("adapter.dora", what, "take fsdp2.yaml or zero2.yaml, or remove dora"))
    if engine == "ZeRO-3" and whole_modules:
        what = "ZeRO-3 cannot train embedding, head or norms beside an adapter: PEFT copies them before they are whole"
        found.append(Unfit("adapter.modules_to_save", what, "take fsdp2.yaml or zero2.yaml"))
    if engine in CUT_WEIGHTS:
        found += _needs_whole_weights(engine, method, objective, reference)
    return found


def _needs_whole_weights(engine: str, method: str, objective: str, reference: str) -> list[Unfit]:
    if objective == "reward":
        what = f"{engine} cannot train a reward model: its score head is read outside of the layers that are gathered"
        return [Unfit("training.objective", what, "take ddp.yaml or zero2.yaml")]
    if objective in ONLINE:
        what = f"{objective} samples with whole weights, and {engine} would gather every layer for every token"
        return [Unfit("training.objective", what, "take ddp.yaml or zero2.yaml")]
    if objective in ("dpo", "kto") and reference == "copy":
        what = f"{engine} cuts up the model that is trained, a second copy would lie whole on every device"
        return [Unfit("preference.reference", what, "write precomputed, or take zero2.yaml")]
    return []
