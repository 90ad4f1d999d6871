"""llama_ft: one-page recipes that tune a LLaMA and prove what they export.

The four public functions load their folder on first use, so `import llama_ft` stays free of torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_ft.data.prepare import Prepared, prepare_data
    from llama_ft.export.run import Export, export_run
    from llama_ft.recipe import Recipe, load_recipe
    from llama_ft.recipe.run import Run
    from llama_ft.train.run import train_recipe

__version__ = "0.1.0"
__all__ = ["Export", "Prepared", "Recipe", "Run", "export_run", "load_recipe", "prepare_data", "train_recipe"]

_HOMES = {
    "Recipe": "llama_ft.recipe",
    "load_recipe": "llama_ft.recipe",
    "Prepared": "llama_ft.data.prepare",
    "prepare_data": "llama_ft.data.prepare",
    "Run": "llama_ft.recipe.run",
    "train_recipe": "llama_ft.train.run",
    "Export": "llama_ft.export.run",
    "export_run": "llama_ft.export.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama_ft' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


# What bitsandbytes says on a CPU: at its import, which PEFT triggers, that a kernel of the hub, which we do not use,
# was not fetched; and in each layer of each pass that LLM.int8() rounds its inputs to float16, as it is meant to.
for _talker in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_talker).setLevel(logging.ERROR)
