"""Optimizers by name: groups, learning rates, steps as the formulas say, states that come back from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from llama_ft.train.optimizer import MuonWithAdamW, check_optimizer, make_schedule, parameter_groups


class Small(nn.Module):
    """A module with the names that the rules look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 4)
        self.up_proj = nn.Linear(4, 6, bias=False)
        self.down_proj = nn.Linear(6, 4, bias=False)
        self.norm = nn.RMSNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down_proj(self.up_proj(self.embed_tokens(ids)).relu())).square().sum()


def groups_of(model: nn.Module, *overrides: str) -> list[dict]:
    names = {name for name, _ in model.named_parameters() if "norm" not in name}
    return parameter_groups(model, names, load_recipe("quickstart", list(overrides)))


def test_norms_do_not_decay():
    groups = groups_of(Small(), "training.weight_decay=0.1", "training.learning_rate=0.01")
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.01, 0.1, 3),
        (0.01, 0.0, 1),
    ]


def test_lora_plus_lets_b_learn_faster():
    model = nn.ModuleDict({"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)})
    groups = groups_of(model, "adapter.lora_plus=16", "training.learning_rate=0.001")
    assert [group["lr"] for group in groups] == [0.001, pytest.approx(0.016)]
    assert groups[1]["params"][0] is model["lora_B"].weight
    assert len(groups_of(model)) == 1


def muon(model: nn.Module) -> MuonWithAdamW:
    tables = {id(model.embed_tokens.weight)}
    groups = groups_of(model, "training.weight_decay=0.01", "training.learning_rate=0.02")
    return MuonWithAdamW(groups, lr=0.02, betas=(0.95, 0.999), eps=1e-8, tables=tables)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int
):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7) * (step + 1) % 7).backward()
        optimizer.step()
        scheduler.step()


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    """Beside torch's two optimizers, each on its part, by the same schedule."""
    ours, theirs = Small(), Small()
    optimizer = muon(ours)
    blocks = [theirs.up_proj.weight, theirs.down_proj.weight]
    first = torch.optim.Muon(blocks, lr=0.02, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [
        {"params": [theirs.embed_tokens.weight], "weight_decay": 0.01},
        {"params": [theirs.norm.weight], "weight_decay": 0.0},
    ]
    second = torch.optim.AdamW(rest, lr=0.02, betas=(0.95, 0.999), fused=True)
    training = load_recipe("quickstart", ["training.schedule=linear", "training.warmup=2"]).training
    train(ours, optimizer, make_schedule(optimizer, training, 6), 6)
    schedules = [make_schedule(one, training, 6) for one in (first, second)]
    for step in range(6):
        first.zero_grad(), second.zero_grad()
        theirs(torch.arange(7) * (step + 1) % 7).backward()
        for one, schedule in zip((first, second), schedules, strict=True):
            one.step()
            schedule.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_muon_goes_on_from_its_state():
    """What transformers saves and loads: three steps, a checkpoint, three more, as six in one go."""
    training = load_recipe("quickstart", ["training.schedule=linear"]).training
    whole, first, second = Small(), Small(), Small()
    one = muon(whole)
    train(whole, one, make_schedule(one, training, 6), 6)
    two = muon(first)
    schedule = make_schedule(two, training, 6)
    train(first, two, schedule, 3)
    saved = copy.deepcopy((first.state_dict(), two.state_dict(), schedule.state_dict()))
    second.load_state_dict(saved[0])
    three = muon(second)
    later = make_schedule(three, training, 6)
    three.load_state_dict(saved[1])
    later.load_state_dict(saved[2])
    for step in range(3, 6):
        three.zero_grad()
        second(torch.arange(7) * (step + 1) % 7).backward()
        three.step()
        later.step()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_without_its_library_is_refused_at_once(monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"{name} needs bitsandbytes") as caught:
        check_optimizer(load_recipe("quickstart", [f"training.optimizer={name}"]))
    assert "pip install" in str(caught.value)
    check_optimizer(load_recipe("quickstart"))
