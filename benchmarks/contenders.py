"""Who is compared, where each can run, and how its process is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.venvs import python_of
from llama_ft.recipe import Recipe

OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """A library with the settings that it is measured with."""

    name: str
    module: str
    """Harness below benchmarks/peers."""
    pins: str | None
    """File of pins below benchmarks/peers/pins; None: what runs in this process's environment."""
    what: str
    """For the table: which library, how it is set."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    in_order: bool = True
    """Whether it takes documents as they come; of others only the first step can be compared."""

    def command(self, spec: Path, recipe: Recipe) -> list[str]:
        """What runs it, from the project's root. NoEnvironment where its packages cannot be had."""
        module = f"benchmarks.peers.{self.module}"
        python = sys.executable if self.pins is None else str(python_of(self.pins))
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--config_file", str(recipe.launch)]
        return [python, *(launch if self.name == OURS else []), "-m", module, str(spec)]


CONTENDERS = {
    one.name: one
    for one in (
        Contender(OURS, "ours", None, "llama_ft, its training command"),
        Contender(
            *("trl-default", "trl", "trl", "TRL as it stands: bf16 autocast, checkpointing, documents in random order"),
            in_order=False,
        ),
        Contender(
            "trl-tuned", "trl", "trl", "TRL without autocast and checkpointing, documents of like length together"
        ),
        Contender("hf", "hf", "trl", "transformers' Trainer and PEFT, tuned alike"),
        Contender("litgpt", "litgpt", "litgpt", "litgpt's finetune loop, tuned alike"),
        Contender("llamafactory", "llamafactory", "llamafactory", "LLaMA-Factory, tuned alike"),
        Contender("torchtune", "torchtune", "torchtune", "torchtune's single-device recipe, tuned alike"),
        Contender("liger", "trl", "trl", "TRL tuned, with Liger's kernels", ("cuda",)),
        Contender("unsloth", "unsloth", None, "Unsloth", ("cuda",)),
        Contender("axolotl", "axolotl", None, "axolotl", ("cuda",)),
    )
}
"""In the order in which they take turns."""
