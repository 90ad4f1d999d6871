"""A checkpoint of a run whose engine cuts weights or optimizer states: the same files as one process writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llama_ft.llama.checkpoints.shards import stored_tensors
from llama_ft.train.sharding.parts import (
    Parts,
    named_parameters,
    put_optimizer,
    put_weights,
    whole_optimizer,
    whole_weights,
)


def whole_for_file(parts: Parts, model: Any, *, main: bool) -> dict[str, Tensor]:
    """What the checkpoint's weights are written from, by the model's names: of an adapter, what is trained alone."""
    return whole_weights(parts, model, main=main, trained=isinstance(model, PeftModel))


def names_in_file(model: Any) -> Mapping[str, str]:
    """By parameter, the name under which a checkpoint holds it."""
    names = [name for name, _ in named_parameters(model)]
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    # PEFT shortens names by rules of its own; a number that goes through them comes back beside the short one.
    numbers: Any = {name: torch.tensor(number) for number, name in enumerate(names)}
    short = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
    return {names[int(number)]: name for name, number in short.items()}


def load_weights(parts: Parts, model: Any, folder: Path) -> None:
    """Puts a checkpoint's weights into a model that its engine has cut. One tensor is read at a time."""
    names, stored = names_in_file(model), stored_tensors(folder)

    def read(name: str) -> Tensor | None:
        entry = stored.get(names.get(name, ""))
        if entry is None:
            return None
        with safe_open(entry.file, framework="pt") as source:
            return source.get_tensor(names[name])

    put_weights(parts, model, read, where=str(folder))


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Writes the optimizer's state as one process would have it, and the scheduler's."""
    main = trainer.is_world_process_zero()
    state = whole_optimizer(trainer.parts, trainer.model, trainer.trained_order, main=main)
    if main:
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Puts back what :func:`save_optimizer`, or transformers for a single process, has written."""
    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    put_optimizer(trainer.parts, trainer.model, trainer.trained_order, saved)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
