"""What is put back into an engine's parts, without the engine: where a number lies, and what may not be missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_ft.errors import MachineFault
from llama_ft.train.sharding.fsdp2 import Fsdp2
from llama_ft.train.sharding.parts import put_weights


@pytest.mark.parametrize("flag", ["fused", "capturable", None])
def test_steps_lie_where_their_kernel_reads_them(flag):
    """The meta device stands for a GPU, on which this was not run: torch's kernel refuses steps on the CPU."""
    weight = nn.Parameter(torch.zeros(4, 3, device="meta"))
    other = nn.Parameter(torch.zeros(4, 3, device="meta"))
    optimizer = torch.optim.AdamW([{"params": [other]}, {"params": [weight]}])
    if flag:
        optimizer.param_groups[1][flag] = True
    parts = Fsdp2(optimizer)
    for step in (torch.tensor(7, dtype=torch.int64), 7):
        parts.put_state(weight, {"step": step, "exp_avg": torch.ones(4, 3)})
        state = optimizer.state[weight]
        assert state["exp_avg"].device.type == "meta"
        if flag:
            assert state["step"].device.type == "meta" and state["step"].dtype == torch.float32
        else:
            assert state["step"] is step
    parts.put_state(other, {"step": torch.tensor(7.0), "exp_avg": torch.ones(4, 3)})
    assert optimizer.state[other]["step"].device.type == "cpu"


def test_a_step_that_was_moved_keeps_its_number():
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    Fsdp2(optimizer).put_state(weight, {"step": 7, "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3)})
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert optimizer.state[weight]["step"].item() == 8


def test_a_trained_weight_that_a_checkpoint_lacks_is_named():
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    whole = {"weight": torch.ones(4, 3)}
    parts = Fsdp2(torch.optim.AdamW([model.weight]))
    put_weights(parts, model, whole.get, where="step-4")  # a frozen one comes with the base
    assert torch.equal(model.weight, whole["weight"])
    model.bias.requires_grad_(True)
    with pytest.raises(MachineFault, match="step-4: the checkpoint does not hold bias, which is trained"):
        put_weights(parts, model, whole.get, where="step-4")
