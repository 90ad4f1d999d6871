"""The shared trainer for objectives on answers: pairs, judged answers, reward models.

TRL has a trainer for each of them, which pads, reads a prompt once for each of its answers, and holds every logit. Here
the same losses (tests hold them to TRL's) are computed on our own layout, so that resume, guards, engines, evaluation
and exports are those of every other run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_ft.data.ends import end_lengths, per_end
from llama_ft.train.answering import LAYOUT, AnswerTrainer
from llama_ft.train.objectives.judged import KTO
from llama_ft.train.objectives.objective import Ends, Judged, Objective, sums
from llama_ft.train.resumable import kept_random_numbers

SAID = ("margin", "desirable")
"""What an objective reads of a batch besides what the model says."""


class ComparingTrainer(AnswerTrainer):
    """Optimises an objective on answers. A global batch counts its items: pairs, or judged answers.

    The loss is the mean over the items of a global batch, whatever micro-batches and processes it is cut into.
    """

    objective: Objective

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any):
        self.objective = objective
        super().__init__(*args, **kwargs)

    def ask(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Each end's log-probability, or its score: float32 [E]. The batch lies where the model does."""
        if self.objective.scores:
            layout = {name: batch[name] for name in LAYOUT if name in batch}
            return model(**layout, rows=batch["last"]).scores
        return per_end(super().ask(model, batch), batch["ends"])

    def ends_of(self, model: Any, batch: dict[str, Any]) -> Ends:
        """What the model, and the reference, say of a micro-batch's ends."""
        reference = None
        if self.objective.reference:
            assert self.reference is not None, "training has not begun"
            reference = self.reference.of(self, batch)
        inputs = self._prepare_inputs(batch)
        said = {name: inputs[name] for name in SAID if name in inputs}
        return Ends(self.ask(model, inputs), end_lengths(inputs["ends"]), reference, said)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the micro-batch's losses over the items of the whole global batch."""
        ends = self.ends_of(model, inputs)
        judged = self.objective.judge(ends)
        real = self.objective.real(ends.lengths)
        loss = self.of_step(judged.losses[real], num_items_in_batch)
        if model.training:
            self.count(sums(judged, real))
            self.pass_done(loss, inputs["input_ids"].numel(), inputs["targets"].numel())
        return (loss, judged) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Items of the global batch, over all processes."""
        own = sum([int(self.objective.real(end_lengths(batch["ends"])).sum()) for batch in batch_samples])
        total = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
        return total.clamp(min=1)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """At the start of every step: what an objective must know of the whole step before its first pass."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.figures = {}
        if isinstance(self.objective, KTO) and batches:
            self._settle(self.objective, [batch["others"] for batch in batches])
        return batches, items

    def _settle(self, objective: KTO, batches: list[dict[str, Any]]) -> None:
        """Sums the log-ratios of answers to prompts that are not theirs, over all processes, for the objective."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with kept_random_numbers(self.args.device):
            for batch in batches:
                values, lengths = self.said_of(self.model, batch), end_lengths(batch["ends"]).to(self.args.device)
                assert self.reference is not None
                ratios = (values - self.reference.of(self, batch))[lengths > 0]
                total += torch.stack([ratios.double().sum(), (lengths > 0).sum().double()])
        ratios, count = self.accelerator.reduce(total, "sum").tolist()
        objective.settle(ratios, count)

    @torch.no_grad()
    def measure(self, batches: Any) -> dict[str, float] | None:
        """The objective on all held-out items, judged together: its loss and figures; None if stopped on the way."""
        model: Any = self.model_wrapped if self.accelerator._models else self.model
        was_training = model.training
        model.eval()
        found: list[Ends] = []
        others: list[dict[str, Any]] = []
        try:
            for batch in batches:
                if self.is_in_train and self.stop.agreed():
                    return None
                batch.pop("origins", None)
                if "others" in batch:
                    others.append(batch["others"])
                with self.accelerator.autocast():
                    found.append(self.ends_of(model, batch))
        finally:
            model.train(was_training)
        if isinstance(self.objective, KTO):
            self._settle(self.objective, others)
        ends = joined(found)
        judged = self.objective.judge(ends)
        return self.means(sums(judged, self.objective.real(ends.lengths))) | self.measured_of(ends, judged)

    def measured_of(self, ends: Ends, judged: Judged) -> dict[str, float]:
        """What else is told of an evaluation; nothing here."""
        return {}


def joined(found: list[Ends]) -> Ends:
    """The ends of several batches as those of one."""
    reference = [one.reference for one in found if one.reference is not None]
    return Ends(
        torch.cat([one.values for one in found]),
        torch.cat([one.lengths for one in found]),
        torch.cat(reference) if reference else None,
        {name: torch.cat([one.batch[name] for one in found]) for name in SAID if all(name in o.batch for o in found)},
    )
