"""The reference: what the model said before this training, without a second model in memory.

With an adapter it is the model with the adapter switched off. Otherwise its log-probabilities of all answers are asked
for once, before the first step, and kept under the hash of all they depend on. A second, frozen copy is there for who
asks for it by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.console import Console
from torch import Tensor

from llama_ft.errors import MachineFault
from llama_ft.paths import cache_dir

INDEX = "index"
"""Column and batch key: a document's number among training documents and, after them, the held-out ones."""
BLOCK = 1024
"""Documents whose log-probabilities are written in one file: what a stopped run need not ask again."""


class Reference(Protocol):
    """Whoever knows the reference's log-probabilities."""

    def of(self, trainer: Any, batch: dict[str, Any]) -> Tensor:
        """Those of a micro-batch's ends, summed over labelled tokens: float32 [E], without gradient."""
        ...


class AdapterOff:
    """The model itself without its adapter: nothing is kept, a forward pass more in each step."""

    def of(self, trainer: Any, batch: dict[str, Any]) -> Tensor:
        with without_adapter(trainer.model):
            return trainer.said_of(trainer.model, batch)


class Copy:
    """A second model in memory, frozen."""

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)

    def of(self, trainer: Any, batch: dict[str, Any]) -> Tensor:
        return trainer.said_of(self.model, batch)


class Table:
    """Log-probabilities asked for once: float32 [documents, ends of a document], held in main memory.

    others: of judged answers the second end is another document's answer to the same prompt, a batch of its own.
    """

    def __init__(self, values: Tensor, *, others: bool = False):
        self.values, self.others = values, others

    def of(self, trainer: Any, batch: dict[str, Any]) -> Tensor:
        values = self.values[batch[INDEX].cpu()]
        if self.others:
            values = values[:, :1] if "others" in batch else values[:, 1:]
        return values.flatten().to(trainer.args.device)


@contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Switches every adapter layer off. PEFT's own `disable_adapter` also takes gradients off the weights and puts them
    back, which weights that an engine has cut up do not survive."""
    layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def precomputed(trainer: Any, sets: Sequence[Any], facts: dict[str, Any], console: Console) -> Table:
    """Asks the model as it is now for the log-probabilities of every document of `sets`, or reads them from the cache.

    sets: data sets with the column `index`, numbered on from one to the next. facts: all that the answers depend on,
    hashed into the name of the folder. Every process asks for its share; a stopped run goes on where it was.
    MachineFault if the cache cannot be written.
    """
    folder = cache_dir("reference", hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32])
    documents = [(one, number) for one in sets for number in range(len(one))]
    found = []
    for block in range(0, len(documents), BLOCK):
        file = folder / f"{block:09}.npy"
        asked = documents[block : block + BLOCK]
        # The main process's cache is read for all: another machine's may lack the file.
        kept = _read(file, len(asked)) if trainer.is_world_process_zero() else None
        values = broadcast_object_list([kept])[0]
        if values is None:
            values = _ask(trainer, asked)
            if trainer.is_world_process_zero():
                _write(file, values)
        found.append(values)
        done = min(block + BLOCK, len(documents))
        console.print(f"reference: log-probabilities of {done:,} of {len(documents):,} documents", highlight=False)
    return Table(torch.from_numpy(np.concatenate(found)), others=facts["judged"])


def _ask(trainer: Any, documents: Sequence[tuple[Any, int]]) -> np.ndarray:
    """float32 [documents, ends of one], of all processes; each takes as many passes as the others."""
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    at_once = trainer.args.per_device_eval_batch_size
    own = list(range(rank, len(documents), world))
    passes = -(-len(documents) // (world * at_once))
    found: list[tuple[int, list[float]]] = []
    for number in range(passes):
        asked = own[number * at_once : (number + 1) * at_once] or [len(documents) - 1]
        batch = trainer.data_collator([documents[one][0][documents[one][1]] for one in asked])
        both = [batch, batch["others"]] if "others" in batch else [batch]
        values = torch.cat([trainer.said_of(trainer.model, one).view(len(asked), -1) for one in both], dim=1)
        found += zip(asked, values.float().cpu().tolist(), strict=True)
    every = dict(gather_object(found))
    return np.array([every[number] for number in range(len(documents))], dtype=np.float32)


def _read(file: Path, rows: int) -> np.ndarray | None:
    try:
        values = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return values if len(values) == rows else None


def _write(file: Path, values: np.ndarray) -> None:
    """Whole or not at all."""
    aside = file.with_suffix(f".{id(values)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as opened:
            np.save(opened, values)
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        hint = "free some space, or set LLAMA_FT_CACHE to a folder elsewhere; then start again"
        raise MachineFault(f"the reference's answers could not be kept: {error}", where=str(file), hint=hint) from error
