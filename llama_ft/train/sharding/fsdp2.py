"""FSDP2's parts: every weight, and every state of it, is a DTensor cut along its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llama_ft.train.sharding.parts import State


class Fsdp2:
    """Gathers and puts back what torch's fully_shard has cut; see :class:`llama_ft.train.sharding.parts.Parts`."""

    cut = True

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def weight(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter)

    def put_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        local_of(parameter).copy_(local_of(cut_like(parameter, whole)))

    def state(self, parameter: nn.Parameter) -> State:
        return {key: whole(value) for key, value in self.optimizer.state.get(parameter, {}).items()}

    def put_state(self, parameter: nn.Parameter, whole: State) -> None:
        self.optimizer.state[parameter] = {key: self._placed(parameter, key, value) for key, value in whole.items()}

    def _placed(self, parameter: nn.Parameter, key: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return cut_like(parameter, value)
        if key == "step" and self._kernel_counts(parameter):
            return torch.as_tensor(value, dtype=torch.float32, device=local_of(parameter).device)
        return value

    def _kernel_counts(self, parameter: nn.Parameter) -> bool:
        """Whether the steps are read where the weight lies, as torch's own load_state_dict has it."""
        group = next((one for one in self.groups() if any(each is parameter for each in one["params"])), {})
        return bool(group.get("fused") or group.get("capturable"))

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def whole(value: Any) -> Any:
    """A DTensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_of(value: Tensor) -> Tensor:
    """The part that lies here."""
    return value.to_local() if isinstance(value, DTensor) else value


def cut_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, cut and placed as the parameter is. Nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter)
    mesh, here = parameter.device_mesh, parameter.to_local()
    part = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
    local = part.to_local().to(device=here.device, dtype=whole.dtype).clone()
    return DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
