"""DeepSpeed's parts. ZeRO-1 and ZeRO-2 cut flat buffers of float32 masters; ZeRO-3 also cuts every weight.

`deepspeed.utils.safe_get_full_*` look at the same places, but know no state before the first step, and ZeRO-3's cannot
set a weight whose size is no multiple of the processes.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_ft.train.sharding.parts import State


class Zero:
    """Gathers and puts back what DeepSpeed has cut; see :class:`llama_ft.train.sharding.parts.Parts`."""

    def __init__(self, engine: Any):
        self.zero, self.device = engine.optimizer, engine.device
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        """torch's own, which steps the flat buffers."""
        self.cut = hasattr(self.zero, "fp32_partitioned_groups_flat")
        """ZeRO-3."""
        groups = [] if self.cut else self.zero.bit16_groups
        self.group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group}

    def weight(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            return self._gathered(parameter, self._flat(parameter))
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    def put_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if not self.cut or dist.get_rank() == 0:
                parameter.data.copy_(whole)
        if parameter.requires_grad:
            self._put(parameter, self._flat(parameter), whole)

    def state(self, parameter: nn.Parameter) -> State:
        flat = self._flat(parameter)
        return {
            key: self._gathered(parameter, value) if is_like(value, flat) else torch.tensor(float(value))
            for key, value in self.optimizer.state.get(flat, {}).items()
        }

    def put_state(self, parameter: nn.Parameter, whole: State) -> None:
        flat = self._flat(parameter)
        kept = self.optimizer.state[flat]
        for key, value in whole.items():
            if isinstance(value, Tensor) and value.dim():
                if key not in kept:
                    kept[key] = torch.zeros_like(flat)
                self._put(parameter, kept[key], value)
            else:
                kept[key] = self._steps(value, flat.device)

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _steps(self, value: Any, device: torch.device) -> Any:
        """A count of steps as the optimizer keeps it: torch's fused AdamW in a tensor beside its states, DeepSpeed's
        own Adam (of states that are offloaded) in an int.
        """
        return (
            torch.tensor(float(value), device=device) if isinstance(self.optimizer, torch.optim.AdamW) else int(value)
        )

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of the float32 masters among which the weight's are."""
        if self.cut:
            return self.zero.fp32_partitioned_groups_flat[self._position(parameter)[0]]
        return self.zero.single_partition_of_fp32_groups[self.group_of[id(parameter)]]

    def _position(self, parameter: Any) -> tuple[int, int, int]:
        """Of ZeRO-3: the flat buffer, where the weight's part begins in it, and its size with padding."""
        return self.zero.grad_position[self.zero.get_param_id(parameter)]

    def _here(self, parameter: Any) -> tuple[int, int, int]:
        """What of the weight lies in this process: where it begins in the flat buffer, where in the whole, how many."""
        if self.cut:
            begins = dist.get_rank(self.zero.dp_process_group) * parameter.ds_tensor.ds_numel
            _, at, size = self._position(parameter)
            return at, begins, max(0, min(size, parameter.ds_numel - begins))
        fragment = parameter._hp_mapping
        if fragment is None:
            return 0, 0, 0
        return (
            fragment.hp_fragment_address.start,
            fragment.lp_fragment_address.start,
            fragment.hp_fragment_address.numel,
        )

    def _gathered(self, parameter: Any, flat: Tensor) -> Tensor:
        """The whole of what `flat` (masters or states) has of the weight, as float32 in its shape."""
        shape = parameter.ds_shape if self.cut else parameter.shape
        at, begins, count = self._here(parameter)
        whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
        whole.view(-1)[begins : begins + count] = flat[at : at + count].to(whole.device)
        dist.all_reduce(whole, group=self.zero.dp_process_group)
        return whole

    def _put(self, parameter: Any, flat: Tensor, whole: Tensor) -> None:
        at, begins, count = self._here(parameter)
        flat[at : at + count] = whole.reshape(-1)[begins : begins + count].to(flat)


def is_like(value: Any, flat: Tensor) -> bool:
    """Whether a state has a number for each of the flat buffer's."""
    return isinstance(value, Tensor) and value.shape == flat.shape
