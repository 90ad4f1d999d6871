"""One rank of tests/llama/test_sharded.py: a sharded model must give the loss and gradients of the whole one.

torchrun --nproc_per_node 2 -m tests.llama.sharded_worker {fsdp2|zero3} {full|tied|lora|pair}
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from llama_ft.adapters.lora import attach_lora
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.projections import project_each
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

X = torch.randint(0, 307, (1, 48), generator=torch.Generator().manual_seed(1))
LABELS = torch.where(torch.arange(48) % 48 > 20, X, -100)
BATCH: dict[str, Any] = {"input_ids": X, "labels": LABELS, "cu_seqlens": [0, 10, 48], "num_items_in_batch": 27}
PAIR: dict[str, Any] = {
    "input_ids": X,
    "cu_seqlens": [0, 20, 30, 48],
    "shared": [-1, 0, 0],
    "rows": torch.tensor([*range(19, 29), 19, *range(30, 47)]),
    "targets": X[0, 20:],
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(SHAPES["llama-3.2-tied" if kind in ("tied", "pair") else "llama-2-70b-like"])
    if kind == "lora":
        model = attach_lora(model, Adapter(r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_of(model: Any, kind: str) -> torch.Tensor:
    """The head's loss; of a pair, whose prompt is shared, how far the log-probabilities of its ends differ."""
    if kind != "pair":
        return model(**BATCH).loss
    log_probs = model(**PAIR).log_probs
    return log_probs[:10].mean() - log_probs[10:].mean()


def whole(kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = make(kind)
    loss = loss_of(model, kind)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fsdp2(kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = make(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.get_base_model() if kind == "lora" else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss = loss_of(model, kind)
    loss.backward()
    assert all(layer.self_attn.project is layer.mlp.project is project_each for layer in inner.model.layers)
    return loss.item(), {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def zero3(kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    model = make(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=trained)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters()), "nothing is partitioned"
    loss = loss_of(engine, kind)
    engine.backward(loss)
    named = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    return loss.item(), {name: gradient for name, gradient in named.items() if gradient is not None}


def main() -> None:
    """Compares, and prints `equal` once."""
    engine, kind = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected_loss, expected = whole(kind)
    loss, found = {"fsdp2": fsdp2, "zero3": zero3}[engine](kind)
    assert abs(loss - expected_loss) <= 1e-5, (loss, expected_loss)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in expected.items():
        gap = (found[name] - gradient).abs().max().item()
        assert gap <= 1e-5 * max(1.0, gradient.abs().max().item()), (name, gap)
    if dist.get_rank() == 0:
        print(f"equal: {len(expected)} gradients")
    dist.barrier()  # a rank that leaves early can take the other's threads down with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
