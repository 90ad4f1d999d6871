"""The fused LoRA against PEFT's own forward: same values, same gradients, and a way out wherever it does not hold."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llama_ft.adapters import fused
from llama_ft.adapters.fused import can_fuse, fused_project
from llama_ft.adapters.lora import attach_lora, stack_projections, target_modules
from llama_ft.errors import UserError
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.projections import project_each
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES


def adapted(adapter: Adapter, *, seed: int = 0, shape: str = "llama-2-70b-like"):
    torch.manual_seed(seed)
    model = attach_lora(LlamaForCausalLM(SHAPES[shape]), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide everything
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def body(model):
    return model.get_base_model().model


def loss_and_gradients(model):
    x = torch.randint(0, 307, (2, 21), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("targets", ["all-linear", "attention", ["q_proj", "v_proj"], ["down_proj"]])
def test_equals_peft(shape, targets):
    model = adapted(Adapter(r=4, alpha=10, targets=targets), shape=shape)
    loss, grads = loss_and_gradients(model)
    body(model).set_project(project_each)  # every module by its own forward: PEFT's
    expected_loss, expected = loss_and_gradients(model)
    assert abs(loss - expected_loss) <= 1e-6
    assert grads.keys() == expected.keys()
    assert grads
    for name, gradient in grads.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_the_fused_product_really_runs(monkeypatch):
    calls = []
    apply = fused._FusedLora.apply
    monkeypatch.setattr(fused._FusedLora, "apply", lambda *args: calls.append(len(args)) or apply(*args))
    loss_and_gradients(adapted(Adapter()))
    assert calls == [3 + 6, 3 + 2, 3 + 4, 3 + 2] * 3  # q/k/v, o, gate/up, down in each of three layers


def test_stacked_weights_are_views_and_keep_their_values():
    torch.manual_seed(0)
    before = {n: p.clone() for n, p in LlamaForCausalLM(SHAPES["llama-1"]).named_parameters()}
    torch.manual_seed(0)
    model = attach_lora(LlamaForCausalLM(SHAPES["llama-1"]), Adapter())
    attention = body(model).layers[1].self_attn
    q, k = attention.q_proj.base_layer.weight, attention.k_proj.base_layer.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    for name, parameter in before.items():
        found = model.get_base_model().get_parameter(
            name.replace("_proj.weight", "_proj.base_layer.weight") if "_proj" in name else name
        )
        assert torch.equal(found, parameter), name


def test_base_is_frozen_and_factors_are_float32():
    model = attach_lora(LlamaForCausalLM(SHAPES["llama-1"]).to(torch.bfloat16), Adapter())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    x = torch.randint(0, 307, (1, 9))
    model(input_ids=x, labels=x).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if name in trained]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("change", ["dropout", "dora", "two adapters", "disabled", "merged"])
def test_falls_back_where_the_formula_does_not_hold(change):
    config = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPES["llama-1"])
    extra = {"lora_dropout": 0.5} if change == "dropout" else {"use_dora": True} if change == "dora" else {}
    model = get_peft_model(base, LoraConfig(**config, **extra))
    body(model).set_project(fused_project)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if change == "two adapters":
        model.add_adapter("other", LoraConfig(**config))
        model.base_model.set_adapter(["default", "other"])
    if change == "merged":
        model.merge_adapter()
    x = torch.randint(0, 307, (1, 12))
    model.train(change == "dropout")

    def logits():
        torch.manual_seed(7)
        with torch.no_grad():
            return model(input_ids=x).logits

    if change == "disabled":
        with model.disable_adapter():
            assert not can_fuse(body(model).layers[0].self_attn.q_proj)
            found = logits()
            body(model).set_project(project_each)
            assert torch.equal(found, logits())
        return
    assert not can_fuse(body(model).layers[0].self_attn.q_proj)
    found = logits()
    body(model).set_project(project_each)
    assert torch.equal(found, logits())


def test_dropout_is_fused_again_in_evaluation():
    model = adapted(Adapter(dropout=0.5))
    module = body(model).layers[0].self_attn.q_proj
    model.train()
    assert not can_fuse(module)
    model.eval()
    assert can_fuse(module)


def test_unknown_target_names_the_nearest():
    assert target_modules("attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    with pytest.raises(UserError) as caught:
        target_modules(["q_prj"])
    assert "did you mean 'q_proj'?" in str(caught.value)


def test_neighbours_by_chance_are_no_stack():
    """Weights that lie side by side in storages of their own, as an allocator may place them: copied, never reached."""
    memory = bytearray(2 * 6 * 4 * 4)
    numbers = torch.frombuffer(memory, dtype=torch.float32)
    numbers.copy_(torch.arange(48.0))
    first, second = (torch.frombuffer(memory, dtype=torch.float32, count=24, offset=at).view(6, 4) for at in (0, 96))
    assert second.data_ptr() == first.data_ptr() + 96
    assert torch.equal(fused._stacked([first, second]), torch.arange(48.0).view(12, 4))


def test_projections_are_stacked_again_after_a_move():
    model = adapted(Adapter(r=4))
    linears = [getattr(body(model).layers[1].mlp, name) for name in ("gate_proj", "up_proj")]

    def copied() -> bool:
        weights = [linear.get_base_layer().weight for linear in linears]
        return fused._stacked(weights).data_ptr() != weights[0].data_ptr()

    assert not copied()
    before = loss_and_gradients(model)
    model.to(torch.float64).to(torch.float32)  # each weight in a storage of its own, as on another device
    assert copied()
    stack_projections(model.get_base_model())
    assert not copied()
    assert loss_and_gradients(model)[0] == before[0]
