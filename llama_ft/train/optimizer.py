"""The optimizers and the learning rate of a recipe: which weights learn how fast, and by which rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from llama_ft.adapters.quantised import bitsandbytes
from llama_ft.errors import UserError
from llama_ft.recipe.schedule import rate
from llama_ft.recipe.schema import Recipe, Training

NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "muon": "adamw_torch_fused",  # what is no matrix
}
"""The recipe's optimizers in transformers' words."""


def check_optimizer(recipe: Recipe) -> None:
    """UserError, before anything is loaded, for an optimizer whose library is not installed."""
    name = recipe.training.optimizer
    if name not in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        return
    try:
        bitsandbytes()
    except UserError as error:
        hint = "pip install 'llama-ft[qlora]', or write adamw"
        raise UserError(f"{name} needs bitsandbytes", key="training.optimizer", hint=hint) from error


def parameter_groups(model: nn.Module, decayed: set[str], recipe: Recipe) -> list[dict[str, Any]]:
    """Trained weights by weight decay (none for norms and biases: not in `decayed`) and by learning rate.

    LoRA+ lets B learn `adapter.lora_plus` times as fast as A (arXiv 2402.12354, section 4).
    """
    peak, decay = float(recipe.training.learning_rate), float(recipe.training.weight_decay)
    faster = recipe.adapter.lora_plus if recipe.adapter.method != "full" else None
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learning_rate = peak * float(faster) if faster is not None and "lora_B" in name else peak
            groups.setdefault((learning_rate, decay if name in decayed else 0.0), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": wd} for (lr, wd), group in groups.items()]


def make_optimizer(trainer: Trainer, model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over the model's trained weights."""
    training = recipe.training
    groups = parameter_groups(model, set(trainer.get_decay_parameter_names(model)), recipe)
    known: Any = model
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, known)
    settings.pop("lr", None)  # each group has its own
    lr = float(training.learning_rate)
    if training.optimizer == "muon":
        tables = {
            id(weight) for name, weight in model.named_parameters() if "embed_tokens" in name or "lm_head" in name
        }
        return MuonWithAdamW(
            groups, lr=lr, betas=(training.betas[0], training.betas[1]), eps=float(training.eps), tables=tables
        )
    return kind(groups, lr=lr, **settings)


def make_schedule(optimizer: Optimizer, training: Training, steps: int) -> LambdaLR:
    """The learning rate at each step of `steps`, as :func:`llama_ft.recipe.schedule.rate` says."""
    return LambdaLR(optimizer, lambda step: rate(training, step, steps))


def optimizer_arguments(training: Training) -> dict[str, Any]:
    """What transformers is told of the optimizer. The schedule is ours, see :func:`make_schedule`."""
    return {
        "optim": NAMES[training.optimizer],
        "learning_rate": float(training.learning_rate),
        "adam_beta1": float(training.betas[0]),
        "adam_beta2": float(training.betas[1]),
        "adam_epsilon": float(training.eps),
        "weight_decay": float(training.weight_decay),
        "max_grad_norm": float(training.max_grad_norm),
        "warmup_steps": float(training.warmup),
    }


class MuonWithAdamW(Optimizer):
    """torch's Muon for the blocks' matrices, its fused AdamW for embedding, head, norms and vectors.

    Muon's update is scaled to AdamW's size (arXiv 2502.16982, section 2.2), so both share the recipe's learning rate.
    Seen from outside it is one optimizer: groups and state are those of the two.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, tables: set[int]
    ):
        """groups: as for any optimizer; tables: ids of the matrices that AdamW takes, embedding and head."""
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for for_muon, some in parts.items():
                chosen = [
                    weight for weight in group["params"] if (weight.ndim == 2 and id(weight) not in tables) == for_muon
                ]
                if chosen:
                    some.append({**group, "params": chosen})
        self.inner: list[Optimizer] = []
        if parts[True]:
            self.inner.append(torch.optim.Muon(parts[True], lr=lr, momentum=betas[0], adjust_lr_fn="match_rms_adamw"))
        if parts[False]:
            self.inner.append(torch.optim.AdamW(parts[False], lr=lr, betas=betas, eps=eps, fused=True))
        super().__init__([group for optimizer in self.inner for group in optimizer.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """The groups and the state that others see and change are those that the two work on."""
        at = 0
        for optimizer in self.inner:
            count = len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[at : at + count]
            optimizer.state = self.state
            at += count

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = closure() if closure is not None else None
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the two go on with what was loaded."""
        super().load_state_dict(state_dict)
        self._share()
