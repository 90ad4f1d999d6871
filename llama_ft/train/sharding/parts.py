"""Weights and optimizer states that an engine has cut up, gathered whole and put back.

Whatever engine trains, a checkpoint holds what one process would have written: whole weights, and the optimizer's state
as torch's own `state_dict` of it. So a run goes on with any number of processes, and under another engine. DeepSpeed's
and FSDP's own checkpoints go on where they were written.

Gathered one tensor at a time; the main process keeps them in main memory, 12 bytes per trained weight with AdamW. Put
back one tensor at a time too: every process maps the file and takes its own part, so the run folder must be one that
all hosts see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_ft.errors import MachineFault

OWN = ("params", "fused", "foreach", "capturable")
"""What an optimizer's groups hold that belongs to the engine which steps them."""
State = dict[str, Any]
"""What an optimizer keeps of one weight: tensors of its shape, and numbers such as its steps."""


class Parts(Protocol):
    """How one engine gathers and puts back. Every process calls every method, in the same order."""

    cut: bool
    """Whether the weights themselves are cut, and not only what the optimizer keeps of them."""

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole weight as it is trained: in float32 where the engine keeps such masters."""

    def put_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Every process keeps its part of `whole`."""

    def state(self, parameter: nn.Parameter) -> State:
        """The whole state of a trained weight; empty before the first step."""

    def put_state(self, parameter: nn.Parameter, whole: State) -> None:
        """Every process keeps its part of each tensor."""

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, in the order in which they were made, with their settings as they are now."""


def parts_of(trainer: Any) -> Parts | None:
    """The engine of a trainer that has prepared its model; None where every process has all weights and states."""
    if trainer.is_deepspeed_enabled:
        from llama_ft.train.sharding.zero import Zero

        return Zero(trainer.deepspeed)
    if trainer.is_fsdp_enabled:
        from llama_ft.train.sharding.fsdp2 import Fsdp2

        return Fsdp2(trainer.optimizer.optimizer)
    return None


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have without an engine; a tied weight comes once."""
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def order_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the trained weights, group by group: what the numbers in an optimizer's state_dict stand for.

    To be asked before an engine takes the parameters over.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


@torch.no_grad()
def whole_weights(parts: Parts, model: nn.Module, *, main: bool, trained: bool) -> dict[str, Tensor]:
    """Every weight by name, whole and in main memory, on the main process; {} on the others.

    trained: only those that training changes. A head that is tied to the embedding is under both names.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad or not trained:
            whole = parts.weight(parameter)
            if main:
                found[name] = whole.detach().cpu().clone()
    if main:
        tied = dict(model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in named_parameters(model)}
        found |= {name: found[first[id(one)]] for name, one in tied.items() if first[id(one)] in found}
    return found


@torch.no_grad()
def whole_optimizer(parts: Parts, model: nn.Module, order: list[list[str]], *, main: bool) -> dict[str, Any]:
    """What `optimizer.state_dict()` of a single process would say, on the main process; {} on the others."""
    parameters = dict(named_parameters(model))
    state: dict[int, State] = {}
    for number, name in enumerate(name for group in order for name in group):
        whole = parts.state(parameters[name])
        if main:
            state[number] = {key: _kept(value) for key, value in whole.items()}
    if not main:
        return {}
    groups, at = [], 0
    for settings, names in zip(parts.groups(), order, strict=True):
        plain = {key: value for key, value in settings.items() if key != "params"}
        groups.append({**plain, "params": list(range(at, at + len(names)))})
        at += len(names)
    return {"state": state, "param_groups": groups}


def _kept(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def put_weights(parts: Parts, model: nn.Module, read: Callable[[str], Tensor | None], *, where: str) -> None:
    """Puts back every weight of which `read(name)` knows the whole. MachineFault for a trained one that it lacks.

    where: what is read, for the message.
    """
    for name, parameter in named_parameters(model):
        whole = read(name)
        if whole is not None:
            parts.put_weight(parameter, whole)
        elif parameter.requires_grad:
            # It would go on from its first values, as if it had never been trained.
            raise MachineFault(
                f"the checkpoint does not hold {name}, which is trained",
                where=where,
                hint="remove this checkpoint, so that --resume takes the one before it",
            )


@torch.no_grad()
def put_optimizer(parts: Parts, model: nn.Module, order: list[list[str]], saved: Mapping[str, Any]) -> None:
    """Puts back an optimizer's `state_dict`, whoever wrote it: one process, or :func:`whole_optimizer`."""
    parameters = dict(named_parameters(model))
    for number, name in enumerate(name for group in order for name in group):
        if number in saved["state"]:
            parts.put_state(parameters[name], saved["state"][number])
    for now, then in zip(parts.groups(), saved["param_groups"], strict=True):
        now.update({key: value for key, value in then.items() if key in now and key not in OWN})
