"""Policies that learn from what they say: GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740).

In each step the policy answers the step's prompts several times, the answers are scored, and one optimizer step follows
on them: who learns is always who spoke. transformers' loop, our checkpoints and our guards are those of
every other run; TRL's trainers of the same names would sample with padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from llama_ft.data.ends import end_lengths, ends_of, lay_groups, lay_out, per_end
from llama_ft.data.render import MASKED
from llama_ft.train.answering import AnswerTrainer
from llama_ft.train.asking import Answer, Asker, Prompt, figures_of, mixed
from llama_ft.train.guards import Guard
from llama_ft.train.objectives.losses import group_advantages, k3, leave_one_out
from llama_ft.train.objectives.policy import answer_losses
from llama_ft.train.resumable import kept_random_numbers

HELD_OUT = -1
"""The occasion of an evaluation: the same seeds every time, so that its curve shows the policy and not the draw."""
Batch = dict[str, Any]


class OnlineTrainer(AnswerTrainer):
    """One step on the answers to one batch of prompts. The trainer's documents are prompts; its items are answers.

    Figures of a step: `reward` and its parts, `reward_spread` (standard deviation within a group), `kl` (nats per token
    to the reference, k3), `answer_tokens`, `ended`. A held-out loss is the mean reward with its sign turned.
    """

    def __init__(self, *args: Any, asker: Asker, share: bool, **kwargs: Any):
        self.asker, self.share = asker, share
        self.temperature = float(asker.recipe.sampling.temperature)  # that answers were drawn at
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Prompts of the step become micro-batches of answers, with what each answer is worth."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.figures = {}
        if not batches:
            return batches, items
        prompts = [prompt for batch in batches for prompt in batch["prompts"]]
        with kept_random_numbers(self.args.device):
            answers = self.recipe.sampling.answers
            seed = mixed(self.recipe.training.seed, self.state.global_step, 0)
            with self.asking():
                groups = self.asker.ask(self.model, prompts, answers, seed)
            self.count({name: both.to(self.args.device) for name, both in figures_of(groups).items()})
            laid = self._laid_out(batches, groups)
            rewards = torch.tensor([one.scored.total for group in groups for one in group], device=self.args.device)
            self._add_advantages(laid, rewards.float())
        self.heard(prompts, groups)
        origins = [found for _, found in self.guard.batches]
        self.guard.begin([{**batch, "origins": whence} for batch, whence in zip(laid, origins, strict=True)])
        return laid, items

    def heard(self, prompts: list[Prompt], groups: list[list[Answer]]) -> None:
        """Called in each step with what was said."""

    def _laid_out(self, batches: list[Batch], groups: list[list[Answer]]) -> list[Batch]:
        laid, rest = [], iter(groups)
        for batch in batches:
            said = [(prompt.ids, [answer.ids for answer in next(rest)]) for prompt in batch["prompts"]]
            laid.append(lay_out(said, share=self.share) if said else lay_groups(filling(), share=False))
        return laid

    def _add_advantages(self, laid: list[Batch], rewards: Tensor) -> None:
        """Puts `advantages` [E] into each micro-batch, and `reference` [M] where there is one."""
        policy, answers = self.recipe.policy, self.recipe.sampling.answers
        per_answer = self.recipe.training.objective == "rloo"
        kl = []
        for batch in laid:
            if self.reference is None:
                break
            batch["reference"] = self.reference.of(self, batch)
            if per_answer and batch["targets"].numel():
                kl.append(per_end(self.said_of(self.model, batch) - batch["reference"], batch["ends"]))
        if per_answer and policy.whiten:  # arXiv 2307.09288, section 3.2.3: before the distance is taken off
            rewards = self._whitened(rewards)
        if kl:  # equation 4: the distance is part of the reward
            rewards = rewards - float(policy.kl) * torch.cat(kl)
        advantages = leave_one_out(rewards, answers) if per_answer else group_advantages(rewards, answers)
        rest = advantages
        for batch in laid:
            count = len(batch["ends"]) - 1 if batch["targets"].numel() else 0
            batch["advantages"] = rest[:count] if count else rewards.new_zeros(1)
            rest = rest[count:]

    def _whitened(self, rewards: Tensor) -> Tensor:
        """Mean 0 and standard deviation 1 over the whole batch, of all processes."""
        every = torch.tensor(gather_object(rewards.tolist()), dtype=torch.float64)
        return ((rewards - every.mean()) / (every.std(unbiased=False) + 1e-8)).float()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Sum of the micro-batch's losses over the answers of the whole global batch."""
        inputs = self._prepare_inputs(inputs)
        log_probs = self.ask(model, inputs)
        reference = inputs.get("reference")
        losses = answer_losses(
            log_probs,
            inputs["ends"],
            inputs["advantages"],
            reference,
            objective=self.recipe.training.objective,
            beta=float(self.recipe.policy.kl),
        )
        loss = self.of_step(losses, num_items_in_batch)
        if reference is not None:
            self.count({"kl": added_up(k3(log_probs.detach() - reference))})
        self.pass_done(loss, inputs["input_ids"].numel(), inputs["targets"].numel())
        return (loss, losses) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Answers of the global batch, over all processes."""
        own = sum(len(batch["prompts"]) for batch in batch_samples) * self.recipe.sampling.answers
        return self.accelerator.reduce(torch.tensor(own, device=device), "sum").clamp(min=1)

    @torch.no_grad()
    def measure(self, batches: Any) -> dict[str, float] | None:
        """One drawn answer to each held-out prompt: mean reward, its parts, and how far the policy has gone."""
        groups: list[list[Answer]] = []
        kl = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            if self.is_in_train and self.stop.agreed():
                return None
            prompts = batch["prompts"]
            if not prompts:
                continue
            with self.asking():
                said = self.asker.ask(self.model, prompts, 1, HELD_OUT)
            groups += said
            if self.reference is not None:
                pairs = zip(prompts, said, strict=True)
                laid = lay_out([(prompt.ids, [one.ids for one in group]) for prompt, group in pairs], share=False)
                values = self.said_of(self.model, laid) - self.reference.of(self, laid)
                kl += added_up(k3(values))
        found = {name: both.to(self.args.device) for name, both in figures_of(groups).items()}
        told = self.means(found)
        distance = {"kl": self.means({"kl": kl}).get("kl", math.nan)} if self.reference is not None else {}
        return {"loss": -told.get("reward", math.nan), **told, **distance}


class OnlineGuard(Guard):
    """Names answers where a step must not be taken."""

    def _records(self, trainer: Any) -> list[dict[str, Any]]:
        """This process's answers of the step, each with its nll per token as the weights are now."""
        decode = self.prepared.tokenizer.decode
        records = []
        for number, (batch, origins) in enumerate(self.batches):
            lengths = end_lengths(batch["ends"])
            nll = (-per_end(trainer.said_of(trainer.model, batch).cpu(), batch["ends"]) / lengths.clamp(min=1)).tolist()
            for end, loss, length in zip(ends_of(batch), nll, lengths.tolist(), strict=True):
                if length:
                    told = {"loss": loss if math.isfinite(loss) else None, "text": decode(end.ids.tolist())}
                    step = {"epoch": None, "process": trainer.accelerator.process_index, "micro_batch": number}
                    records.append({**self.whence(origins[end.document] if origins else None), **step, **told})
        return records


def added_up(values: Tensor) -> Tensor:
    """The sum of some numbers and how many they are, float64 [2]."""
    total = values.double().sum()
    return torch.stack([total, torch.full_like(total, len(values))])


def filling() -> list[Any]:
    """A batch of nothing: two tokens without a loss."""
    return [([0], [([0], [MASKED])])]
