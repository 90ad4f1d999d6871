"""A step that must not be taken: its loss or its gradient is no number, or its loss is far above those before it.

The step is judged when its gradients are there and before the optimizer moves a weight, so the weights in memory and
every checkpoint stay as good as they were. What was in the step is saved, each document with its own loss, for a run
is most often broken by a learning rate or by a row. Every process judges the same numbers, so all of them stop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object

from llama_ft.data.batches import ORIGIN
from llama_ft.data.prepare import Prepared
from llama_ft.data.render import MASKED
from llama_ft.errors import Problem, UserError
from llama_ft.files import write_text
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

WINDOW = 20
"""Steps before, from whose median a spike is measured."""
SEEN = 10
"""Fewer steps than this say nothing about what is usual."""
NAMED = 8
"""Documents named in the message; the file has all of them."""


class Diverged(UserError):
    """Training ran into numbers that nothing can be learnt from.

    The user's to mend (exit 2), not the machine's: whoever restarts a run after an exit 1 would meet the same rows.
    """

    def __init__(self, problems: Sequence[Problem], step: int):
        super().__init__(problems)
        self.step = step

    def __reduce__(self):
        return type(self), (self.problems, self.step)

    def block(self) -> str:
        """The head names the step; the lines say why, which documents were in it, and how to go on."""
        return "\n".join([f"llama-ft: stopped before step {self.step}", *(f"  {line}" for line in self.problems)])


@dataclass(frozen=True)
class Fault:
    """Why a step is not taken. `spike`: its loss is a number, and whoever trusts it may go on."""

    what: str
    spike: bool = False


def fault_of(loss: float, norm: float, before: Sequence[float], max_spike: float) -> Fault | None:
    """What is wrong with a step, or None. `before`: losses of the steps before it, nats per labelled token.

    max_spike: nats; 0 lets every loss pass that is a number."""
    if not math.isfinite(loss):
        return Fault(f"the loss is {loss}")
    if not math.isfinite(norm):
        return Fault(f"the norm of the gradient is {norm}")
    usual = before[-WINDOW:]
    if not max_spike or len(usual) < SEEN or loss <= median(usual) + max_spike:
        return None
    above = loss - median(usual)
    return Fault(f"the loss is {loss:.2f}, {above:.2f} nats above the median of the {len(usual)} steps before", True)


class Guard:
    """Watches the steps of one trainer. The trainer calls `begin`, `add` and `check`, in this order, in every step."""

    def __init__(self, run: Run, recipe: Recipe, prepared: Prepared):
        self.run, self.recipe, self.prepared = run, recipe, prepared
        self.batches: list[tuple[dict[str, Any], list[tuple[int, ...]]]] = []
        self.loss: torch.Tensor | None = None

    @property
    def max_spike(self) -> float:
        """Nats above the steps before that are too many."""
        return float(self.recipe.training.max_spike)

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """Takes note of a step's micro-batches, and takes the origins of their documents out of them."""
        self.batches = [(batch, batch.pop("origins", [])) for batch in batches]
        self.loss = None

    def add(self, loss: torch.Tensor) -> None:
        """One micro-batch's part of the step's loss. Nothing is read: that would wait for the device."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def check(self, trainer: Any, norm: torch.Tensor | float | None) -> None:
        """Raises :class:`Diverged` on the main process, SystemExit with its status on the others, or returns.

        `norm`: the gradient's, before clipping; None where it is not known. Waits for the device once.
        """
        if self.loss is None:
            return
        # Where a scaler serves float16, it finds gradients that overflow by itself, skips the step and scales less.
        if norm is None or trainer.accelerator.scaler is not None:
            norm = 0.0
        loss = self.loss.float()
        both = torch.stack([loss, torch.as_tensor(norm, dtype=loss.dtype, device=loss.device)])
        losses, norms = trainer.accelerator.gather(both[None]).T.tolist()
        worst = next((one for one in norms if not math.isfinite(one)), max(norms))
        # A step writes one line, and a second one where it is followed by an evaluation.
        before = [line["loss"] for line in trainer.state.log_history[-2 * WINDOW :] if "loss" in line]
        fault = fault_of(sum(losses) / len(losses), worst, before, self.max_spike)
        if fault is not None:
            self._stop(trainer, fault)

    def _stop(self, trainer: Any, fault: Fault) -> None:
        step = trainer.state.global_step + 1
        records = gather_object(self._records(trainer))
        if not trainer.is_world_process_zero():
            trainer.accelerator.wait_for_everyone()  # until the main process has written what it will tell
            raise SystemExit(Diverged.exit_code)
        file = self.run.path / "faults" / f"step-{step}.jsonl"
        try:
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            saved = f"all {len(records)} documents of the step, each with its loss: {file}"
        except OSError as error:
            saved = f"the documents of the step could not be saved: {error}"
        key = "training.max_spike" if fault.spike else None
        problems = [Problem(fault.what, None, key, self._hint(fault)), *named(records), Problem(saved)]
        trainer.accelerator.wait_for_everyone()
        raise Diverged(problems, step)

    def _hint(self, fault: Fault) -> str:
        """Which checkpoint is whole, and the ways on."""
        steps = self.run.steps()
        kept = f"checkpoint step-{steps[-1]} is whole" if steps else "there was no checkpoint yet"
        anew = "start anew with --overwrite, a lower training.learning_rate or without the row that is to blame"
        if fault.spike:
            past = "--resume training.max_spike=0 goes past it" if steps else "training.max_spike=0 goes past it"
            return f"{kept}; {past}, or {anew}"
        types = "; bfloat16 reaches further than float16" if self.recipe.model.dtype == "float16" else ""
        return f"{kept}, but --resume would meet the same step: {anew}{types}"

    def _records(self, trainer: Any) -> list[dict[str, Any]]:
        """This process's documents of the step, with what each costs now; those without a label are left out."""
        found = []
        for number, (batch, origins) in enumerate(self.batches):
            for place, (ids, labels) in enumerate(documents_of(batch)):
                found.append((number, origins[place] if origins else None, ids, labels))
        losses = document_losses(trainer, [(ids, labels) for _, _, ids, labels in found])
        epoch = None if trainer.order is None else trainer.order.epoch
        records = []
        for (number, origin, ids, labels), loss in zip(found, losses, strict=True):
            labelled = int((labels[1:] != MASKED).sum())
            if not labelled:
                continue
            records.append(
                {
                    **self.whence(origin),
                    "epoch": epoch,
                    "process": trainer.accelerator.process_index,
                    "micro_batch": number,
                    "loss": loss if math.isfinite(loss) else None,
                    "labelled": labelled,
                    "text": self.prepared.tokenizer.decode(ids.tolist()),
                    "input_ids": ids.tolist(),
                    "labels": labels.tolist(),
                }
            )
        return records

    def whence(self, origin: tuple[int, ...] | None) -> dict[str, Any]:
        """Which source, row and part a document is of; nothing where it does not know."""
        if origin is None:
            return {}
        source = self.prepared.job.train[origin[0]]
        return {**dict(zip(ORIGIN, origin, strict=True)), "source": source.label, "where": source.where(origin[1])}


def named(records: Sequence[dict[str, Any]]) -> list[Problem]:
    """The documents of a step that cost most, those whose loss is no number first."""
    if records and all(record["loss"] is None for record in records):
        return [Problem("the loss of every document of the step is no number: the weights are broken, not a row")]
    worst = sorted(records, key=lambda record: -math.inf if record["loss"] is None else -record["loss"])
    problems = []
    for record in worst[:NAMED]:
        unit = "" if "labelled" not in record else " nats per labelled token"
        loss = "no number" if record["loss"] is None else f"{record['loss']:.2f}{unit}"
        part = f", part {record['part']}" if record.get("part") else ""
        epoch = "" if record["epoch"] is None else f", epoch {record['epoch']}"
        problems.append(Problem(f"loss {loss}", f"{record.get('where', 'a document')}{part}{epoch}"))
    return problems


def documents_of(batch: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels [tokens] of each document of a micro-batch, packed or padded, on the host."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if "cu_seqlens" in batch:
        for start, end in pairwise(batch["cu_seqlens"].tolist()):
            yield ids[0, start:end], labels[0, start:end]
    else:
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            yield ids[row, :length], labels[row, :length]


@torch.no_grad()
def document_losses(trainer: Any, documents: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Nats per labelled token of each document alone, as the weights are now, without dropout.

    Every process takes as many passes as the one with the most documents: sharded weights are gathered by all at once.
    """
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    count = torch.tensor([len(documents)], device=trainer.args.device)
    passes = int(trainer.accelerator.gather(count).max())
    padded = [documents[min(number, len(documents) - 1)] for number in range(passes)]
    found = losses_of(model, padded, trainer.args.device)
    model.train(was_training)
    return found[: len(documents)]


@torch.no_grad()
def losses_of(model: Any, documents: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> list[float]:
    """Nats per labelled token of each document alone, given as its ids and labels."""
    batches = [{"input_ids": ids[None].to(device), "labels": labels[None].to(device)} for ids, labels in documents]
    return [float(model(**batch).loss) for batch in batches]
